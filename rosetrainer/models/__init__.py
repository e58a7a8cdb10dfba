"""The models, out of the parallel layers: one code, dense and parallel.

Read gpt, then attention; generation draws text from a model; layers has the parts of the rotary
GPT, and encoder_decoder looks at a second sequence.
"""
