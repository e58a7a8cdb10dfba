"""The models, out of the parallel layers: one code, dense and parallel.

Read gpt, then attention; layers and positions have parts that other models take in the place of
GPT-2's: rotary is one, llama a family of them, made of choices, bert sees both sides of a token,
and t5, with its relative_bias, reads one text and writes another; build chooses. generation draws
text from a model, and encoder_decoder looks at a second sequence.
"""
