"""The training run. Read trainer (the loop) and step (one update), then setup.

evaluation measures the validation loss. A run's folder: open_run, run_identity and resume decide
where it begins; agreement compares the ranks. What it shows: introduction, run_log, loss_curve,
screen, profiler, and pace, which names slow ranks.
"""
