"""A trained rule as a drop-in `torch.optim.Optimizer`."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import Optimizer, ParamsT

from l2l_lightning.pretrained import load
from l2l_lightning.rules.base import Step, UpdateRule

STATE = "rule_state"
"""An entry of a parameter's `optimizer.state`: s_t, [*state_shape, *parameter.shape]."""

STATISTICS = "statistics"
"""The other, of a rule that reads features: their statistics, [rows, *parameter.shape]."""

CARRIED = (STATE, STATISTICS)

STATE_DTYPES = (None, torch.float32, torch.bfloat16)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Of parameters and gradients."""

logger = logging.getLogger(__name__)


class LearnedOptimizer(Optimizer):
    r"""A trained rule m_φ as an optimizer of PyTorch, for any training loop or `configure_optimizers`.

    For every coordinate of every parameter, with g_t its gradient (−g_t if `maximize`):

        (u_t, s_{t+1}) = m_φ(g_t, s_t)          θ_{t+1} = (1 − lr · weight_decay) θ_t + lr · u_t

    All parameters of a group that are on one device take one launch. Arithmetic is in φ's dtype (float32);
    a bfloat16 or float16 parameter is rounded once an update, and no float32 copy of it is kept: what an
    update changes by less than half of a parameter's last digit is lost.

    `state[parameter]` has one entry, "rule_state", [*state_shape, *parameter.shape], from the parameter's
    first gradient on. A parameter whose gradient is None keeps its value and its state. Where some of a
    group's gradients are None, the others' states are gathered and put back, which takes two copies of them
    more.

    A gradient of zero is a gradient, and no rule of the package stands still at it: `padding_idx` rows,
    embedding rows outside a minibatch and dead units move without bound, with lstm-mnist from 0 to −4.01 in
    1,000 steps. `l2l_lightning.pretrained.card(name)["known_failures"]` has every rule's number.

    A rule is coordinatewise, so a sharded parameter (FSDP2, tensor parallelism: a DTensor) is updated shard
    by shard, without communication, and its state is a DTensor that `torch.distributed.checkpoint` reshards.

    Args:
        params: Parameters, named parameters, or groups of them as for any optimizer. A group may have a
            `rule`, `lr`, `weight_decay` and `maximize` of its own.
        rule: Name of a rule that comes with the package, path of a .safetensors file, or a rule, of which
            a copy is kept: what happens to the rule afterwards changes nothing here.
        lr: Multiplies the update; 1 is what the rule was trained with. Schedulers work on it. A tensor on a
            GPU makes every step wait for it.
        weight_decay: AdamW's: decoupled from the gradient, multiplied by lr.
        maximize: Ascend instead of descending.
        state_dtype: Dtype of the state, torch.float32 or torch.bfloat16 (half the memory); None is the
            dtype of the arithmetic. See `state_bytes`.

    Raises:
        ValueError: lr or weight_decay is negative or not finite, state_dtype is another, or a parameter is
            not a dense tensor of real floating-point numbers (DTYPES).
        WeightsError: There is no such rule, or its file is broken.
        TypeError: rule, lr, weight_decay or maximize is something else, or a parameter is no tensor.

    `step` and `load_state_dict` check everything that they can know first: when they raise, nothing has been
    updated. What is left is a failure in the middle of a launch, such as a device that is lost.

    Source: Andrychowicz et al. 2016.

    Example:
        >>> model = torch.nn.Linear(784, 10)
        >>> optimizer = LearnedOptimizer(model.parameters(), rule="lstm-mnist")
        >>> model(torch.randn(8, 784)).square().mean().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: ParamsT,
        rule: str | Path | UpdateRule,
        lr: float | Tensor = 1.0,
        weight_decay: float = 0.0,
        maximize: bool = False,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        if state_dtype not in STATE_DTYPES:
            raise ValueError(f"state_dtype must be one of {STATE_DTYPES}, got {state_dtype}")
        self.state_dtype = state_dtype
        self._rules: dict[str, UpdateRule] = {}  # by the hash of φ
        self._rules_on: dict[tuple[str, torch.device], tuple[UpdateRule, Step]] = {}
        self._packs: dict[int, dict[torch.device, _Pack]] = {}  # by the group's index
        defaults = {
            "rule": self._add_rule(rule),
            "lr": lr,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, which may have a `rule`, `lr`, `weight_decay` and `maximize` of its own.

        Raises:
            As the constructor.
        """
        if isinstance(param_group, dict):
            param_group = dict(param_group)
            if "rule" in param_group:
                param_group["rule"] = self._add_rule(param_group["rule"])
            _check_options(self.defaults | param_group)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for index, parameter in enumerate(group["params"]):
                _check_dense(_name(group, index), parameter)
        except ValueError:
            self.param_groups.pop()
            raise

    @property
    def state_bytes(self) -> int:
        """Bytes that the state takes on this process once every parameter that requires a gradient has one.

        The state has Π state_shape numbers for a coordinate: 80 for an LSTM of two layers of 20, that is 320
        bytes in float32 and 160 in bfloat16, where Adam's takes 8. Nothing is allocated to find out.
        """
        return sum(self._bytes_by_device().values())

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @_disable_dynamo  # of a compiled training step this part, a launch and a few copies, runs as it is
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Updates every parameter that has a gradient; returns the closure's loss if there is one.

        Nothing has been updated when it raises one of these.

        Raises:
            RuntimeError: A gradient is sparse, or does not fit its parameter; or a parameter, or its state,
                is not what it was when the optimizer was given it.
            MemoryError: The states are larger than their device's memory.
            ValueError: A group's options were set to something that the constructor would refuse, or its rule
                was overwritten: a group with another rule is a new group.
            TypeError: As for ValueError.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check()
        creates_states_only = not self.state and self._is_at_rest()
        # Everything that can fail is done before the first parameter changes.
        launches = [
            (group, pack, *self._on(group, device))
            for index, group in enumerate(self.param_groups)
            for device, pack in self._pack(index, self._members(group, with_gradients=True)).items()
        ]
        if not creates_states_only:
            for group, pack, rule, step in launches:
                pack.step(rule, step, group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken: groups' options and every parameter's state, as they were.

        Parameters match by their order, as for any optimizer; if both optimizers have named parameters, names
        that both know must be at the same places. States go to the parameters' devices.

        Raises:
            ValueError: Another rule, another number of groups or parameters, a state of another shape, dtype
                or sharding or with a number that is not finite, options that the constructor would refuse,
                names in another order, or the state of another kind of optimizer. Nothing has changed then.
            TypeError: An option is of another kind.
        """
        # Called last, so that it sees what the user's own hooks made of the state dict.
        handle = self.register_load_state_dict_pre_hook(_wrap)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        for index, group in enumerate(self.param_groups):
            # Copied at once: until then, states may be those of the optimizer that they were taken from.
            self._pack(index, self._members(group, with_gradients=False))

    def __getstate__(self) -> dict[str, Any]:
        # A piece of a pack would bring the whole pack's storage along, each of them anew.
        state = {
            parameter: {key: value.clone() if key in CARRIED else value for key, value in entries.items()}
            for parameter, entries in self.state.items()
        }
        content: dict[str, Any] = super().__getstate__()
        content["state"] = type(self.state)(dict, state)
        return content | {"state_dtype": self.state_dtype, "_rules": self._rules}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for parameter, entries in state["state"].items():
            for key in CARRIED:
                if isinstance(parameter, Tensor) and isinstance(entries.get(key), _Uncast):
                    entries[key] = entries[key].tensor.to(parameter.device)
        super().__setstate__(state)
        self._rules_on, self._packs = {}, {}

    def _add_rule(self, rule: str | Path | UpdateRule) -> str:
        """Keeps a copy of a rule; returns what a group and a state dict call it: name@hash of φ."""
        if isinstance(rule, str) and _hash(rule) in self._rules:
            return rule
        if isinstance(rule, UpdateRule):
            name = type(rule).__name__
        elif isinstance(rule, str | Path):
            name, rule = Path(rule).stem, load(rule)
        else:
            raise TypeError(f"rule must be a name, a path or an UpdateRule, got {type(rule).__name__}")
        digest = _digest(rule)
        self._rules[digest] = copy.deepcopy(rule).requires_grad_(False)
        return f"{name}@{digest}"

    def _rule(self, group: dict[str, Any]) -> UpdateRule:
        try:
            return self._rules[_hash(group["rule"])]
        except KeyError:
            raise ValueError(
                f"a group's rule was set to {group['rule']!r}: a group keeps the rule that it was added "
                "with; use add_param_group or a new LearnedOptimizer"
            ) from None

    def _on(self, group: dict[str, Any], device: torch.device) -> tuple[UpdateRule, Step]:
        """A group's rule on a device, and what runs it there: φ is packed once."""
        key = (_hash(group["rule"]), device)
        if key not in self._rules_on:
            rule = copy.deepcopy(self._rule(group)).to(device)
            self._rules_on[key] = (rule, rule.stepper())
        return self._rules_on[key]

    def _check(self) -> None:
        """Raises for all that would fail after a first parameter had been written."""
        for group in self.param_groups:
            _check_options(group)
            shapes = _carried_shapes(self._rule(group))
            for index, parameter in enumerate(group["params"]):
                if parameter.grad is None:
                    continue
                if problem := _problem(parameter, self.state.get(parameter, {}), shapes):
                    raise RuntimeError(f"{_name(group, index)} {problem}")

    def _is_at_rest(self) -> bool:
        """Whether every rate and every gradient is 0.

        In a first step that is how torch.distributed.checkpoint has an optimizer create its state, to save it
        or to load over it. A rule's state would move on even so, and the run would not be as if unsaved.
        """
        return all(
            float(group["lr"]) == 0
            and not any(_local(p.grad).any() for p in group["params"] if p.grad is not None)
            for group in self.param_groups
        )

    def _members(self, group: dict[str, Any], with_gradients: bool) -> list[Tensor]:
        """The parameters of a group that have a state, or are about to get one as they have a gradient."""
        return [
            parameter
            for parameter in _unique(group["params"])
            if STATE in self.state.get(parameter, ()) or (with_gradients and parameter.grad is not None)
        ]

    def _pack(self, index: int, members: list[Tensor]) -> dict[torch.device, _Pack]:
        """The members of a group on each of their devices, side by side with their states.

        `self.state` is what counts. A pack whose members or whose members' states are not the ones in it
        (a first gradient, a loaded state dict, a parameter that moved) is replaced: its states are copied,
        and s_0 for who has none.
        """
        by_device: dict[torch.device, list[Tensor]] = {}
        for parameter in members:
            by_device.setdefault(parameter.device, []).append(parameter)
        known = self._packs.get(index, {})
        self._packs[index] = packs = {}
        for device, params in by_device.items():
            pack = known.get(device)
            if pack is None or not pack.holds(params, self.state):
                pack = self._new_pack(self.param_groups[index], device, params)
            packs[device] = pack
        return packs

    def _new_pack(self, group: dict[str, Any], device: torch.device, params: list[Tensor]) -> _Pack:
        n = sum(_local(parameter).numel() for parameter in params)
        mebibytes = sum(self._bytes(group, parameter) for parameter in params) / 2**20
        needed = self._bytes_by_device()[device] / 2**20  # of all groups
        what = f"the state of LearnedOptimizer's parameters on {device} takes {needed:.1f} MiB"
        advice = "state_dtype=torch.bfloat16 halves it, as does giving it half of the parameters"
        total = _total_memory(device)
        if total is not None and needed > total / 2**20:
            raise MemoryError(f"{what}, and there are {total / 2**20:.1f} MiB: {advice}")
        logger.info("the rule's state of %d coordinates takes %.1f MiB on %s", n, mebibytes, device)
        rule, _ = self._on(group, device)
        dtype = self._arithmetic_dtype(group)
        try:
            carried = {STATE: rule.init_state(n, self.state_dtype or dtype)}
            if rule.features is not None:  # which are never rounded with the state
                carried[STATISTICS] = rule.init_statistics(n, dtype)
            pack = _Pack(params, carried, dtype)
        except torch.OutOfMemoryError as error:
            error.add_note(f"{what}: {advice}")
            raise
        pack.share(self.state)
        return pack

    def _arithmetic_dtype(self, group: dict[str, Any]) -> torch.dtype:
        """φ's dtype; float32 if that is smaller."""
        return torch.promote_types(next(self._rule(group).parameters()).dtype, torch.float32)

    def _bytes_by_device(self) -> dict[torch.device, int]:
        """What the states of all groups take on each device: of parameters that have one or will get one."""
        result: dict[torch.device, int] = {}
        for group in self.param_groups:
            for parameter in _unique(group["params"]):
                if (
                    parameter.requires_grad
                    or parameter.grad is not None
                    or STATE in self.state.get(parameter, ())
                ):
                    previous = result.get(parameter.device, 0)
                    result[parameter.device] = previous + self._bytes(group, parameter)
        return result

    def _bytes(self, group: dict[str, Any], parameter: Tensor) -> int:
        """What the state of one parameter takes on this process."""
        bytes_ = sum(
            torch.Size(shape).numel() * self._dtype_of(key, group).itemsize
            for key, shape in _carried_shapes(self._rule(group)).items()
        )
        return int(bytes_ * _local(parameter).numel())

    def _dtype_of(self, key: str, group: dict[str, Any]) -> torch.dtype:
        """What a group's states, or statistics, are stored in."""
        dtype = self._arithmetic_dtype(group)
        return (self.state_dtype or dtype) if key == STATE else dtype


class _Pack:
    """Parameters side by side with their gradients, updates and states: what one launch works on.

    Parameters stay where they are, and what a step needs of them is copied: re-pointing their data at one
    flat buffer would break what owns or replaces their storage (model.to, FSDP, CUDA graphs of torch.compile)
    and lose their strides (channels-last). It costs little: of the 676 bytes that a step of a two-layer LSTM
    of 20 moves for a coordinate, 640 are its state's.

    Coordinates are in the parameters' logical order, whatever their strides, so that a parameter's piece of
    the state is a view of its own shape, whose dimensions are sharded as the parameter's are.
    """

    def __init__(self, params: list[Tensor], carried: dict[str, Tensor], dtype: torch.dtype) -> None:
        self.params = params
        self.carried = carried  # the state [*state_shape, n], and the features' statistics [rows, n] if any
        self.grad = carried[STATE].new_empty(carried[STATE].shape[-1], dtype=dtype)
        self.update = torch.empty_like(self.grad)
        shapes = [_local(parameter).shape for parameter in params]
        sizes = [shape.numel() for shape in shapes]
        self.grads = [part.view(s) for part, s in zip(torch.split(self.grad, sizes), shapes, strict=True)]
        self.updates = [part.view(s) for part, s in zip(torch.split(self.update, sizes), shapes, strict=True)]
        self.pieces = {key: list(torch.split(whole, sizes, -1)) for key, whole in carried.items()}
        self.entries: list[dict[str, Tensor]] = []

    def share(self, state: dict[Tensor, Any]) -> None:
        """Takes the states that there are, and shows every parameter's piece in its entry from now on."""
        for index, parameter in enumerate(self.params):
            entry = {}
            for key, pieces in self.pieces.items():
                piece = pieces[index].view(*pieces[index].shape[:-1], *_local(parameter).shape)
                if key in state[parameter]:
                    piece.copy_(_local(state[parameter][key]))
                entry[key] = state[parameter][key] = _like(parameter, piece)
            self.entries.append(entry)

    def holds(self, params: list[Tensor], state: dict[Tensor, Any]) -> bool:
        """Whether these parameters and their entries of `optimizer.state` are the ones in here."""
        return len(params) == len(self.params) and all(
            ours is theirs and all(state.get(ours, {}).get(key) is piece for key, piece in entry.items())
            for ours, theirs, entry in zip(self.params, params, self.entries, strict=True)
        )

    def step(self, rule: UpdateRule, step: Step, group: dict[str, Any]) -> None:
        """One update of every parameter that has a gradient."""
        present = [i for i, parameter in enumerate(self.params) if parameter.grad is not None]
        if len(present) == len(self.params):
            self._step_all(rule, step, group)
        elif present:
            pieces = {key: [whole[i] for i in present] for key, whole in self.pieces.items()}
            gathered = {key: torch.cat(some, -1) for key, some in pieces.items()}
            part = _Pack([self.params[i] for i in present], gathered, self.grad.dtype)
            part._step_all(rule, step, group)
            for key, some in pieces.items():
                torch._foreach_copy_(some, part.pieces[key])

    def _step_all(self, rule: UpdateRule, step: Step, group: dict[str, Any]) -> None:
        lr, weight_decay = float(group["lr"]), float(group["weight_decay"])
        thetas = [_local(parameter) for parameter in self.params]
        torch._foreach_copy_(self.grads, [_gradient(parameter) for parameter in self.params])
        if group["maximize"]:
            self.grad.neg_()
        self.update.zero_()
        state = self.carried[STATE]
        inputs = self.grad if rule.features is None else rule.features(self.grad, self.carried[STATISTICS])
        step(self.update, inputs, state, state)
        if weight_decay:  # into the update, so that θ is rounded once
            torch._foreach_add_(self.updates, thetas, alpha=-weight_decay)
        torch._foreach_add_(thetas, self.updates, alpha=lr)


def _check_options(group: dict[str, Any]) -> None:
    """Refuses rates that are no finite numbers from 0 on, and a `maximize` that is not true or false."""
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


def _check_dense(name: str, tensor: Tensor) -> None:
    if tensor.is_complex():
        raise ValueError(f"{name} is complex: a rule reads real gradients; optimise torch.view_as_real of it")
    if tensor.dtype not in DTYPES:
        known = ", ".join(str(dtype) for dtype in DTYPES)
        raise ValueError(f"{name} is {tensor.dtype}: LearnedOptimizer updates {known}")
    if tensor.layout != torch.strided:
        raise ValueError(f"{name} is sparse ({tensor.layout}): LearnedOptimizer updates dense parameters")


def _carried_shapes(rule: UpdateRule) -> dict[str, tuple[int, ...]]:
    """What a parameter of a rule has in `optimizer.state`, each [*shape, *parameter's shape]."""
    carried = {STATE: tuple(rule.state_shape)}
    return carried if rule.features is None else carried | {STATISTICS: rule.statistics_shape}


def _problem(parameter: Tensor, entries: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Why a parameter with a gradient cannot be updated, to follow its name."""
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
    local = _local(parameter)
    if any(size > 1 and stride == 0 for size, stride in zip(local.shape, local.stride(), strict=True)):
        return "is expanded: several of its coordinates are one number, which has no single update"
    if local.is_inference() and not torch.is_inference_mode_enabled():
        return "was made under torch.inference_mode and cannot be updated outside it: clone it"
    for key, shape in shapes.items():
        if key in entries and tuple(entries[key].shape) != (*shape, *parameter.shape):
            return (
                f"has shape {list(parameter.shape)}, and its state {list(entries[key].shape)}, where "
                f"{[*shape, *parameter.shape]} would fit: another tensor is another parameter, for "
                "add_param_group"
            )
    return None


class _Uncast:
    """A state on its way through Optimizer.load_state_dict, which would cast a tensor to θ's dtype."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _wrap(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A hook before load_state_dict: the same state dict, checked, its states kept from being cast."""
    assert isinstance(optimizer, LearnedOptimizer)
    groups, saved_groups = optimizer.param_groups, state_dict["param_groups"]
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in saved_groups]:
        return state_dict  # Optimizer.load_state_dict says which of them differs
    _check_names(groups, saved_groups)
    states = dict(state_dict["state"])
    for group, saved in zip(groups, saved_groups, strict=True):
        if "rule" not in saved:
            raise ValueError("the state dict is not a LearnedOptimizer's: its groups have no rule")
        if missing := {"lr", "weight_decay", "maximize"} - saved.keys():
            raise ValueError(f"a group of the state dict lacks {', '.join(sorted(missing))}")
        _check_options(saved)
        if _hash(saved["rule"]) != _hash(group["rule"]):
            raise ValueError(
                f"the state dict is of rule {saved['rule']}, the optimizer's is {group['rule']}: "
                "construct it with the rule that it was saved with"
            )
        shapes = _carried_shapes(optimizer._rule(group))
        places = dict(zip(saved["params"], enumerate(group["params"]), strict=True))
        for key, (index, parameter) in places.items():
            if key in states:
                for what, shape in shapes.items():
                    dtype = optimizer._dtype_of(what, group)
                    _check_state(_name(group, index), parameter, states[key], what, shape, dtype)
                states[key] = states[key] | {what: _Uncast(states[key][what]) for what in shapes}
    return {**state_dict, "state": states}


def _check_names(groups: list[dict[str, Any]], saved_groups: list[dict[str, Any]]) -> None:
    """A name that both sides know must be at one place: equal shapes would not show that two were swapped."""

    def places(groups: list[dict[str, Any]]) -> dict[str, tuple[int, int]]:
        # A compiled model's parameters have one more level of names.
        return {
            name.replace("_orig_mod.", ""): (index, position)
            for index, group in enumerate(groups)
            for position, name in enumerate(group.get("param_names", ()))
        }

    ours, theirs = places(groups), places(saved_groups)
    for name, place in ours.items():
        if theirs.get(name, place) != place:
            raise ValueError(
                f"the state dict has its parameters in another order: {name!r} is number {theirs[name][1]} "
                f"of its group {theirs[name][0]}, and number {place[1]} of group {place[0]} here"
            )


def _check_state(
    name: str,
    parameter: Tensor,
    entries: dict[str, Any],
    what: str,
    leading: Sequence[int],
    dtype: torch.dtype,
) -> None:
    """A saved state, or what else `what` names of it, must fit its parameter.

    Raises:
        ValueError: It has another shape, dtype or sharding, there is none, or a number in it is not finite.
    """
    state = entries.get(what)
    if not isinstance(state, Tensor):
        raise ValueError(
            f"{name}: the state dict has {sorted(entries)} for it, not {what!r} of a LearnedOptimizer"
        )
    expected = (*leading, *parameter.shape)
    if tuple(state.shape) != expected:
        raise ValueError(
            f"{name} has shape {list(parameter.shape)}, and a state of {list(expected)}; the state dict's is "
            f"{list(state.shape)}: its parameters have other shapes or another order"
        )
    if state.dtype != dtype:
        raise ValueError(
            f"{name}: the state dict's states are {state.dtype}, the optimizer's are {dtype}: construct it "
            f"with state_dtype={state.dtype}"
        )
    if _local(state).shape[len(leading) :] != _local(parameter).shape:
        raise ValueError(
            f"{name}: the state dict's state is sharded in another way than the parameter: load it with "
            "torch.distributed.checkpoint, which reshards"
        )
    local = _local(state)
    if local.numel() and not torch.stack(torch.aminmax(local)).isfinite().all():
        raise ValueError(f"{name}: the state dict's state has a number that is not finite")


def _like(parameter: Any, state: Tensor) -> Tensor:
    """A parameter's local state [*state_shape, *local shape]; of a DTensor a DTensor, sharded alike."""
    if not hasattr(parameter, "device_mesh"):
        return state
    from torch.distributed.tensor import DTensor, Placement, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    leading = state.ndim - parameter.ndim

    def shifted(placement: Placement) -> Placement:
        if isinstance(placement, _StridedShard):
            return _StridedShard(placement.dim + leading, split_factor=placement.split_factor)
        if isinstance(placement, Shard):
            return Shard(placement.dim + leading)
        return placement

    shape = torch.Size([*state.shape[:leading], *parameter.shape])
    stride = torch.empty(shape, device="meta").stride()
    placements = [shifted(placement) for placement in parameter.placements]
    # A DTensor takes over its local tensor's storage offset and can then not be copied (copy.deepcopy).
    local = state.new_empty(state.shape)
    sharded = DTensor.from_local(
        local, parameter.device_mesh, placements, run_check=False, shape=shape, stride=stride
    )
    sharded._local_tensor = state
    return sharded


def _gradient(parameter: Any) -> Tensor:
    """What this process holds of a parameter's gradient, sharded as the parameter is."""
    gradient = parameter.grad
    if hasattr(parameter, "placements") and gradient.placements != parameter.placements:
        gradient = gradient.redistribute(parameter.device_mesh, parameter.placements)
    return _local(gradient)


def _local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: all of it, or a DTensor's shard.

    By the method's name, as importing the class takes long, and not every PyTorch has it.
    """
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _unique(params: list[Tensor]) -> list[Tensor]:
    """The parameters in their order, one that was given twice once."""
    return list(dict.fromkeys(params))


def _name(group: dict[str, Any], index: int) -> str:
    """What messages call a group's parameter."""
    return repr(group["param_names"][index]) if "param_names" in group else f"parameter {index} of its group"


def _hash(rule: str) -> str:
    """φ's hash, from name@hash: one rule may have two names."""
    return rule.rpartition("@")[2]


def _digest(rule: UpdateRule) -> str:
    """A hash of all that a rule computes with: its class, constructor's arguments and φ."""
    config = {key: value for key, value in rule.config().items() if key != "backend"}
    digest = hashlib.sha256(json.dumps([type(rule).__name__, config], sort_keys=True).encode())
    for key, value in rule.state_dict().items():
        digest.update(f"{key} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _total_memory(device: torch.device) -> int | None:
    """The device's memory in bytes, if there is a way to know."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type == "cpu" and {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= os.sysconf_names.keys():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None
