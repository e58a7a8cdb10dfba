"""The models, out of the parallel layers: one code, dense and parallel.

Read gpt, then attention; layers has the parts of the rotary GPT, and encoder_decoder looks at a
second sequence.
"""
