"""Flags that belong together: `train --preset NAME`; flags that follow change single ones."""

from __future__ import annotations

from typing import Literal

PresetName = Literal[
    "default",
    "speedrun",
    "gpt2",
    "gpt2-medium",
    "gpt2-large",
    "gpt2-xl",
    "llama-1b",
    "llama-8b",
    "bert-tiny",
    "bert-base",
    "t5-tiny",
    "t5-small",
    "glm-tiny",
    "glm-base",
    "glm-large",
]
# Of the third generation: eight heads of keys and values, and a slow turn.
LLAMA = (
    "--architecture llama --context-length 8192 --n-heads 32 --n-kv-heads 8 --rotary-base 500000 "
    "--no-bias"
)
PRESETS: dict[PresetName, str] = {
    "default": "",
    # A character model of a small text in seconds; benchmarks/LOG.md says what was tried.
    "speedrun": "--architecture rotary --context-length 64 --n-layers 2 --n-heads 2 --d-model 64 "
    "--rotary-base 30 --no-bias --no-tied "
    "--optimizer muon --learning-rate 0.15 --head-learning-rate 0.035 --muon-learning-rate 0.07 "
    "--muon-momentum 0.75 --beta1 0.8 --beta2 0.95 --eps 1e-10 --weight-decay 0 "
    "--schedule linear --stable-ratio 0.35 --min-lr-ratio 0 --warmup-steps 10 --grad-clip 0 "
    "--global-batch-size 48 --steps 150 --eval-every 0 --eval-tokens 1048576 --checkpoint-every 0",
    "gpt2": "--context-length 1024 --n-layers 12 --n-heads 12 --d-model 768",
    "gpt2-medium": "--context-length 1024 --n-layers 24 --n-heads 16 --d-model 1024",
    "gpt2-large": "--context-length 1024 --n-layers 36 --n-heads 20 --d-model 1280",
    "gpt2-xl": "--context-length 1024 --n-layers 48 --n-heads 25 --d-model 1600",
    "llama-1b": f"{LLAMA} --n-layers 16 --d-model 2048 --d-ff 8192",
    "llama-8b": f"{LLAMA} --n-layers 32 --d-model 4096 --d-ff 14336 --no-tied",
    "bert-tiny": "--architecture bert --context-length 64 --n-layers 2 --n-heads 4 --d-model 128 "
    "--optimizer muon --learning-rate 3e-3 --muon-learning-rate 0.05 --global-batch-size 32 "
    "--steps 300",
    "bert-base": "--architecture bert --context-length 512 --n-layers 12 --n-heads 12 "
    "--d-model 768 --dropout 0.1",
    "t5-tiny": "--architecture t5 --no-bias --context-length 64 --n-layers 2 --n-heads 4 "
    "--d-model 128 --optimizer muon --learning-rate 3e-3 --muon-learning-rate 0.05 "
    "--global-batch-size 32 --steps 300",
    "t5-small": "--architecture t5 --no-bias --context-length 512 --n-layers 6 --n-heads 8 "
    "--d-model 512 --dropout 0.1",
    "glm-tiny": "--architecture glm --context-length 64 --n-layers 2 --n-heads 4 --d-model 128 "
    "--optimizer muon --learning-rate 3e-3 --muon-learning-rate 0.05 --global-batch-size 32 "
    "--steps 300",
    "glm-base": "--architecture glm --context-length 512 --n-layers 12 --n-heads 12 "
    "--d-model 768 --dropout 0.1",
    "glm-large": "--architecture glm --context-length 512 --n-layers 24 --n-heads 16 "
    "--d-model 1024 --dropout 0.1",
}
