"""The pictures of the pages, each made by a small program from its step's own numbers.

`canvas` is paper and pen, `flow` lays tensors and collectives out rank by rank, forward and
backward; the modules beside them hold one function a step, and `album` says which is whose.
"""
