"""The contract of an update rule: what is learned."""

from __future__ import annotations

import dataclasses
from abc import ABC, ABCMeta, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from l2l_lightning.class_paths import Configurable
from l2l_lightning.rules.contract import check_contract
from l2l_lightning.rules.features import Features
from l2l_lightning.rules.layout import Layout, ParameterInfo, Time


class TensorStep(Protocol):
    """A step that moves tensors where they are: see `UpdateRule.tensor_step`."""

    def __call__(
        self,
        chosen: Sequence[int],
        thetas: Sequence[Tensor],
        grads: Sequence[Tensor],
        step: int,
        total: int | None,
        lr: float,
        weight_decay: float,
        maximize: bool,
    ) -> None:
        """θ ← (1 − lr · weight_decay) θ + lr u_t, of some of the layout's tensors, and their statistics.

        Args:
            chosen: The positions of the tensors that have a gradient, in order.
            thetas: What this process holds of each of them, of any strides and floating dtype.
            grads: Their gradients.
            step: t.
            total: T, if it is known.
            lr: Multiplies the update.
            weight_decay: Decoupled, multiplied by lr.
            maximize: Whether gradients are to be negated.
        """


Step = Callable[[Tensor, Tensor, Tensor, Tensor], None]
"""A step takes (θ [n], x_t, s_t, s_{t+1}), adds u_t to θ and writes s_{t+1}, as `UpdateRule.step_` does."""


PopulationStep = Callable[[Tensor, Tensor, Time], None]
"""A step of K optimizees takes (θ [K, n], g_t [K, n], time) and moves θ in place."""


class Rule(Configurable, nn.Module, ABC):
    """A rule is what is learned; its parameters are φ, and it has an `UpdateRule` for every tensor.

    An `UpdateRule` moves all tensors itself; `Grouped` has one for each kind of tensor.
    """

    @property
    @abstractmethod
    def members(self) -> Sequence[UpdateRule]:
        """The rules that move tensors, in the order of their parameters in φ."""

    @abstractmethod
    def member_for(self, tensor: ParameterInfo) -> int:
        """Returns the position of the member that moves a tensor.

        Raises:
            ValueError: None does; the message names the tensor.
        """

    @abstractmethod
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws φ anew, from the generator or from torch's global stream."""

    def start_from(self, trained: Rule) -> None:
        """Takes the φ of a trained rule.

        Raises:
            ValueError: Its φ has other shapes.
        """
        shapes = [{name: value.shape for name, value in r.state_dict().items()} for r in (trained, self)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"is a rule of another shape: {trained.config()}")
        self.load_state_dict(trained.state_dict())

    def __repr__(self) -> str:
        count = sum(parameter.numel() for parameter in self.parameters())
        return f"{super().__repr__()} with {count:,} numbers in φ"

    def compacted(self) -> Rule:
        """Returns the rule with statistics that take fewer bytes, if it has a way; else itself."""
        return self


