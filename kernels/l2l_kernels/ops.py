"""The operators `step_`, `step` and `bptt`, registered with PyTorch (fake, autograd, by device).

`step_` updates in place and is what a rollout or a deployed optimizer calls; `step` is its functional,
differentiable twin; `bptt` is the backward of a whole window. N coordinates, T steps; states [L, 2, H, N].
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, library

from l2l_kernels import backends
from l2l_kernels.checks import check_bptt, check_overlap, check_step
from l2l_kernels.spec import LSTMSpec


@functools.lru_cache
def _known_spec(whole: tuple[int, ...], floating: tuple[float, ...]) -> LSTMSpec:
    return LSTMSpec.from_lists(whole, floating)


def _spec(whole: Sequence[int], floating: Sequence[float], _: str) -> LSTMSpec:
    """Builds the spec of an operator's lists, and checks it the first time only: steps come by thousands."""
    return _known_spec(tuple(whole), tuple(floating))


def _implementation(phi: Tensor, *constants: Any) -> backends.Backend:
    return backends.load(backends.choose(phi.device, constants[-1] or None))


def _register(name: str, schema: str, fake: Callable[..., Any]) -> Callable[..., Callable[..., Any]]:
    """Registers a function as the operator l2l_kernels::name, for every device.

    PyTorch's own custom_op has layers of Python that a small optimizee's step would wait for.

    Args:
        name: The operator's name.
        schema: Its tensors and results, in PyTorch's notation; the spec and the backend come after them.
        fake: Computes the shapes of its results.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        qualified = f"l2l_kernels::{name}"
        library.define(qualified, schema.replace(") ->", ", int[] whole, float[] floating, str backend) ->"))
        library.impl(qualified, "CompositeExplicitAutograd", function)
        library.register_fake(qualified, fake)
        operator: Callable[..., Any] = getattr(torch.ops.l2l_kernels, name).default
        return operator

    return register


@_register(
    "step_",
    "(Tensor(a!) theta, Tensor inputs, Tensor state, Tensor(b!) new_state, Tensor phi) -> ()",
    lambda theta, inputs, state, new_state, phi, *constants: check_step(
        _spec(*constants), phi, theta, inputs, state, new_state
    ),
)
def _step_(
    theta: Tensor, inputs: Tensor, state: Tensor, new_state: Tensor, phi: Tensor, *constants: Any
) -> None:
    spec = _spec(*constants)
    check_step(spec, phi, theta, inputs, state, new_state)
    check_overlap({"theta": theta, "new_state": new_state}, {"inputs": inputs, "state": state, "phi": phi})
    _implementation(phi, *constants).step_(theta, inputs, state, new_state, phi, spec)


def _step_fake(
    theta: Tensor, inputs: Tensor, state: Tensor, phi: Tensor, *constants: Any
) -> tuple[Tensor, Tensor]:
    check_step(_spec(*constants), phi, theta, inputs, state)
    return torch.empty_like(theta), torch.empty_like(state)


@_register("step", "(Tensor theta, Tensor inputs, Tensor state, Tensor phi) -> (Tensor, Tensor)", _step_fake)
def _step(
    theta: Tensor, inputs: Tensor, state: Tensor, phi: Tensor, *constants: Any
) -> tuple[Tensor, Tensor]:
    spec = _spec(*constants)
    check_step(spec, phi, theta, inputs, state)
    new_theta, new_state = theta.clone(), torch.empty_like(state)
    _implementation(phi, *constants).step_(new_theta, inputs, state, new_state, phi, spec)
    return new_theta, new_state


def _bptt_fake(
    inputs: Tensor, history: Tensor, d_updates: Tensor, d_final: Tensor | None, phi: Tensor, *constants: Any
) -> tuple[Tensor, Tensor]:
    check_bptt(_spec(*constants), phi, inputs, history, d_updates, d_final)
    return torch.empty_like(phi), history.new_empty(history.shape[1:], dtype=phi.dtype)


@_register(
    "bptt",
    "(Tensor inputs, Tensor history, Tensor d_updates, Tensor? d_final_state, Tensor phi) "
    "-> (Tensor, Tensor)",
    _bptt_fake,
)
def _bptt(
    inputs: Tensor, history: Tensor, d_updates: Tensor, d_final: Tensor | None, phi: Tensor, *constants: Any
) -> tuple[Tensor, Tensor]:
    spec = _spec(*constants)
    check_bptt(spec, phi, inputs, history, d_updates, d_final)
    return _implementation(phi, *constants).bptt(inputs, history, d_updates, d_final, phi, spec)


def _step_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, fed, state, phi, *constants = inputs
    if ctx.needs_input_grad[1]:
        raise RuntimeError(
            "l2l_kernels.step treats its inputs as constants: pass them detached, "
            "or use l2l_kernels.reference.step for second-order meta-gradients"
        )
    ctx.save_for_backward(fed, state, output[1], phi)
    ctx.constants = constants


def _step_backward(ctx: Any, d_theta: Tensor, d_state: Tensor) -> tuple[Tensor | None, ...]:
    inputs, state, new_state, phi = ctx.saved_tensors
    d_phi, d_old_state = _bptt(
        inputs[None], torch.stack([state, new_state]), d_theta[None], d_state, phi, *ctx.constants
    )
    return d_theta, None, d_old_state.to(state.dtype), d_phi, *(None for _ in ctx.constants)


library.register_autograd("l2l_kernels::step", _step_backward, setup_context=_step_setup_context)


@functools.lru_cache
def _constants(spec: LSTMSpec, backend: str | None) -> tuple[list[int], list[float], str]:
    return *spec.to_lists(), backend or ""


def step_(
    theta: Tensor,
    inputs: Tensor,
    state: Tensor,
    new_state: Tensor,
    phi: Tensor,
    spec: LSTMSpec,
    backend: str | None = None,
) -> None:
    """Updates every coordinate in place and in one launch: θ += u_t, new_state = s_{t+1}.

    Args:
        theta: θ, [N]; updated in place.
        inputs: ∇f(θ), [N], or features, [width, N], with preprocessing "features".
        state: s_t, [L, 2, H, N].
        new_state: Where s_{t+1} goes, [L, 2, H, N]: a slot of a history, or `state` itself.
        phi: φ, [P]; arithmetic is done in its dtype.
        spec: The LSTM's shape.
        backend: Overrides the choice by device (see backends.choose).

    Raises:
        ValueError: A tensor's shape, dtype, device or layout does not fit, or one that is written overlaps.
        BackendUnavailableError: The backend asked for cannot run here.
    """
    _step_(theta, inputs, state, new_state, phi, *_constants(spec, backend))


def step(
    theta: Tensor, inputs: Tensor, state: Tensor, phi: Tensor, spec: LSTMSpec, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Updates every coordinate without changing its arguments: returns θ + u_t [N] and s_{t+1} [L, 2, H, N].

    It is differentiable in θ, the state and φ; the inputs are constants (first order), and a RuntimeError
    refuses their derivative. Arguments and other errors are those of `step_`.

    Example:
        >>> spec = LSTMSpec(num_layers=1, hidden_size=4)
        >>> phi = torch.zeros(spec.num_parameters)
        >>> theta, state = step(torch.ones(3), torch.ones(3), torch.zeros(1, 2, 4, 3), phi, spec)
        >>> theta
        tensor([1., 1., 1.])
    """
    new_theta, new_state = _step(theta, inputs, state, phi, *_constants(spec, backend))
    return new_theta, new_state


def bptt(
    inputs: Tensor,
    history: Tensor,
    d_updates: Tensor,
    d_final_state: Tensor | None,
    phi: Tensor,
    spec: LSTMSpec,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs backward through a window of T steps: returns d_phi [P] and d_initial_state [L, 2, H, N].

    Arguments are those of `reference.bptt`, and a backend; errors are those of `step_`.
    """
    d_phi, d_state = _bptt(inputs, history, d_updates, d_final_state, phi, *_constants(spec, backend))
    return d_phi, d_state
