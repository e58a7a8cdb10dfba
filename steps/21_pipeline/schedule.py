"""What each rank of a pipeline computes, and in which order: a table, made by a pure function.

AFAB, all forward and then all backward, is that of "GPipe: Efficient Training of Giant Neural
Networks using Pipeline Parallelism" (Huang et al.); 1F1B, one forward and one backward in turn, is
that of "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM" (Narayanan
et al.). Letters: p ranks with a stage each, m micro-batches.
"""

from __future__ import annotations

Action = tuple[str, int, int]  # F or B, forward or backward; the stage; the micro-batch


def make_schedule(name: str, p: int, m: int) -> list[list[Action]]:
    """Each rank's actions. afab: m passes forward, then m backward; 1f1b: then one each in turn.

    The last rank of 1f1b turns around at once, each one before it is one pass further ahead.
    """
    schedule = []
    for stage in range(p):
        forward, backward = ([(kind, stage, n) for n in range(m)] for kind in "FB")
        ahead = m if name == "afab" else min(p - 1 - stage, m)
        turns = [a for pair in zip(forward[ahead:], backward, strict=False) for a in pair]
        schedule.append([*forward[:ahead], *turns, *backward[m - ahead :]])
    return schedule
