"""Flags that belong together: `train --preset NAME`; flags that follow change single ones."""

from __future__ import annotations

PRESETS = {
    "default": "",
    # A character model of a small text in seconds; benchmarks/LOG.md says what was tried.
    "speedrun": "--architecture rotary --context-length 64 --n-layers 2 --n-heads 2 --d-model 64 "
    "--rotary-base 50 --no-bias --no-tied "
    "--optimizer muon --learning-rate 0.15 --head-learning-rate 0.03 --muon-learning-rate 0.06 "
    "--muon-momentum 0.8 --beta1 0.8 --beta2 0.95 --eps 1e-10 --weight-decay 0 "
    "--schedule linear --min-lr-ratio 0 --warmup-steps 10 --grad-clip 0 --global-batch-size 48 "
    "--steps 160 --eval-every 0 --eval-tokens 1048576 --checkpoint-every 0",
}
