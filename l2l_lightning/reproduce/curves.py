"""The experiments that are curves: curves.yaml says what is run and reported, this how it is evaluated."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from torch import Tensor

from l2l_lightning.class_paths import from_class_config
from l2l_lightning.comparison.baselines import BASELINES, setting_text
from l2l_lightning.comparison.curves_file import loss_rows
from l2l_lightning.comparison.figures import curves_picture
from l2l_lightning.comparison.statistics import (
    Interval,
    diverged,
    final_loss,
    final_losses,
    standing,
    sum_loss,
    summary,
)
from l2l_lightning.reproduce.experiment import Experiment, Finding, Outcome, markdown_table
from l2l_lightning.reproduce.result_store import Request, ResultStore
from l2l_lightning.tasks.base import Task

Losses = Mapping[str, Tensor]
"""The losses [T, K] of a panel's curves, by the curves' names."""


@dataclass(frozen=True)
class Panel:
    """One picture: rules and baselines on one task."""

    title: str
    task: Task
    rules: dict[str, str]
    """The rules' names, by their names in the legend."""
    horizon: int = 100
    num_optimizees: int | None = None
    with_reference: bool = False
    """Whether the baselines run at what is best on the reference task and at PyTorch's rates, too."""
    baselines: tuple[str, ...] = tuple(BASELINES)
    tuned_on: Task | None = None
    """What the baselines are tuned on, if not the task itself."""


class Row(NamedTuple):
    """A line of the report: a rule on a panel, beside what others report of it."""

    panel: str
    what: str
    rule: str = "learned"
    study: str = "–"
    paper: str = "–"
    figure: float | None = None
    """The paper's final loss of its rule, that the verdict measures ours by."""
    ours: str = "{rule}"
    """A template for the losses that decide: the rule's, a curve's by its name, `least`, that of the baseline
    that is `best`, and `ratio`, the rule's to Adam's."""
    aim: Literal["baselines", "sum", "chance"] = "baselines"
    """What decides: final losses or sums of losses below every tuned baseline's; or a loss below chance."""
    reached: str = "Reproduced: "
    missed: str = "Not reproduced: "


def panel_requests(panels: Mapping[str, Panel], store: ResultStore) -> dict[tuple[str, str], Request]:
    """Lists the losses of every panel's rules and baselines, by panel and curve."""
    requests = {}
    for key, panel in panels.items():
        number = store.count(panel.num_optimizees or store.settings.num_optimizees)
        for label, name in (panel.rules | {name: name for name in panel.baselines}).items():
            horizon = store.steps(panel.horizon)
            requests[key, label] = Request(panel.task, name, horizon, number, tuned_on=panel.tuned_on)
        for name in panel.baselines if panel.with_reference else ():
            requests[key, f"{name} (one for all)"] = replace(requests[key, name], tuning="reference")
            requests[key, f"{name} (default)"] = replace(requests[key, name], tuning="default")
    return requests


def panel_outcome(
    panels: Mapping[str, Panel],
    rows: list[Row],
    note: str,
    store: ResultStore,
    losses: Mapping[tuple[str, str], Tensor],
    folder: Path,
) -> Outcome:
    """Makes a picture, a table and numbers of every panel, and of the rows the report's lines.

    The note is a template for the final losses by panel and curve, "{panel[curve]}"; "best" is the best tuned
    baseline's, and "per_coordinate" lists them all, divided by the optimizee's number of coordinates.
    """
    requests = panel_requests(panels, store)
    found: dict[str, dict[str, Tensor]] = {key: {} for key in panels}
    results: dict[str, dict[str, Any]] = {}
    lines: list[Sequence[Any]] = []
    for (key, label), value in losses.items():
        found[key][label] = value
        lines += loss_rows([key, panels[key].task.describe(), label], value)
    pictures, tables, words = {}, [], {}
    for key, panel in panels.items():
        shown = {label: found[key][label] for label in (*panel.rules, *panel.baselines)}
        pictures[key] = curves_picture(shown, panel.title, [next(iter(panel.rules))])
        optimizers = {
            name: summary(value) | {"num_optimizees": value.shape[1]} | _setting(requests[key, name], store)
            for name, value in found[key].items()
        }
        horizon = store.steps(panel.horizon)
        results[key] = {"task": panel.task.describe(), "horizon": horizon, "optimizers": optimizers}
        tables.append(_table(panel, found[key], optimizers))
        final = {name: final_loss(value) for name, value in found[key].items()}
        size = panel.task.num_coordinates
        scaled = ", ".join(f"{name} {final[name].mean / size:.3f}" for name in shown)
        words[key] = {**final, "best": final[_best(final)], "per_coordinate": scaled}
    findings = [_finding(row, found[row.panel]) for row in rows]
    columns = ("panel", "task", "optimizer", "seed", "step", "loss")
    notes = [note.format(**words)] if note else []
    return Outcome(findings, results, columns, lines, pictures, tables, notes)


