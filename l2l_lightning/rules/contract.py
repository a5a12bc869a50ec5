"""Every update rule is tried on two coordinates as soon as it has been constructed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from l2l_lightning.errors import RuleError
from l2l_lightning.rules.layout import Layout, ParameterInfo, Time

if TYPE_CHECKING:
    from l2l_lightning.rules.base import UpdateRule

N = 2
"""The trial has this many coordinates."""


def check_contract(rule: UpdateRule) -> None:
    """Reads a gradient of zero and takes one step, and raises for the first sentence that a rule breaks.

    Raises:
        RuleError: The rule breaks the contract of `UpdateRule`; the message has the sentence.
    """
    name = type(rule).__name__

    def require(condition: bool, sentence: str, got: str) -> None:
        if not condition:
            raise RuleError(f"{name} breaks the contract of update rules: {sentence}; {got}")

    def tried(what: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:  # whatever code of the user's raises
            text = f"{type(error).__name__}: {error}"
            raise RuleError(
                f"{name} breaks the contract of update rules: {what}; it raises {text}"
            ) from error

    shape = getattr(rule, "state_shape", None)
    require(
        isinstance(shape, tuple | list | torch.Size)
        and all(type(size) is int and size >= 0 for size in shape),
        "state_shape is a tuple of whole numbers, the shape of one coordinate's state",
        "it is not set" if shape is None else f"it is {shape!r}",
    )
    phi = next(rule.parameters(), None)
    require(phi is not None, "φ is a rule's parameters, and it has at least one", "it has none")
    assert phi is not None
    grad = phi.new_zeros(N, dtype=torch.promote_types(phi.dtype, torch.float32))
    inference = torch.is_inference_mode_enabled()
    stream = torch.get_rng_state()
    full_precision = nullcontext() if phi.is_meta else torch.autocast(phi.device.type, enabled=False)
    with torch.enable_grad(), full_precision:
        inputs = grad
        if rule.features is not None:
            inputs = _features(rule, grad, require, tried)
        state = rule.init_state(N, grad.dtype)
        versions = _versions(inputs, state)
        outputs = tried(
            "step takes (inputs, state) and returns (update, new state)", lambda: rule.step(inputs, state)
        )
        # Kept states are stepped on from again, and must lead to what they led to.
        sentence = "step leaves its arguments as they are"
        require(_versions(inputs, state) == versions, sentence, "it writes into them")
        drew = not torch.equal(torch.get_rng_state(), stream)
        torch.set_rng_state(stream)
        require(not drew, "a step is the same whenever it is taken", "it draws from the global random stream")
        is_pair = isinstance(outputs, tuple) and [type(x) for x in outputs] == [Tensor, Tensor]
        require(is_pair, "step returns the tensors (update, new state)", f"it returns {_describe(outputs)}")
        for what, tensor, expected in (
            ("update", outputs[0], (N,)),
            ("new state", outputs[1], tuple(state.shape)),
        ):
            letters = "[n]" if what == "update" else "[*state_shape, n]"
            require(
                tuple(tensor.shape) == expected and tensor.dtype == grad.dtype,
                f"the {what} is {letters} in the inputs' dtype, here {list(expected)} and {grad.dtype}",
                f"it is {_describe(tensor)}",
            )
            _require_finite(require, f"the {what}", tensor)
        _require_coordinatewise(rule, inputs, state, require)
        if inference:  # in which nothing can be differentiated
            return
        differentiable = [output for output in outputs if output.requires_grad and output.numel()]
        trained = [parameter for parameter in rule.parameters() if parameter.requires_grad]
        sentence = "the update or the state that it leaves depends on φ, and is differentiable in it"
        require(bool(differentiable and trained), sentence, "neither has a gradient")
        total = torch.stack([output.sum() for output in differentiable]).sum()
        d_phi = torch.autograd.grad(total, trained, allow_unused=True)
        require(any(d is not None for d in d_phi), sentence, "no parameter of the rule has a part in them")


def _require_coordinatewise(
    rule: UpdateRule, inputs: Tensor, state: Tensor, require: Callable[[bool, str, str], None]
) -> None:
    if inputs.is_meta:
        return
    probe = torch.ones_like(inputs) * inputs.new_tensor([0.5, -0.25])
    together = rule.step(probe, state)[0]
    alone = torch.cat([rule.step(probe[..., [i]], state[..., [i]])[0] for i in range(N)])
    require(
        torch.allclose(together, alone, rtol=1e-3, atol=1e-6, equal_nan=True),
        "a step moves every coordinate by its own inputs and state alone",
        f"two coordinates move by {together.tolist()} together and by {alone.tolist()} each alone",
    )


def _features(
    rule: UpdateRule,
    grad: Tensor,
    require: Callable[[bool, str, str], None],
    tried: Callable[[str, Callable[[], Any]], Any],
) -> Tensor:
    """Returns what the features make of a gradient of zero, [width, n], after checking it."""
    features = rule.features
    assert features is not None
    for name, low, high in (("width", 1, 32), ("rows", 0, 10**6)):
        value = getattr(features, name, None)
        require(
            type(value) is int and low <= value <= high,
            f"features have a {name}, a whole number from {low} on",
            "it is not set" if value is None else f"it is {value!r}",
        )
    zero = _zero(rule, total_steps=100)
    inputs: Tensor = tried(
        "features take (grad, statistics, time, layout) and return the inputs",
        lambda: rule.read(*zero),
    )
    statistics = zero[1]
    require(
        features.rows == 0 or statistics.is_inference() or statistics._version > 0,
        "features bring their statistics up to date in place",
        "nothing is written into them",
    )
    require(
        isinstance(inputs, Tensor)
        and tuple(inputs.shape) == (features.width, N)
        and inputs.dtype == grad.dtype,
        f"features are [width, n] in the gradients' dtype, here {[features.width, N]} and {grad.dtype}",
        f"they are {_describe(inputs)}",
    )
    require(not inputs.requires_grad, "features are free of φ", "they depend on a parameter")
    _require_finite(require, "the features", inputs)
    return inputs


def read_zero(rule: UpdateRule, total_steps: int | None) -> Tensor:
    """Returns what a rule reads of a gradient of zero in its first step, [2] or [width, 2].

    Raises:
        ValueError: Its features need to know T, and total_steps is None.
    """
    return rule.read(*_zero(rule, total_steps))


def _zero(rule: UpdateRule, total_steps: int | None) -> tuple[Tensor, Tensor, Time, Layout]:
    """Returns the arguments of `rule.read` in a first step whose gradient is zero."""
    phi = next(rule.parameters())
    grad = phi.new_zeros(N, dtype=torch.promote_types(phi.dtype, torch.float32))
    time, layout = Time(grad.new_zeros(()), total_steps), Layout((ParameterInfo("parameter", (N,)),))
    return grad, rule.init_statistics(N, grad.dtype), time, layout


def _versions(*tensors: Tensor) -> list[int]:
    """Returns how often tensors have been written into, which inference mode does not count."""
    return [tensor._version for tensor in tensors if not tensor.is_inference()]


def _require_finite(require: Callable[[bool, str, str], None], what: str, tensor: Tensor) -> None:
    if tensor.device.type != "meta":
        sentence = "all is finite where gradients, states and statistics are zero"
        require(bool(tensor.isfinite().all()), sentence, f"{what} is {tensor.tolist()}")


def _describe(value: Any) -> str:
    return f"{list(value.shape)} {value.dtype}" if isinstance(value, Tensor) else repr(value)
