"""What a layout moves and holds: pure functions of the config, no process is started.

layout sums it up, out of shares (what of a model a rank has), activations and pipeline; attention,
loss, llama, t5, transformer_xl and zero have closed forms of their own; peak is the most that is
held at once; settings names what they know; report prints the plan of a run.
"""
