"""What a run shows of itself. Read reporter, which the loop calls; it decides nothing.

run_log writes the terminal, log.jsonl and TensorBoard, by way of screen; messages: what is said
before the first step and after the last. loss_curve, profiler; timeline and timeline_picture are a
pipeline's step; slow_ranks names slow ones.
"""
