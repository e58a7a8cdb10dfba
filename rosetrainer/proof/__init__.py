"""Whether a layout computes what one process does, and what it is held against.

reference and reference_rotary are the dense oracles, plain nn.Linear and no layer of ours; batches
are uneven and random; trajectory makes the same few updates in a layout and by the oracle,
tolerances says how far the results may differ, report shows it.
"""
