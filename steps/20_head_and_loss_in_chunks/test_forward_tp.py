"""The model and its layers against dense code: logits, loss, every gradient, three updates.

OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node=2 test_forward_tp.py
"""

from __future__ import annotations
