"""What one processor likes better; the trainer is right without it.

Read kernels first, which puts onednn and attention_blocks in the place of torch's; then gloo_sums
(sums between CPUs), block_compile, memory, and performance, which asks the machine.
"""
