"""A trained rule as a drop-in `torch.optim.Optimizer`."""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import Optimizer, ParamsT

from l2l_lightning.optim.checks import (
    check_dense,
    check_no_others,
    check_options,
    habit_of,
    name_of,
    problem_of,
)
from l2l_lightning.optim.default_rule import default_rule
from l2l_lightning.optim.pack import CARRIED, STATE, STATISTICS, Pack, carried_shapes
from l2l_lightning.optim.sharding import cuts, is_zero, local, sum_over_shards
from l2l_lightning.optim.state_dict import Uncast, checked, digest_of, rule_hash
from l2l_lightning.pretrained import load
from l2l_lightning.rules.base import Rule, Step, UpdateRule
from l2l_lightning.rules.contract import read_zero
from l2l_lightning.rules.corrected import Corrected
from l2l_lightning.rules.layout import Layout, ParameterInfo
from l2l_lightning.rules.zero_shot import ZeroShot

STATE_DTYPES = (None, torch.float32, torch.bfloat16)

logger = logging.getLogger(__name__)

_Place = tuple[torch.device, int]
"""A pack is found by its device and by the member of its group's rule that moves it."""


class LearnedOptimizer(Optimizer):
    r"""A trained rule m_φ as an optimizer of PyTorch, for any training loop or `configure_optimizers`.

    For every coordinate of every parameter, with g_t its gradient (−g_t if `maximize`):

        (u_t, s_{t+1}) = m_φ(g_t, s_t)          θ_{t+1} = (1 − lr · weight_decay) θ_t + lr · u_t

    All parameters of a group that are on one device take one launch. Arithmetic is in φ's dtype (float32);
    a bfloat16 or float16 parameter is rounded once an update, and no float32 copy of it is kept: what an
    update changes by less than half of a parameter's last digit is lost.

    Without a rule it is `ZeroShot`, which has step sizes, a warm-up and a decay of its own: say `total_steps`
    and leave lr at 1. A scheduler on top multiplies what the rule does. A warning tells what looks like a
    mistake: lr = 1e-3 or weight_decay = 0.01 out of habit, a step beyond total_steps, after which the rule
    moves nothing, or a state dict of a run of another length.

    `state[parameter]` has the entry "rule_state", [*state_shape, *parameter.shape], from the parameter's
    first gradient on, and "statistics", [rows, *parameter.shape], if the rule reads features. A parameter
    whose gradient is None keeps its value and its state. Where some of a group's gradients are None, the
    others' states are gathered and put back, which takes two copies of them more.

    A gradient of zero is a gradient, and the package's LSTMs do not stand still at it: `padding_idx` rows,
    embedding rows outside a minibatch and dead units move without bound, with lstm-mnist from 0 to −4.01 in
    1,000 steps. `l2l_lightning.pretrained.card(name)["known_failures"]` has every rule's number. `ZeroShot`
    leaves in place what never had another gradient.

    A sharded parameter (FSDP2, tensor parallelism: a DTensor) is updated shard by shard, without
    communication where its rule is coordinatewise, and its state is a DTensor that
    `torch.distributed.checkpoint` reshards. `ZeroShot` sums over whole tensors and gathers whole matrices, so
    that every process of the mesh must take every step.

    Args:
        params: Parameters, named parameters, or groups of them as for any optimizer. A group may have a
            `rule`, `lr`, `weight_decay` and `maximize` of its own.
        rule: Name of a rule that comes with the package, path of a .safetensors file, or a rule, of which
            a copy is kept: what happens to the rule afterwards changes nothing here. A `Grouped` has a rule
            for each kind of parameter; to choose by name it needs named parameters. None is "zero-shot" for
            a group that knows total_steps, and "zero-shot-free" for one that does not.
        lr: Multiplies the update; 1 is what the rule was trained with. Schedulers work on it. A tensor on a
            GPU makes every step wait for it.
        weight_decay: AdamW's: decoupled from the gradient, multiplied by lr.
        maximize: Ascend instead of descending.
        state_dtype: Dtype of the state, torch.float32 or torch.bfloat16 (half the memory); None is the
            dtype of the arithmetic. Of "zero-shot" bfloat16 rounds the two means of gradients, and 8 bytes
            are left of 12. See `state_bytes`.
        total_steps: T, how many steps there will be, for a rule whose features read it; None if nobody knows.
            Steps are the optimizer's: where gradients are accumulated over k minibatches, a k-th of those; in
            `configure_optimizers`, `self.trainer.estimated_stepping_batches`. Too many, and a run ends before
            its small steps come. A group counts its steps in `group["step"]`.

    Raises:
        ValueError: lr or weight_decay is negative or not finite, state_dtype is another, total_steps < 1 or
            missing where the rule needs it, a `Grouped` has no rule for a parameter, or a parameter is not a
            dense tensor of real floating-point numbers (float16, bfloat16, float32 or float64).
        WeightsError: There is no such rule, or its file is broken.
        TypeError: An option is of another kind, or a parameter is no tensor.

    `step` and `load_state_dict` check everything that they can know first: when they raise, nothing has been
    updated. What is left is a failure in the middle of a launch, such as a device that is lost.

    Source: Andrychowicz et al. 2016.

    Example:
        >>> model = torch.nn.Linear(784, 10)
        >>> optimizer = LearnedOptimizer(model.parameters(), total_steps=1000)  # or rule="lstm-mnist"
        >>> model(torch.randn(8, 784)).square().mean().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: ParamsT,
        rule: str | Path | Rule | None = None,
        lr: float | Tensor = 1.0,
        weight_decay: float = 0.0,
        maximize: bool = False,
        state_dtype: torch.dtype | None = None,
        total_steps: int | None = None,
    ) -> None:
        if state_dtype not in STATE_DTYPES:
            raise ValueError(f"state_dtype must be one of {STATE_DTYPES}, got {state_dtype}")
        self.state_dtype = state_dtype
        self._rules: dict[str, Rule] = {}  # by the hash of φ
        self._rules_on: dict[tuple[str, torch.device], list[tuple[UpdateRule, Step]]] = {}
        self._packs: dict[int, dict[_Place, Pack]] = {}  # by the group's index
        self._chosen: dict[Tensor, int] = {}  # the member of its rule that moves a parameter
        self._tried: set[tuple[str, int | None]] = set()  # rules that read their features with such a T
        self._told: set[str] = set()  # what was warned of
        defaults = {
            "rule": None if rule is None else self._add_rule(rule),
            "lr": lr,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "total_steps": total_steps,
            "step": 0,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, which may have a `rule`, `lr`, `weight_decay`, `maximize`, `total_steps` of its own.

        It goes on at the step that other groups of the same total_steps have come to, and so at their place
        in the schedule; with another total_steps it begins its own. `ZeroShot` corrects moments by that step,
        as for a parameter that is unfrozen, so that a newcomer's first update is about ten times the others'
        (of noisy gradients), and those after it are about theirs.

        Raises:
            As the constructor.
        """
        if isinstance(param_group, dict):
            param_group = dict(param_group)
            options = self.defaults | param_group
            check_no_others(param_group)
            check_options(options)
            param_group["rule"] = self._add_rule(options["rule"], options["total_steps"])
            together = [g["step"] for g in self.param_groups if g["total_steps"] == options["total_steps"]]
            param_group.setdefault("step", max(together, default=0))
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for index, parameter in enumerate(group["params"]):
                check_dense(name_of(group, index), parameter)
                rule = self.rule_for(group, parameter)
                if not (rule.coordinatewise or rule.finishes_shards) and cuts(parameter) != ():
                    raise ValueError(
                        f"{name_of(group, index)} is sharded, and {type(rule).__name__} moves whole tensors: "
                        "its finish must serve shards, and say so (finishes_shards)"
                    )
                if rule.finishes_shards and cuts(parameter) is None:
                    raise ValueError(
                        f"{name_of(group, index)} is sharded as {parameter.placements}, which "
                        f"{type(rule).__name__} cannot put together: use Shard and Replicate"
                    )
            self._check_reading(group)
        except Exception:  # the user's own code may tell groups and read features
            self.param_groups.pop()
            for parameter in group["params"]:
                self._chosen.pop(parameter, None)
            raise
        if self._has_a_rate(group) and (habit := habit_of(group)):
            self._tell(habit.partition("=")[0], habit, UserWarning)

    def __repr__(self) -> str:
        tensors = [parameter for group in self.param_groups for parameter in group["params"]]
        lines = [
            f"LearnedOptimizer of {sum(map(Tensor.numel, tensors)):,} coordinates in {len(tensors)} tensors"
        ]
        for index, group in enumerate(self.param_groups):
            total = group["total_steps"]
            parts = [f"rule {group['rule'].partition('@')[0]}", f"step {group['step']}"]
            parts[1] += "" if total is None else f" of {total}"
            # What is not said is as it is by default.
            usual = {"lr": 1.0, "weight_decay": 0.0, "maximize": False}
            parts += [f"{name} {group[name]}" for name, value in usual.items() if group[name] != value]
            lines.append(f"  group {index}: {', '.join(parts)}")
        return "\n".join(lines)

    @property
    def state_bytes(self) -> int:
        """The state takes this many bytes here, once every parameter that requires a gradient has one.

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
            (group, pack, *self._on(group, device)[member])
            for index, group in enumerate(self.param_groups)
            for (device, member), pack in self._pack(index, self._members(group, with_gradients=True)).items()
        ]
        if not creates_states_only:
            for group in self.param_groups:
                self._tell_of_the_end(group)
            for group, pack, rule, step in launches:
                pack.step(rule, step, group)
            for group in self.param_groups:
                group["step"] += 1
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
        handle = self.register_load_state_dict_pre_hook(checked)  # type: ignore[arg-type]
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
                if isinstance(parameter, Tensor) and isinstance(entries.get(key), Uncast):
                    entries[key] = entries[key].tensor.to(parameter.device)
        super().__setstate__(state)
        self._rules_on, self._packs, self._chosen, self._tried = {}, {}, {}, set()
        self._told = set()

    def _add_rule(self, rule: str | Path | Rule | None, total_steps: int | None = None) -> str:
        """Keeps a copy of a rule and returns name@hash, which groups and state dicts call it."""
        if isinstance(rule, str) and rule_hash(rule) in self._rules:
            return rule
        if rule is None:
            name, rule = default_rule(total_steps)
        elif isinstance(rule, Rule):
            name = type(rule).__name__
        elif isinstance(rule, str | Path):
            name, rule = Path(rule).stem, load(rule)
        else:
            hint = f": a rate is lr={rule}" if isinstance(rule, int | float) else ""
            raise TypeError(f"rule must be a name, a path or a Rule, got {type(rule).__name__}{hint}")
        if self.state_dtype == torch.bfloat16:
            rule = rule.compacted()
        digest = digest_of(rule)
        self._rules[digest] = copy.deepcopy(rule).requires_grad_(False)
        return f"{name}@{digest}"

    def _rule(self, group: dict[str, Any]) -> Rule:
        try:
            return self._rules[rule_hash(group["rule"])]
        except KeyError:
            raise ValueError(
                f"a group's rule was set to {group['rule']!r}: a group keeps the rule that it was added "
                "with; use add_param_group or a new LearnedOptimizer"
            ) from None

    def rule_for(self, group: dict[str, Any], parameter: Tensor) -> UpdateRule:
        """Returns the rule that moves a parameter of a group: the group's, or its member.

        Raises:
            ValueError: The group's rule has no member for the parameter.
        """
        return self._rule(group).members[self._member(group, parameter)]

    def _member(self, group: dict[str, Any], parameter: Tensor) -> int:
        if isinstance(self._rule(group), UpdateRule):
            return 0
        if parameter not in self._chosen:
            self._chosen |= zip(group["params"], self.members_for(group), strict=True)
        return self._chosen[parameter]

    def members_for(self, group: dict[str, Any], names: Sequence[str] | None = None) -> list[int]:
        """Returns which members of the group's rule move its parameters, by their own or other names.

        Raises:
            ValueError: The group's rule has no member for one of them.
        """
        rule = self._rule(group)
        return [rule.member_for(info) for info in self._infos(group, names)]

    def _num_tensors(self) -> int:
        """How many parameters of all groups are optimised."""
        params = _unique([parameter for group in self.param_groups for parameter in group["params"]])
        return sum(parameter.requires_grad for parameter in params)

    def _infos(self, group: dict[str, Any], names: Sequence[str] | None = None) -> Iterator[ParameterInfo]:
        """Yields what features and `Grouped` may know of each of a group's parameters."""
        (index,) = (i for i, other in enumerate(self.param_groups) if other is group)
        names = names or group.get("param_names") or [""] * len(group["params"])
        for name, parameter in zip(names, group["params"], strict=True):
            yield ParameterInfo(
                name.replace("_orig_mod.", ""),  # which a compiled model puts before
                tuple(parameter.shape),
                index,
                tuple(local(parameter).shape),
                sum_over_shards(parameter),
                cuts=cuts(parameter),
            )

    def _on(self, group: dict[str, Any], device: torch.device) -> list[tuple[UpdateRule, Step]]:
        """Returns the members of a group's rule on a device, with their steppers, which pack φ once."""
        key = (rule_hash(group["rule"]), device)
        if key not in self._rules_on:
            rule = copy.deepcopy(self._rule(group)).to(device)
            self._rules_on[key] = [(member, member.stepper()) for member in rule.members]
        return self._rules_on[key]

    def _check(self) -> None:
        """Raises for everything that would otherwise fail after a first parameter had been written."""
        for group in self.param_groups:
            check_options(group)
            self._check_reading(group)
            rule = self._rule(group)
            carried = [carried_shapes(member) for member in rule.members]
            for index, parameter in enumerate(group["params"]):
                if parameter.grad is None:
                    continue
                # Of most rules there is one member: it need not be looked up for every parameter.
                shapes = carried[0 if isinstance(rule, UpdateRule) else self._member(group, parameter)]
                if problem := problem_of(parameter, self.state.get(parameter, {}), shapes):
                    raise RuntimeError(f"{name_of(group, index)} {problem}")

    def _check_reading(self, group: dict[str, Any]) -> None:
        """Raises ValueError where a group's rule reads T, and the group has none."""
        key = rule_hash(group["rule"]), group["total_steps"]
        if key not in self._tried:
            for member in self._rule(group).members:
                read_zero(member, group["total_steps"])
            self._tried.add(key)

    def _has_a_rate(self, group: dict[str, Any]) -> bool:
        """Whether a group's rule has its own step sizes, so that none is left to its user."""
        return any(isinstance(member, ZeroShot | Corrected) for member in self._rule(group).members)

    def _tell_of_the_end(self, group: dict[str, Any]) -> None:
        """Warns where a group's steps are over, from which on ZeroShot stands still."""
        total, done = group["total_steps"], group["step"]
        if total is None or done < total:
            return
        members = self._rule(group).members
        if any(isinstance(m, ZeroShot | Corrected) and not m.horizon_free for m in members):
            self._tell(
                "total_steps",
                f"step {done + 1} is beyond total_steps={total}: the rule moves nothing any more; "
                "total_steps must count all of the optimizer's steps",
                RuntimeWarning,
            )

    def _tell(self, what: str, message: str, category: type[Warning]) -> None:
        """Warns, once."""
        if what not in self._told:
            self._told.add(what)
            warnings.warn(message, category, stacklevel=3)

    def _is_at_rest(self) -> bool:
        """Whether every rate and every gradient is 0, of sharded parameters in every process.

        In a first step that is how torch.distributed.checkpoint has an optimizer create its state, to save it
        or to load over it. A rule's state would move on even so, and the run would not be as if unsaved.
        """
        return all(
            float(group["lr"]) == 0 and all(is_zero(p.grad) for p in group["params"] if p.grad is not None)
            for group in self.param_groups
        )

    def _members(self, group: dict[str, Any], with_gradients: bool) -> list[Tensor]:
        """Returns the parameters of a group that have a state, or are about to get one."""
        return [
            parameter
            for parameter in _unique(group["params"])
            if STATE in self.state.get(parameter, ()) or (with_gradients and parameter.grad is not None)
        ]

    def _pack(self, index: int, members: list[Tensor]) -> dict[_Place, Pack]:
        """Returns the packs of a group's parameters, one for each device and each member of its rule.

        `self.state` is what counts. A pack whose members or whose members' states are not the ones in it
        (a first gradient, a loaded state dict, a parameter that moved) is replaced: its states are copied,
        and s_0 for who has none.
        """
        group = self.param_groups[index]
        by_place: dict[_Place, list[Tensor]] = {}
        for parameter in members:
            by_place.setdefault((parameter.device, self._member(group, parameter)), []).append(parameter)
        known = self._packs.get(index, {})
        self._packs[index] = packs = {}
        for place, params in by_place.items():
            pack = known.get(place)
            if (
                pack is not None and STATISTICS in pack.carried
            ):  # features may read how many tensors there are
                pack = pack if pack.layout.num_tensors == self._num_tensors() else None
            if pack is None or not pack.holds(params, self.state):
                pack = self._new_pack(group, place, params)
            packs[place] = pack
        return packs

    def _new_pack(self, group: dict[str, Any], place: _Place, params: list[Tensor]) -> Pack:
        device, member = place
        n = sum(local(parameter).numel() for parameter in params)
        mebibytes = sum(self._bytes(group, parameter) for parameter in params) / 2**20
        needed = self._bytes_by_device()[device] / 2**20  # of all groups
        what = f"the state of LearnedOptimizer's parameters on {device} takes {needed:.1f} MiB"
        advice = "giving it half of the parameters halves it"
        moved_by = self.rule_for(group, params[0])
        if moved_by.compacted() is not moved_by:
            advice = f"state_dtype=torch.bfloat16 takes a third off, and {advice}"
        elif torch.Size(moved_by.state_shape).numel():  # statistics are not rounded
            advice = f"state_dtype=torch.bfloat16 halves it, as does {advice.removesuffix(' halves it')}"
        total = _total_memory(device)
        if total is not None and needed > total / 2**20:
            raise MemoryError(f"{what}, and there are {total / 2**20:.1f} MiB: {advice}")
        logger.info("the rule's state of %d coordinates takes %.1f MiB on %s", n, mebibytes, device)
        rule, _ = self._on(group, device)[member]
        infos = dict(zip(group["params"], self._infos(group), strict=True))
        layout = Layout(tuple(infos[parameter] for parameter in params), num_tensors=self._num_tensors())
        dtype = self.dtype_of(STATISTICS, group)
        try:
            # Not of inference mode, even if the first step is taken in it: others will write into it.
            with torch.inference_mode(False), torch.no_grad():
                carried = {STATE: rule.init_state(n, self.dtype_of(STATE, group))}
                if rule.features is not None:  # which are never rounded with the state
                    carried[STATISTICS] = rule.init_statistics(n, dtype)
                pack = Pack(params, layout, carried, dtype, rule)
        except torch.OutOfMemoryError as error:
            error.add_note(f"{what}: {advice}")
            raise
        pack.share(self.state)
        return pack

    def _bytes_by_device(self) -> dict[torch.device, int]:
        """Returns the bytes on each device that the states of all groups take, or will take."""
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
        """Returns the bytes that the state of one parameter takes on this process."""
        bytes_ = sum(
            torch.Size(shape).numel() * self.dtype_of(key, group).itemsize
            for key, shape in carried_shapes(self.rule_for(group, parameter)).items()
        )
        return int(bytes_ * local(parameter).numel())

    def dtype_of(self, key: str, group: dict[str, Any]) -> torch.dtype:
        """Returns the dtype of a group's entries "rule_state" or "statistics"."""
        dtype = torch.promote_types(next(self._rule(group).parameters()).dtype, torch.float32)
        return (self.state_dtype or dtype) if key == STATE else dtype


def _unique(params: list[Tensor]) -> list[Tensor]:
    """Returns the parameters in their order, without repetitions."""
    return list(dict.fromkeys(params))


def _total_memory(device: torch.device) -> int | None:
    """Returns the device's memory in bytes, or None if there is no way to know."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type == "cpu" and {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= os.sysconf_names.keys():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None
