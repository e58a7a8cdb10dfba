"""The models, out of the parallel layers: one code, dense and parallel.

Read gpt, then attention; layers and positions have parts that other models take in the place of
GPT-2's: rotary is one, llama a family of them, made of choices, bert sees both sides of a token,
t5, with its relative_bias, reads one text and writes another, glm does both in one sequence, and
transformer_xl projects distances; build chooses. generation draws text from a model, filling writes
what a text lacks, and encoder_decoder looks at a second sequence.

Letters (comm.py): over tp a layer takes and gives I unless it says otherwise, or V, a rank's own
tokens, under sequence parallelism; over dp V, a rank's own rows; over pp what a stage passes on is
on that stage's ranks alone. A parameter is V where it is cut, R where its gradient is still to be
summed, as over dp, and else I: its shard spec says which.
"""
