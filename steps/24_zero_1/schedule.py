"""What each rank of a pipeline computes, and in which order: a table, made by a pure function.

AFAB, all forward and then all backward, is that of "GPipe: Efficient Training of Giant Neural
Networks using Pipeline Parallelism" (Huang et al.); 1F1B, one forward and one backward in turn, is
that of "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM" (Narayanan
et al.); zero-bubble is ZB-H1 of "Zero Bubble Pipeline Parallelism" (Qi et al.). Letters: p ranks
with a stage each, m micro-batches.
"""

from __future__ import annotations

# F or B, forward or backward, or of B the gradients of the input, I, and those of the weights, W;
# the stage; the micro-batch
Action = tuple[str, int, int]


def make_schedule(name: str, p: int, m: int) -> list[list[Action]]:
    """Each rank's actions. afab: m passes forward, then m backward; 1f1b: then one each in turn.

    The last rank of 1f1b turns around at once, each one before it is one pass further ahead.
    zero-bubble: 1f1b, in which W comes when nothing else can be done.
    """
    schedule = []
    for stage in range(p):
        forward, backward = ([(kind, stage, n) for n in range(m)] for kind in "FB")
        ahead = m if name == "afab" else min(p - 1 - stage, m)
        turns = [a for pair in zip(forward[ahead:], backward, strict=False) for a in pair]
        actions = [*forward[:ahead], *turns, *backward[m - ahead :]]
        schedule.append(weights_put_off(actions, stage) if name == "zero-bubble" else actions)
    return schedule


def weights_put_off(actions: list[Action], delay: int) -> list[Action]:
    """Each B as its I, and the W of the I that lies `delay` back; what is left at the end.

    The later a stage begins, the longer it puts W off: all hold p micro-batches, as the first stage
    of 1F1B does, and at the end W takes the place of waiting.
    """
    found, waiting = [], []
    for kind, stage, n in actions:
        found.append(("F" if kind == "F" else "I", stage, n))
        waiting += [("W", stage, n)] if kind == "B" else []
        if kind == "B" and len(waiting) > delay:
            found.append(waiting.pop(0))
    return found + waiting


def length(schedule: list[list[Action]]) -> int:
    """When the last rank has ended, if F, I and W take 1 and B 2.

    Each rank does its actions in their order, one as soon as what it needs of a neighbour is there.
    Raises ValueError if ranks wait for each other for ever.
    """
    ends: dict[Action, int] = {}
    left, free = [list(actions) for actions in schedule], [0] * len(schedule)
    while any(left):
        moved = False
        for rank, actions in enumerate(left):
            while actions:
                kind, stage, n = actions[0]
                needed = (kind, stage + {"F": -1, "W": len(schedule)}.get(kind, 1), n)
                if needed[1] in range(len(schedule)) and needed not in ends:
                    break
                begin = max(free[rank], ends.get(needed, 0))
                free[rank] = ends[actions.pop(0)] = begin + (2 if kind == "B" else 1)
                moved = True
        if not moved:
            raise ValueError(f"these wait for each other: {[a[0] for a in left if a]}")
    return max(free)
