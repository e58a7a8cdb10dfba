"""Parameters that stay as they begin: --freeze, for fine-tuning chiefly.

They have no gradient, no moments and no decay; all that sums, clips or updates passes over them.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase

from torch import nn

from rosetrainer.validation import ConfigError


def freeze(model: nn.Module, patterns: str | None) -> int:
    """Lets the parameters that patterns name stay as they are; how many numbers those have.

    patterns: of names as a checkpoint has them, with commas between: "token_embedding*,blocks.0.*".
    Raises ConfigError if one matches nothing, or if nothing is left to train.
    """
    parameters, count = dict(model.named_parameters()), 0
    for pattern in patterns.split(",") if patterns is not None else ():
        matched = [p for name, p in parameters.items() if fnmatchcase(name, pattern.strip())]
        if not matched:
            raise ConfigError(
                f"freeze={patterns}: {pattern.strip() or 'an empty pattern'} is no parameter's "
                f"name; it can be {', '.join(groups_of(model))}, or any name that these match"
            )
        for parameter in matched:
            count += parameter.numel() * parameter.requires_grad
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ConfigError(
            f"freeze={patterns} leaves nothing to train; leave out one of "
            f"{', '.join(groups_of(model))} at least"
        )
    return count


def groups_of(model: nn.Module) -> Iterator[str]:
    """Patterns that together name each parameter: token_embedding*, blocks.0.* to blocks.3.*."""
    for name, module in model.named_children():
        if isinstance(module, nn.ModuleList) and len(module):
            last = f" to {name}.{len(module) - 1}.*" * (len(module) > 1)
            yield f"{name}.0.*{last}"
        elif any(True for _ in module.parameters()):
            yield f"{name}*"
