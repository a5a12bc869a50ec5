"""These functions say which options, parameters and gradients LearnedOptimizer accepts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from l2l_lightning.checks import check_whole_numbers
from l2l_lightning.optim.sharding import local

NOT_A_RULES = {"betas", "eps", "momentum", "dampening", "nesterov", "amsgrad", "foreach", "fused"}
"""Options of other optimizers that a rule has none of."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Parameters and gradients must have one of these dtypes."""


def check_options(group: dict[str, Any]) -> None:
    """Raises ValueError or TypeError for an option of a group that is out of range or of another kind."""
    for name in ("lr", "weight_decay"):
        value = group[name]
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(f"{name} must be one number, got a tensor of {list(value.shape)}")
        elif not isinstance(value, int | float) or isinstance(value, bool):
            raise TypeError(f"{name} must be a number, got {value!r}")
        if not value >= 0:
            raise ValueError(f"{name} must not be negative, got {value}")
        if not value < math.inf:
            raise ValueError(f"{name} must be finite, got {value}")
    if not isinstance(group["maximize"], bool):
        raise TypeError(f"maximize must be true or false, got {group['maximize']!r}")
    if group["total_steps"] == math.inf:
        raise ValueError("total_steps must be finite, got inf: leave it out where nobody knows it")
    if group["total_steps"] is not None:
        check_whole_numbers(1, 10**12, total_steps=group["total_steps"])
    check_whole_numbers(0, 10**12, step=group["step"])


def check_no_others(group: dict[str, Any]) -> None:
    """Raises TypeError for an option of another optimizer, which would have no effect."""
    if others := sorted(NOT_A_RULES & group.keys()):
        raise TypeError(f"LearnedOptimizer has no {', '.join(others)}: its rule has learned what they set")


def habit_of(group: dict[str, Any]) -> str | None:
    """Returns what is to be said of a group whose options look like another optimizer's, or None.

    A rate is judged by `initial_lr` where a scheduler has set it: what a warm-up begins with is no habit.
    """
    lr, weight_decay = float(group.get("initial_lr", group["lr"])), float(group["weight_decay"])
    if 0 < lr < 0.05:
        return (
            f"lr={lr:g} multiplies the learned step, for which 1 is what the rule is meant for: leave lr "
            "out, as the rule has a step size and a schedule of its own"
        )
    if lr * weight_decay >= 0.005:
        return (
            f"weight_decay={weight_decay:g} takes a share of {lr * weight_decay:g} off every parameter at "
            "each step, as it is multiplied by lr and by no smaller rate: AdamW's 0.01 at a rate of 0.001 is "
            "weight_decay=1e-5 here"
        )
    return None


def name_of(group: dict[str, Any], index: int) -> str:
    """Returns the name by which messages refer to a group's parameter."""
    return repr(group["param_names"][index]) if "param_names" in group else f"parameter {index} of its group"


def check_dense(name: str, tensor: Tensor) -> None:
    """Raises ValueError, by the parameter's name, for one that is not dense or not of real numbers."""
    if tensor.is_complex():
        raise ValueError(f"{name} is complex: a rule reads real gradients; optimise torch.view_as_real of it")
    if tensor.dtype not in DTYPES:
        known = ", ".join(str(dtype) for dtype in DTYPES)
        raise ValueError(f"{name} is {tensor.dtype}: LearnedOptimizer updates {known}")
    if tensor.layout != torch.strided:
        raise ValueError(f"{name} is sparse ({tensor.layout}): LearnedOptimizer updates dense parameters")


def problem_of(
    parameter: Tensor, entries: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> str | None:
    """Returns why a parameter with a gradient cannot be updated (a message puts the name before), or None."""
    gradient = parameter.grad
    assert gradient is not None
    if gradient.layout != torch.strided:
        return (
            "has a sparse gradient, which LearnedOptimizer does not support: use sparse=False in its layer, "
            "or another optimizer for it"
        )
    if parameter.dtype not in DTYPES or parameter.layout != torch.strided:
        return f"has become {parameter.dtype}, {parameter.layout} since the optimizer was given it"
    if gradient.dtype not in DTYPES:
        return f"has a gradient of {gradient.dtype}"
    if gradient.shape != parameter.shape:
        return f"has shape {list(parameter.shape)}, and its gradient {list(gradient.shape)}"
    if gradient.device != parameter.device:
        return f"is on {parameter.device}, and its gradient on {gradient.device}"
    here = local(parameter)
    if any(size > 1 and stride == 0 for size, stride in zip(here.shape, here.stride(), strict=True)):
        return "is expanded: several of its coordinates are one number, which has no single update"
    if here.is_inference() and not torch.is_inference_mode_enabled():
        return "was made under torch.inference_mode and cannot be updated outside it: clone it"
    for key, shape in shapes.items():
        if key in entries and tuple(entries[key].shape) != (*shape, *parameter.shape):
            return (
                f"has shape {list(parameter.shape)}, and its state {list(entries[key].shape)}, where "
                f"{[*shape, *parameter.shape]} would fit: another tensor is another parameter, for "
                "add_param_group"
            )
    return None
