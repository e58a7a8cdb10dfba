"""What one processor likes better; the trainer is right without it.

Read kernels first, which puts onednn, attention_blocks and layer_norm in the place of torch's; then
measured, which keeps what kernel_times has measured of this machine, for kernels and performance to
choose by; gloo_sums and shared_sums (sums between CPUs, the latter in shared_memory),
block_compile, memory, and processor, which asks the machine's.
"""
