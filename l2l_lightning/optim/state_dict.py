"""A state dict of LearnedOptimizer is checked here from end to end before anything is loaded from it."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from l2l_lightning.class_paths import without_kernel_options
from l2l_lightning.errors import RuleError
from l2l_lightning.optim.checks import check_options, name_of
from l2l_lightning.optim.pack import carried_shapes
from l2l_lightning.optim.sharding import local
from l2l_lightning.rules.base import Rule

if TYPE_CHECKING:
    from l2l_lightning.optim.learned_optimizer import LearnedOptimizer


class Uncast:
    """Hides a state from Optimizer.load_state_dict, which would cast a tensor to θ's dtype."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def checked(optimizer: LearnedOptimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Checks a state dict and returns it with its states kept from being cast; a hook of load_state_dict."""
    groups, saved_groups = optimizer.param_groups, state_dict["param_groups"]
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in saved_groups]:
        return state_dict  # Optimizer.load_state_dict says which of them differs
    _check_names(groups, saved_groups)
    states = dict(state_dict["state"])
    # An older version's groups neither counted steps nor knew how many there would be.
    saved_groups = [
        {"step": 0, "total_steps": group["total_steps"]} | saved
        for group, saved in zip(groups, saved_groups, strict=True)
    ]
    for group, saved in zip(groups, saved_groups, strict=True):
        if "rule" not in saved:
            raise ValueError("the state dict is not a LearnedOptimizer's: its groups have no rule")
        if missing := {"lr", "weight_decay", "maximize"} - saved.keys():
            raise ValueError(f"a group of the state dict lacks {', '.join(sorted(missing))}")
        check_options(saved)
        if rule_hash(saved["rule"]) != rule_hash(group["rule"]):
            raise ValueError(
                f"the state dict is of rule {saved['rule']}, the optimizer's is {group['rule']}: construct "
                f"it with the rule, and the total_steps ({saved['total_steps']}), that it was saved with"
            )
        if "param_names" in group:
            _check_members(optimizer, group, saved.get("param_names"))
            saved["param_names"] = group["param_names"]  # by which the rule's members are chosen
        places = dict(zip(saved["params"], enumerate(group["params"]), strict=True))
        for key, (index, parameter) in places.items():
            if key in states:
                shapes = carried_shapes(optimizer.rule_for(group, parameter))
                for what, shape in shapes.items():
                    dtype = optimizer.dtype_of(what, group)
                    _check_state(name_of(group, index), parameter, states[key], what, shape, dtype)
                states[key] = states[key] | {what: Uncast(states[key][what]) for what in shapes}
    for group, saved in zip(groups, saved_groups, strict=True):
        if group["total_steps"] not in (None, saved["total_steps"]):
            warnings.warn(
                f"the state dict's total_steps, {saved['total_steps']}, is kept, and not the optimizer's, "
                f"{group['total_steps']}: with another one the schedule would jump; where it is to, set it "
                "in param_groups after loading",
                stacklevel=2,
            )
            break
    return {**state_dict, "state": states, "param_groups": saved_groups}


def _check_names(groups: list[dict[str, Any]], saved_groups: list[dict[str, Any]]) -> None:
    """Raises ValueError if a name is at two places: equal shapes would not show that two were swapped."""

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


def _check_members(optimizer: LearnedOptimizer, group: dict[str, Any], saved: list[str] | None) -> None:
    """Raises ValueError if a parameter's new name chooses another member of its rule than the saved name."""
    choices = zip(optimizer.members_for(group), optimizer.members_for(group, saved), strict=True)
    for index, (ours, theirs) in enumerate(choices):
        if ours != theirs and saved:
            raise ValueError(
                f"the state dict's {saved[index]!r} is {name_of(group, index)} here, which another rule of "
                f"{group['rule']} moves: it must keep a name that the same one is chosen for"
            )


def _check_state(
    name: str,
    parameter: Tensor,
    entries: dict[str, Any],
    what: str,
    leading: Sequence[int],
    dtype: torch.dtype,
) -> None:
    """Checks that one entry of a saved state fits its parameter.

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
    if local(state).shape[len(leading) :] != local(parameter).shape:
        raise ValueError(
            f"{name}: the state dict's state is sharded in another way than the parameter: load it with "
            "torch.distributed.checkpoint, which reshards"
        )
    here = local(state)
    if here.numel() and not torch.stack(torch.aminmax(here)).isfinite().all():
        raise ValueError(f"{name}: the state dict's state has a number that is not finite")


def rule_hash(rule: str) -> str:
    """Returns the hash of name@hash, which alone identifies a rule: it may have two names."""
    return rule.rpartition("@")[2]


def digest_of(rule: Rule) -> str:
    """Returns a hash of everything that a rule computes with: its class, constructor's arguments and φ.

    Raises:
        RuleError: The rule's arguments cannot be written down.
    """
    config = without_kernel_options(rule.config())
    try:
        text = json.dumps([type(rule).__name__, config], sort_keys=True)
    except (TypeError, ValueError) as error:
        raise RuleError(f"{type(rule).__name__}.config() must be of plain values: {error}") from error
    digest = hashlib.sha256(text.encode())
    for key, value in rule.state_dict().items():
        digest.update(f"{key} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
