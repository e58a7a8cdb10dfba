"""A run's state on disk, readable in any layout.

manifest says what a checkpoint holds, slices writes and reads its files, ownership says which rank
writes what, saver saves and restores a model and its optimizer, run_folder keeps what lies beside
the checkpoints, export writes whole weights, and safetensors_file a file tensor by tensor.
huggingface/ reads and writes checkpoints of that library.
"""
