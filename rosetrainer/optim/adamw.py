"""AdamW in torch's fused kernel, without what torch.optim.AdamW imports at its first step.

That is torch.compile's machinery: 1.6 s in each rank, as long as torch itself takes.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw


class AdamW:
    """Bitwise torch.optim.AdamW(fused=True), of "Decoupled Weight Decay Regularization"
    (Loshchilov and Hutter).

    param_groups: dicts of "params", "lr", "betas", "eps" and "weight_decay". state: by parameter,
    "step" (a scalar) and the moments "exp_avg" and "exp_avg_sq", from the first step on.
    """

    def __init__(self, groups: list[dict[str, Any]], **defaults: Any) -> None:
        self.param_groups = [{**defaults, **group} for group in groups]
        self.state: defaultdict[Tensor, dict[str, Tensor]] = defaultdict(dict)

    @torch.no_grad()
    def step(self) -> None:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._update(parameters, group)

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if "exp_avg" not in self.state[parameter]:
                self.state[parameter] |= {
                    "step": torch.zeros((), device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        moments = (
            [self.state[p][key] for p in parameters] for key in ("exp_avg", "exp_avg_sq", "step")
        )
        means, squares, steps = moments
        gradients = [p.grad for p in parameters if p.grad is not None]
        beta1, beta2 = group["betas"]
        adamw(
            parameters,
            gradients,
            means,
            squares,
            [],
            steps,
            fused=True,  # three times as fast as the default on a CPU
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def zero_grad(self) -> None:
        """Takes the gradients away, of all parameters."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
