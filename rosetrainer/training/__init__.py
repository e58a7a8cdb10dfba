"""The training run. Read trainer (the loop and one update), step (its gradient), then setup.

evaluation measures the validation loss. A run's folder: resume_plan, open_run and run_identity
decide where it begins, and trained reads what it has left; agreement compares the ranks;
memory_need says what they hold.
"""
