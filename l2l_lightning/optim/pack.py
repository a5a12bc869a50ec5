"""A pack holds the gradients and states of several parameters side by side, for one launch of a rule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from l2l_lightning.optim.sharding import like, local, local_gradient
from l2l_lightning.rules.base import Step, UpdateRule
from l2l_lightning.rules.layout import Layout, Time

STATE = "rule_state"
"""`optimizer.state[parameter]` has s_t, [*state_shape, *parameter.shape], under this key."""

STATISTICS = "statistics"
"""It has the statistics of the rule's features, [rows, *parameter.shape], under this key."""

CARRIED = (STATE, STATISTICS)


def carried_shapes(rule: UpdateRule) -> dict[str, tuple[int, ...]]:
    """Returns the leading shape of each entry of `optimizer.state`, which is [*shape, *parameter.shape]."""
    carried = {STATE: tuple(rule.state_shape)}
    return carried if rule.features is None else carried | {STATISTICS: rule.statistics_shape}


class Pack:
    """Holds gradients, updates and states of several parameters side by side, for one launch of a rule.

    Parameters stay where they are, and what a step needs of them is copied: re-pointing their data at one
    flat buffer would break what owns or replaces their storage (model.to, FSDP, CUDA graphs of torch.compile)
    and lose their strides (channels-last). It costs little: of the 676 bytes that a step of a two-layer LSTM
    of 20 moves for a coordinate, 640 are its state's. A rule with a `tensor_step` reads and moves tensors in
    place of that, and no copy is made.

    Coordinates are in the parameters' logical order, whatever their strides, so that a parameter's piece of
    the state is a view of its own shape, whose dimensions are sharded as the parameter's are.

    Args:
        params: The parameters, all on one device.
        layout: What is known of them, in the same order.
        carried: The state [*state_shape, n] and, of a rule that reads features, their statistics [rows, n].
        dtype: Of the arithmetic.
        rule: The rule that moves them.
    """

    def __init__(
        self,
        params: list[Tensor],
        layout: Layout,
        carried: dict[str, Tensor],
        dtype: torch.dtype,
        rule: UpdateRule,
    ) -> None:
        self.params = params
        self.layout = layout
        self.carried = carried
        self.time = carried[STATE].new_empty((), dtype=dtype)
        shapes = [local(parameter).shape for parameter in params]
        sizes = [shape.numel() for shape in shapes]
        self.tensor_step = None
        if rule.features is not None:
            self.tensor_step = rule.tensor_step(layout, carried[STATISTICS])
        if self.tensor_step is None:
            self.grad = carried[STATE].new_empty(carried[STATE].shape[-1], dtype=dtype)
            self.update = torch.empty_like(self.grad)
            self.grads, self.updates = (
                [part.view(s) for part, s in zip(torch.split(whole, sizes), shapes, strict=True)]
                for whole in (self.grad, self.update)
            )
        self.pieces = {key: list(torch.split(whole, sizes, -1)) for key, whole in carried.items()}
        self.entries: list[dict[str, Tensor]] = []

    def share(self, state: dict[Tensor, Any]) -> None:
        """Copies the states that exist, and makes every parameter's entries views of its pieces."""
        for index, parameter in enumerate(self.params):
            entry = {}
            for key, pieces in self.pieces.items():
                piece = pieces[index].view(*pieces[index].shape[:-1], *local(parameter).shape)
                if key in state[parameter]:
                    piece.copy_(local(state[parameter][key]))
                entry[key] = state[parameter][key] = like(parameter, piece)
            self.entries.append(entry)

    def holds(self, params: list[Tensor], state: dict[Tensor, Any]) -> bool:
        """Returns whether the pack holds just these parameters and their entries of `optimizer.state`."""
        return len(params) == len(self.params) and all(
            ours is theirs and all(state.get(ours, {}).get(key) is piece for key, piece in entry.items())
            for ours, theirs, entry in zip(self.params, params, self.entries, strict=True)
        )

    def step(self, rule: UpdateRule, step: Step, group: dict[str, Any]) -> None:
        """Updates every parameter of the pack that has a gradient."""
        present = [i for i, parameter in enumerate(self.params) if parameter.grad is not None]
        if not present:
            return
        if self.tensor_step is not None:
            params = [self.params[i] for i in present]
            thetas = [local(parameter) for parameter in params]
            grads = [local_gradient(parameter) for parameter in params]
            options = float(group["lr"]), float(group["weight_decay"]), group["maximize"]
            self.tensor_step(present, thetas, grads, group["step"], group["total_steps"], *options)
        elif len(present) == len(self.params):
            self._step_all(rule, step, group)
        else:
            pieces = {key: [whole[i] for i in present] for key, whole in self.pieces.items()}
            gathered = {key: torch.cat(some, -1) for key, some in pieces.items()}
            params = [self.params[i] for i in present]
            part = Pack(params, self.layout.select(present), gathered, self.grad.dtype, rule)
            part._step_all(rule, step, group)
            for key, some in pieces.items():
                torch._foreach_copy_(some, part.pieces[key])

    def _step_all(self, rule: UpdateRule, step: Step, group: dict[str, Any]) -> None:
        lr, weight_decay = float(group["lr"]), float(group["weight_decay"])
        thetas = [local(parameter) for parameter in self.params]
        torch._foreach_copy_(self.grads, [local_gradient(parameter) for parameter in self.params])
        if group["maximize"]:
            self.grad.neg_()
        self.update.zero_()
        state = self.carried[STATE]
        inputs = self.grad
        if rule.features is not None:
            time = Time(self.time.fill_(group["step"]), group["total_steps"])
            inputs = rule.features(self.grad, self.carried[STATISTICS], time, self.layout)
        step(self.update, inputs, state, state)
        if not rule.coordinatewise:
            theta = torch.cat([here.reshape(-1) for here in thetas]).to(self.update.dtype)
            self.update.copy_(rule.finish(self.update, inputs, theta, self.layout))
        if weight_decay:  # into the update, so that θ is rounded once
            torch._foreach_add_(self.updates, thetas, alpha=-weight_decay)
        torch._foreach_add_(thetas, self.updates, alpha=lr)