class _Checked(ABCMeta):
    """Holds every rule to the contract as soon as it has been constructed."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        rule = super().__call__(*args, **kwargs)
        check_contract(rule)
        return rule


class UpdateRule(Rule, metaclass=_Checked):
    """A learned optimizer m_φ: (x_t, s_t) to (u_t, s_{t+1}), for every coordinate alike; φ its parameters.

    What a rule reads is apart from what it carries. Its inputs x_t are gradients g_t [n], or the `features`
    [width, n] that are made of them without φ: along a rollout they are constants, which is what lets the
    meta-gradient skip the unrolled graph (see `rollout`). Its state s_t is what φ has written, and all that
    the backward through time runs through. A rule sees flat coordinates only, so that one launch serves
    every parameter of every optimizee in the batch; what is known of tensors and time, its features read.

    A subclass sets `state_shape` and implements `step`; it sets `features` if it reads any, and overrides
    `stepper` and `segment_gradient` where it has something faster. The contract is checked on two coordinates
    when a rule has been constructed:

    - `state_shape` is a tuple of whole numbers.
    - The features are [width, n], and bring statistics [rows, n] up to date in place.
    - `step` returns an update [n] and a state [*state_shape, n] in the inputs' dtype, leaves its arguments as
      they are, and draws nothing at random: along a window that keeps few states it is taken twice.
    - All are finite where gradients, states and statistics are zero.
    - The update, or the state that later updates are made of, depends on φ, and is differentiable in it.

    Raises:
        RuleError: The rule breaks the contract; the message has the sentence that it breaks.
    """

    features: Features | None = None
    """The features turn gradients into what the rule reads; with None it reads gradients as they are."""

    coordinatewise: bool = True
    """Whether an update is what `step` gives; False: `finish` follows, which sees whole tensors and θ."""

    finish_has_no_phi: bool = False
    """Whether φ acts by what `step` gives alone, so that a window's exact meta-gradient goes through `finish`
    and then back through time. θ, where `finish` reads it, is a constant there, as the gradients are."""

    finishes_shards: bool = False
    """Whether `finish` serves sharded tensors, of which it is given this process's shards;
    `rules.shards` puts them together."""

    state_shape: tuple[int, ...]
    """A state is [*state_shape, n], coordinates innermost."""

    @property
    def members(self) -> Sequence[UpdateRule]:
        """The rule itself."""
        return [self]

    def member_for(self, tensor: ParameterInfo) -> int:
        """The rule itself."""
        return 0

    def init_state(self, n: int, dtype: torch.dtype | None = None) -> Tensor:
        """Returns s_0, [*state_shape, n], on φ's device, in φ's dtype unless another is given."""
        return next(self.parameters()).new_zeros(*self.state_shape, n, dtype=dtype)

    @property
    def statistics_shape(self) -> tuple[int, ...]:
        """The features' statistics are [*statistics_shape, n]: (rows,), or (0,) without features."""
        return (0 if self.features is None else self.features.rows,)

    def init_statistics(self, n: int, dtype: torch.dtype | None = None) -> Tensor:
        """Returns the features' statistics of n coordinates before the first gradient, [rows, n], all zero.

        They are on φ's device and in φ's dtype unless another is given, but in float32 at least.
        """
        phi = next(self.parameters())
        dtype = torch.promote_types(dtype or phi.dtype, torch.float32)
        return phi.new_zeros(*self.statistics_shape, n, dtype=dtype)

    def read(self, grad: Tensor, statistics: Tensor, time: Time, layout: Layout) -> Tensor:
        """Returns x_t: g_t [n] itself, or the features [width, n], and updates the statistics in place."""
        return grad if self.features is None else self.features(grad, statistics, time, layout)

    @abstractmethod
    def step(self, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Maps (x_t, s_t) to (u_t [n], s_{t+1}), differentiably in every argument and in φ."""

    def finish(self, update: Tensor, inputs: Tensor, theta: Tensor, layout: Layout) -> Tensor:
        """Returns u_t [n] as whole tensors θ_t [n] are moved, of a rule that is not coordinatewise.

        Args:
            update: What `step` gives, [n].
            inputs: x_t, [n] or [width, n].
            theta: θ_t, [n].
            layout: The tensors that the coordinates belong to.
        """
        return update

    @property
    def has_window_gradient(self) -> bool:
        """Whether windows have an exact meta-gradient, in which gradients and θ as read are constants."""
        return self.coordinatewise or self.finish_has_no_phi

    def finish_gradient(self, d_updates: Tensor, given: Tensor, inputs: Tensor, layout: Layout) -> Tensor:
        """Returns ∂L/∂ what `step` gave, [T, n], from ∂L/∂u_t, of a rule whose `finish_has_no_phi`.

        Args:
            d_updates: ∂L/∂u_t, [T, n].
            given: What `step` gave, [T, n].
            inputs: x_t, [T, width, n].
            layout: The tensors that the coordinates belong to.
        """
        T, n = given.shape
        side_by_side = dataclasses.replace(layout, copies=T * layout.copies)
        with torch.enable_grad():
            flat = given.detach().reshape(-1).requires_grad_()
            x = inputs.movedim(0, -2).flatten(-2)
            updates = self.finish(flat, x, torch.zeros_like(flat), side_by_side)
        (d_given,) = torch.autograd.grad(updates, flat, d_updates.reshape(-1))
        return d_given.view(T, n)

    def population_step(
        self, phis: Mapping[str, Tensor], layout: Layout, statistics: Tensor, state: Tensor
    ) -> PopulationStep | None:
        """Returns steps of K optimizees, the k-th moved by the k-th φ.

        None, the default, has torch.func.vmap run the definition, which `read`, `step` and `finish` are.

        Args:
            phis: The K values of every parameter by its name, [K, *shape] each.
            layout: The tensors, of K copies.
            statistics: Theirs, [rows, K · n], which the steps bring up to date in place.
            state: Theirs, [*state_shape, K · n], which the steps bring up to date in place.
        """
        return None

    def tensor_step(self, layout: Layout, statistics: Tensor) -> TensorStep | None:
        """Returns a step that moves an optimizer's tensors where they are, in fewer passes over memory.

        None, the default, has `read`, `step` and `finish` taken, on coordinates gathered side by side. They
        stay the definition: the step must agree with them to rounding, in whatever order it adds. What it
        keeps between steps must follow from the statistics alone, bit for bit, as a resumed run has no more
        than these; and it must notice if others have written into them.

        Args:
            layout: The optimizer's tensors.
            statistics: Theirs, [rows, n], which the step brings up to date in place.
        """
        return None

    def stepper(self) -> Step:
        """Returns `step_` for many steps with one φ; what depends on φ alone is computed here, once.

        Call it under torch.no_grad, and take another one when φ has changed.
        """

        def step(theta: Tensor, inputs: Tensor, state: Tensor, new_state: Tensor) -> None:
            update, updated = self.step(inputs, state)
            theta.add_(update)
            new_state.copy_(updated)

        return step

    @torch.no_grad()
    def step_(self, theta: Tensor, inputs: Tensor, state: Tensor, new_state: Tensor) -> None:
        """Adds u_t to θ [n] and writes s_{t+1} into new_state (which may be `state`), without a graph."""
        self.stepper()(theta, inputs, state, new_state)

    def window_gradient(self, inputs: Tensor, history: Tensor, d_updates: Tensor) -> list[Tensor]:
        """Returns d/dφ of Σ_t ⟨d_updates_t, u_t⟩ along a window whose last state has no further effect."""
        return self.segment_gradient(inputs, history, d_updates)[0]

    def segment_gradient(
        self, inputs: Tensor, history: Tensor, d_updates: Tensor, d_final_state: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """Returns the derivatives of Σ_t ⟨d_updates_t, u_t⟩ + ⟨d_final_state, s_T⟩ along T steps of a window.

        Walks the states backwards and differentiates one step at a time, so that no more than one step's
        graph is ever held.

        Args:
            inputs: x_t, [T, n] or [T, width, n].
            history: s_0 … s_T, [T+1, *state_shape, n].
            d_updates: ∂L/∂u_t, [T, n].
            d_final_state: ∂L/∂s_T by what comes after these steps, [*state_shape, n]; None is zero.

        Returns:
            d/dφ, one tensor per parameter, in their order; and d/ds_0, [*state_shape, n].
        """
        totals = {parameter: torch.zeros_like(parameter) for parameter in self.parameters()}
        trained = [parameter for parameter in totals if parameter.requires_grad]
        d_state = torch.zeros_like(history[-1]) if d_final_state is None else d_final_state
        for t in reversed(range(len(inputs))):
            with torch.enable_grad():
                state = history[t].detach().requires_grad_()
                outputs = self.step(inputs[t], state)
            known = zip(outputs, (d_updates[t], d_state), strict=True)
            # What depends on neither φ nor the state, a constant state for one, has no graph.
            pairs = [(output, d_output) for output, d_output in known if output.requires_grad]
            if not pairs:
                d_state = torch.zeros_like(d_state)
                continue
            graphs, cotangents = zip(*pairs, strict=True)
            d_state, *d_phi = torch.autograd.grad(
                graphs, [state, *trained], cotangents, materialize_grads=True
            )
            for parameter, part in zip(trained, d_phi, strict=True):
                totals[parameter].add_(part)
        return list(totals.values()), d_state
