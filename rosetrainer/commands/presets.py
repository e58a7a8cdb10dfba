"""Settings that belong together: `train --preset NAME`; flags that follow change single ones."""

from __future__ import annotations

from rosetrainer.config import (
    CheckpointConfig,
    EvaluationConfig,
    GPTConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)

PRESETS = {
    "default": TrainConfig(),
    # A character model of a small text in seconds; benchmarks/LOG.md says what was tried.
    "speedrun": TrainConfig(
        model=GPTConfig(
            architecture="rotary",
            context_length=64,
            n_layers=2,
            n_heads=2,
            d_model=64,
            rotary_base=50.0,
            bias=False,
            tied=False,
        ),
        optim=OptimConfig(
            optimizer="muon",
            learning_rate=0.15,
            head_learning_rate=0.03,
            muon_learning_rate=0.06,
            muon_momentum=0.8,
            beta1=0.8,
            beta2=0.95,
            eps=1e-10,
            weight_decay=0.0,
            schedule="linear",
            min_lr_ratio=0.0,
            warmup_steps=10,
            grad_clip=0.0,
            global_batch_size=48,
        ),
        run=RunConfig(steps=160),
        evaluation=EvaluationConfig(eval_every=0, eval_tokens=2**20),
        checkpoint=CheckpointConfig(checkpoint_every=0),
    ),
}