def _setting(request: Request, store: ResultStore) -> dict[str, Any]:
    if request.optimizer not in BASELINES:
        return {"rule": request.optimizer}
    tuned = store.baseline(request)
    return {"learning_rate": tuned.learning_rate, "setting": tuned.setting, "tuning": request.tuning}


def _table(panel: Panel, losses: Losses, optimizers: Mapping[str, dict[str, Any]]) -> str:
    first = next(iter(panel.rules))
    rows = []
    for name, value in sorted(losses.items(), key=lambda item: _rank(final_loss(item[1]))):
        rate = setting = ""
        if "setting" in optimizers[name]:
            rate = f"{optimizers[name]['learning_rate']:g}"
            setting = setting_text(optimizers[name]["setting"])
        rate += f" ({setting})" if setting else ""
        label = f"**{name}**" if name in panel.rules else name
        # A mean that does not exist is neither ahead nor level; the column before says how often it diverged.
        versus = "" if name == first else _standing(losses[first], value) if _exists(value) else "–"
        rows.append([label, final_loss(value), sum_loss(value), diverged(value), rate, versus])
    head = ["optimizer", "final loss", "sum of losses", "diverged", "learning rate", f"{first} against it"]
    return f"{panel.title}:\n\n{markdown_table(head, rows)}"


def _finding(row: Row, losses: Losses) -> Finding:
    measure = sum_loss if row.aim == "sum" else final_loss
    values = {name: measure(value) for name, value in losses.items()}
    rule, best = values[row.rule], _best(values)
    how = _against_all(losses, row.rule)
    reached = not how.startswith("not")
    if row.aim == "sum":
        reached = rule.high < values[best].low
        how = CLEARLY_AHEAD if reached else f"not clearly ahead of {best}"
    elif row.aim == "chance":
        reached = rule.mean < 0.9 * float(losses[row.rule][0].mean())
    if row.figure is not None:
        difference = rule.mean / row.figure - 1
        how += f"; {abs(difference):.0%} {'below' if difference <= 0 else 'above'} the paper's figure"
    ratio = rule.mean / values["adam"].mean
    ours = row.ours.format(**values, rule=rule, ratio=ratio, best=best, least=values[best])
    return Finding(row.what, row.study, row.paper, ours, f"{row.reached if reached else row.missed}{how}.")


CLEARLY_AHEAD = "ahead of every tuned baseline, 95% intervals disjoint"


def _against_all(losses: Losses, rule: str) -> str:
    """Says how a rule's final losses stand to every tuned baseline's; one without a mean is told apart."""
    tuned = [name for name in BASELINES if name in losses]
    leads = {name: _standing(losses[rule], losses[name]) for name in tuned if _exists(losses[name])}
    apart = "".join(
        f"; {name}, whose final loss is not finite, diverged on {diverged(losses[name])} of "
        f"{losses[name].shape[1]}"
        for name in tuned
        if name not in leads
    )
    behind = [name for name, how in leads.items() if not how.startswith("ahead")]
    if behind or not leads:
        values = {name: final_loss(losses[name]) for name in tuned}
        best = _best(values)
        return f"not ahead of {', '.join(behind or tuned)} (best: {best}, {values[best]}){apart}"
    if all(how == "ahead, disjoint intervals" for how in leads.values()):
        return f"{CLEARLY_AHEAD}{apart}"
    return f"ahead of every tuned baseline, some only in the paired difference{apart}"


def _best(values: Mapping[str, Interval]) -> str:
    """Names the tuned baseline with the least value on the optimizees that are reported."""
    return min((name for name in BASELINES if name in values), key=lambda name: _rank(values[name]))


def _rank(value: Interval) -> float:
    """Orders values by their means, those without one last: NaN itself has no order."""
    return value.mean if math.isfinite(value.mean) else math.inf


def _exists(losses: Tensor) -> bool:
    return math.isfinite(final_loss(losses).mean)


def _standing(losses: Tensor, others: Tensor) -> str:
    return standing(final_losses(losses), final_losses(others))


def _load(text: str) -> dict[str, Experiment]:
    """Makes the experiments that curves.yaml describes; its tasks are class configurations."""
    experiments = {}
    for name, fields in yaml.safe_load(text).items():
        panels = {
            key: Panel(**panel | {"task": from_class_config(panel["task"], Task)})
            for key, panel in fields["panels"].items()
        }
        rows = [Row(**fields.get("every_row", {}) | row) for row in fields["rows"]]
        experiments[name] = Experiment(
            fields["title"],
            partial(panel_requests, panels),
            partial(panel_outcome, panels, rows, fields.get("note", "")),
        )
    return experiments


CURVES = _load(resources.files("l2l_lightning.reproduce").joinpath("curves.yaml").read_text("utf-8"))
"""Figures 2 to 8 of the study, and the paper's, by the experiments' names."""
