"""What one processor likes better: onednn, block_compile, and performance, which asks it."""
