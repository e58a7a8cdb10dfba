"""Whether a layout computes what one process does, and what it is held against.

reference and reference_rotary are the dense oracles, plain nn.Linear and no layer of ours;
computation makes the same few updates in a layout and by the oracle, comparison judges them.
"""
