"""A rule for each kind of tensor, such as one LSTM for convolutions and one for what follows them."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from l2l_lightning.class_paths import class_config, dotted_path, from_class_config, resolve
from l2l_lightning.errors import GroupError
from l2l_lightning.rules.base import Rule, UpdateRule
from l2l_lightning.rules.layout import ParameterInfo

KNOWN = {name: operator.attrgetter(name) for name in ("name", "rank")}  # which can be pickled
"""A key of `Grouped` is looked for in one of these facts of a tensor."""


class Grouped(Rule):
    """Moves every tensor with the rule of its group, all of which are meta-trained together.

    Args:
        rules: The rules by their groups' keys; in a configuration, {"class_path", "init_args"} each.
        by: What tells a tensor's group. "name": the first key, as a regular expression, that is found in the
            tensor's name ("conv" in "conv1.weight"). "rank": the first that is found in its number of
            dimensions ("4", "0|1"). A function, or its dotted path: from a `ParameterInfo` to the key.

    Raises:
        ValueError: There are no rules, one of them twice, or a key is no regular expression.
        TypeError: A rule is no UpdateRule, or `by` is neither a function nor one's path.

    Source: Andrychowicz et al. 2016, section 3.3: "separate LSTMs for convolutional and fully connected".

    Example:
        >>> from l2l_lightning import CoordinatewiseLSTM, LearnedOptimizer
        >>> rule = Grouped({"weight": CoordinatewiseLSTM(), "bias": CoordinatewiseLSTM(hidden_size=4)})
        >>> model = torch.nn.Linear(10, 1)
        >>> optimizer = LearnedOptimizer(model.named_parameters(), rule)
    """

    def __init__(
        self,
        rules: Mapping[str, UpdateRule],
        by: str | Callable[[ParameterInfo], str] = "name",
    ) -> None:
        super().__init__()
        made = {
            key: from_class_config(rule, UpdateRule) if isinstance(rule, dict) else rule
            for key, rule in rules.items()
        }
        if not made:
            raise ValueError("rules must name at least one rule")
        for key, rule in made.items():
            if not isinstance(rule, UpdateRule):
                raise TypeError(f"rules[{key!r}] must be an UpdateRule, got {rule!r}")
        if len({id(rule) for rule in made.values()}) < len(made):
            raise ValueError("rules must hold every rule once: a key with | serves several kinds of tensor")
        self.keys = list(made)
        self.rules = nn.ModuleList(made.values())
        self.by = by
        self._text = KNOWN[by] if isinstance(by, str) and by in KNOWN else resolve(by, "by")
        self._is_pattern = self._text in KNOWN.values()
        if self._is_pattern:
            for key in self.keys:
                try:
                    re.compile(key)
                except re.error as error:
                    raise ValueError(f"the key {key!r} of rules is no regular expression: {error}") from error

    @property
    def members(self) -> Sequence[UpdateRule]:
        """The groups' rules, in their order."""
        return list(self.rules)  # type: ignore[arg-type]

    def member_for(self, tensor: ParameterInfo) -> int:
        """Returns the position of the tensor's group.

        Raises:
            GroupError: It belongs to none, or has no name to go by.
        """
        if self.by == "name" and not tensor.name:
            raise GroupError(
                "Grouped chooses a tensor's rule by its name, and a tensor has none: pass the optimizer "
                "model.named_parameters(), or choose by rank"
            )
        text = str(self._text(tensor))
        for position, key in enumerate(self.keys):
            if re.search(key, text) if self._is_pattern else key == text:
                return position
        raise GroupError(
            f"Grouped has no rule for the tensor {tensor.name!r} of shape {list(tensor.shape)}: "
            f"its {self.by if self._is_pattern else 'group'} is {text!r}, the keys of its rules "
            f"(--model.rule.rules) are {self.keys}"
        )

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws every rule's φ anew, in their order."""
        for rule in self.members:
            rule.reset_parameters(generator)

    def start_from(self, trained: Rule) -> None:
        """Takes the φ of a trained rule of the same groups; or every group's of one that moves all tensors.

        Raises:
            ValueError: Its φ has other shapes.
        """
        if isinstance(trained, Grouped):
            super().start_from(trained)
            return
        for rule in self.members:
            rule.start_from(trained)

    def compacted(self) -> Grouped:
        """Returns the same groups, of rules with statistics that take fewer bytes."""
        rules = zip(self.keys, (member.compacted() for member in self.members), strict=True)
        return Grouped(dict(rules), self.by)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return f"Grouped({dict(zip(self.keys, self.members, strict=True))!r})"

    def config(self) -> dict[str, Any]:
        """Returns the constructor's arguments, a function by its dotted path."""
        rules = {key: class_config(rule) for key, rule in zip(self.keys, self.members, strict=True)}
        return {"rules": rules, "by": self.by if isinstance(self.by, str) else dotted_path(self.by)}
