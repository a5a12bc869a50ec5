"""The README.md of a rule's repository on the Hugging Face Hub, made of its card."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

FRONT_MATTER = """---
library_name: l2l-lightning
tags:
- learned-optimizer
- meta-learning
- pytorch
---
"""

USE = """# {name}

A learned optimizer: the weights of an update rule, `{rule}`, for the Python package l2l-lightning.
They are plain numbers, and loading them executes nothing.

```python
from l2l_lightning import LearnedOptimizer{more_imports}

optimizer = LearnedOptimizer(model.parameters(), {argument})
```
"""

FOREIGN = "`{rule}` is a class of its author's; MODULE is the module that has it, if you trust it.\n"


def model_card(repository: str, card: Mapping[str, Any], is_own: bool) -> str:
    """Returns the Markdown that the hub shows: how the rule is used, how it was trained, what it does.

    Args:
        repository: "USER/REPOSITORY".
        card: As `pretrained.card` has it; what it lacks is left out.
        is_own: Whether the rule's class is one of this package's.
    """
    rule, name = str(card["rule"]["class"]), repository.rpartition("/")[2]
    if is_own:
        parts = [USE.format(name=name, rule=rule, argument=f'rule="{repository}"', more_imports="")]
    else:
        argument = f'rule=load("{repository}", trust=["MODULE"])'
        parts = [USE.format(name=name, rule=rule, argument=argument, more_imports=", load")]
        parts.append(FOREIGN.format(rule=rule))
    if training := card.get("meta_training"):
        settings = json.dumps(training, indent=2, ensure_ascii=False)
        parts.append(f"## Meta-training\n\n```json\n{settings}\n```\n")
    headline = card.get("headline") or {}
    if "optimizers" in headline:
        parts.append("\n".join(["## Results", "", *_table(headline), ""]))
    if failures := card.get("known_failures"):
        parts.append("\n".join(["## Known failures", "", *(f"- {failure}" for failure in failures), ""]))
    return FRONT_MATTER + "\n" + "\n".join(parts)


def _table(headline: Mapping[str, Any]) -> Iterator[str]:
    """Yields a table of the losses of a card's comparison, with what they were measured on."""
    task, horizon, data = (headline.get(key) for key in ("task", "horizon", "data"))
    yield f"{task}, {horizon} steps, data: {data}; means with 95% intervals."
    yield ""
    yield "| optimizer | final loss | sum of losses |"
    yield "| --- | --- | --- |"
    for name, result in headline["optimizers"].items():
        yield f"| {name} | {_interval(result.get('final_loss'))} | {_interval(result.get('sum_loss'))} |"


def _interval(value: Any) -> str:
    """Says a mean with its interval; nothing of what is not finite or of another form."""
    if not isinstance(value, Mapping) or value.get("mean") is None:
        return ""
    low, high = value.get("ci95") or (None, None)
    return f"{value['mean']:.4g}" + ("" if low is None or high is None else f" [{low:.4g}, {high:.4g}]")
