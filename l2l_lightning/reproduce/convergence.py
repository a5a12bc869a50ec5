"""The experiments that are curves: quadratics, MNIST, meta-epochs, and transfer between activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from l2l_lightning.comparison.baselines import BASELINES, setting_text
from l2l_lightning.comparison.plots import curves_figure, png
from l2l_lightning.comparison.statistics import Interval
from l2l_lightning.reproduce.bench import Bench, Request, Run, Train, Tune
from l2l_lightning.reproduce.experiment import (
    Experiment,
    Finding,
    Outcome,
    curve,
    final,
    lead,
    loss_rows,
    summary,
)
from l2l_lightning.reproduce.recipes import SNAPSHOTS
from l2l_lightning.reproduce.training import Report
from l2l_lightning.tasks import MNISTMLP, NoisyScaledSquare, Quadratic
from l2l_lightning.tasks.base import Task


@dataclass(frozen=True)
class Panel:
    """One picture: rules and baselines on one task."""

    key: str
    """The picture's file name."""
    title: str
    task: Task
    horizon: int
    rules: dict[str, str]
    """Names in the legend to names of rules."""
    num_optimizees: int | None = None
    with_reference: bool = False
    """Also show the baselines at what is best on the reference task: one setting for all."""

    def runs(self, bench: Bench) -> dict[str, Run]:
        """What its curves are, by their names."""
        number = bench.count(self.num_optimizees or bench.settings.num_optimizees)
        horizon = bench.steps(self.horizon)
        runs = {label: Run(self.task, rule, horizon, number) for label, rule in self.rules.items()}
        for name in BASELINES:
            runs[name] = Run(self.task, name, horizon, number)
        if self.with_reference:
            for name in BASELINES:
                runs[f"{name} (one for all)"] = replace(runs[name], tuning="reference")
                runs[f"{name} (default)"] = replace(runs[name], tuning="default")
        return runs


class Curves(Experiment):
    """An experiment of panels; a subclass says which, and what follows from them."""

    panels: ClassVar[Sequence[Panel]]

    def requests(self, bench: Bench) -> list[Request]:
        """Rules, then searches, then curves."""
        rules = dict.fromkeys(rule for panel in self.panels for rule in panel.rules.values())
        requests: list[Request] = [Train(rule) for rule in rules]
        requests += [Tune(panel.task, (bench.steps(panel.horizon),)) for panel in self.panels]
        for panel in self.panels:
            requests += panel.runs(bench).values()
        return requests

    def outcome(self, bench: Bench, folder: Path, report: Report) -> Outcome:
        """Pictures, tables and numbers of every panel; the findings are the subclass's."""
        losses = {
            panel.key: {name: bench.losses(run) for name, run in panel.runs(bench).items()}
            for panel in self.panels
        }
        pictures, tables, results = {}, [], {}
        rows: list[Sequence[Any]] = []
        for panel in self.panels:
            found, runs = losses[panel.key], panel.runs(bench)
            pictures[panel.key] = _picture(panel, found)
            tables.append(_table(panel, found, runs, bench))
            results[panel.key] = {
                "task": panel.task.describe(),
                "horizon": bench.steps(panel.horizon),
                "optimizers": {
                    name: summary(value) | _setting(runs[name], bench) for name, value in found.items()
                },
            }
            for name, value in found.items():
                rows += loss_rows([panel.key, panel.task.describe(), name], value)
        columns = ("panel", "task", "optimizer", "seed", "step", "loss")
        findings, notes = self.findings(losses)
        return Outcome(findings, results, columns, rows, pictures, notes, tables)

    def findings(self, losses: dict[str, dict[str, Tensor]]) -> tuple[list[Finding], list[str]]:
        """What the report's lines say, and its notes, from the losses by panel and name."""
        raise NotImplementedError


def _setting(run: Run, bench: Bench) -> dict[str, Any]:
    if run.optimizer not in BASELINES:
        return {"rule": run.optimizer}
    tuned = bench.baseline(run)
    return {"learning_rate": tuned.learning_rate, "setting": tuned.setting, "tuning": run.tuning}


def _picture(panel: Panel, losses: dict[str, Tensor]) -> bytes:
    shown = {name: value for name, value in losses.items() if "(" not in name or name in panel.rules}
    curves = [curve(name, value, highlight=name in panel.rules) for name, value in shown.items()]
    number = next(iter(losses.values())).shape[1]
    title = f"{panel.title}\nmean of {number} optimizees, with its 95% interval"
    return png(curves_figure(curves, title, "final loss (mean of last 10)"))


def _table(panel: Panel, losses: dict[str, Tensor], runs: dict[str, Run], bench: Bench) -> str:
    first = next(iter(panel.rules))
    lines = [
        f"{panel.title}:",
        "",
        f"| optimizer | final loss | sum of losses | diverged | learning rate | {first} against it |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in sorted(losses, key=lambda name: final(losses[name]).mean):
        value = losses[name]
        rate = ""
        if runs[name].optimizer in BASELINES:
            tuned = bench.baseline(runs[name])
            rate = f"{tuned.learning_rate:g}" + (f" ({setting_text(tuned.setting)})" if tuned.setting else "")
        bold = "**" if name in panel.rules else ""
        versus = "" if name == first else lead(losses[first], value)
        total = Interval.of(value.double().sum(0))
        lines.append(
            f"| {bold}{name}{bold} | {final(value)} | {total} | {summary(value)['diverged']} | {rate} "
            f"| {versus} |"
        )
    return "\n".join(lines)


def best_baseline(losses: dict[str, Tensor]) -> str:
    """The tuned baseline with the least final loss on the optimizees that are reported."""
    return min(BASELINES, key=lambda name: final(losses[name]).mean)


def against_all(losses: dict[str, Tensor], rule: str) -> str:
    """A sentence: how a rule stands to every tuned baseline."""
    leads = {name: lead(losses[rule], losses[name]) for name in BASELINES}
    behind = [name for name, how in leads.items() if not how.startswith("ahead")]
    if behind:
        best = best_baseline(losses)
        return f"not ahead of {', '.join(behind)} (best: {best}, {final(losses[best])})"
    if all(how == "ahead, disjoint intervals" for how in leads.values()):
        return "ahead of every tuned baseline, 95% intervals disjoint"
    return "ahead of every tuned baseline, some only in the paired difference"


def _within(ours: float, theirs: float) -> str:
    difference = ours / theirs - 1
    if difference <= 0:
        return f"{-difference:.0%} below the paper's figure"
    return f"{difference:.0%} above the paper's figure"


class QuadraticExperiment(Curves):
    """Figure 2 of the study; the paper's quadratics."""

    name = "quadratic"
    title = "Quadratics: the study's figure 2, and the paper's (section 3.1)"
    datasets: ClassVar[set[str | None]] = {None}
    panels = (
        Panel(
            "study_quadratic",
            "The study's noisy, scaled x²",
            NoisyScaledSquare(),
            100,
            {"learned": "lstm-study-quadratic"},
            128,
        ),
        Panel(
            "paper_quadratic", "The paper's ‖Wθ − y‖²", Quadratic(), 100, {"learned": "lstm-quadratic"}, 128
        ),
    )

    def findings(self, losses: dict[str, dict[str, Tensor]]) -> tuple[list[Finding], list[str]]:
        """Against the paper's figure, whose scale is ten times smaller: the loss a coordinate, it seems."""
        study, paper = losses["study_quadratic"], losses["paper_quadratic"]
        ours, adam = final(paper["learned"]).mean, final(paper["adam"]).mean
        findings = [
            _noisy_square(study),
            Finding(
                "quadratic @100, learned / Adam",
                "–",
                f"0.04 / 0.05 = {0.04 / 0.05:.2f}",
                f"{ours:.3g} / {adam:.3g} = {ours / adam:.2f}",
                _verdict(paper, "learned"),
            ),
        ]
        scaled = ", ".join(f"{name} {final(paper[name]).mean / 10:.3f}" for name in ("learned", *BASELINES))
        notes = [
            "The paper's figure has the quadratics at about a tenth of our losses (LSTM 0.04, Adam 0.05, "
            f"RMSProp 0.06, NAG 0.08, SGD 0.2). Divided by the ten dimensions, ours read {scaled}. The paper "
            "does not say whether it sums or averages over coordinates, nor how its baselines' momenta were "
            "chosen: ours are tuned."
        ]
        return findings, notes


def _noisy_square(losses: dict[str, Tensor]) -> Finding:
    """By the sum of losses: all but the slowest are at zero, to rounding, after 100 steps."""
    sums = {name: Interval.of(value.double().sum(0)) for name, value in losses.items()}
    best = min(BASELINES, key=lambda name: sums[name].mean)
    ahead = sums["learned"].high < sums[best].low
    return Finding(
        "noisy x², sum of 100 losses",
        "learns",
        "–",
        f"learned {sums['learned']}, {best} {sums[best]}",
        "Reproduced: ahead of every tuned baseline, 95% intervals disjoint."
        if ahead
        else f"Not reproduced: not clearly ahead of {best}.",
    )


def _verdict(losses: dict[str, Tensor], rule: str) -> str:
    text = against_all(losses, rule)
    return f"{'Not reproduced' if text.startswith('not') else 'Reproduced'}: {text}."


class MNISTExperiment(Curves):
    """Figures 3 and 8 of the study, the latter the paper's."""

    name = "mnist"
    title = "MNIST: the study's figures 3 and 8 (the paper's figure 4, and its other sizes)"
    panels = (
        Panel("mnist_100", "MNIST, 784-20-10 sigmoid, 100 steps", MNISTMLP(), 100, {"learned": "lstm-mnist"}),
        Panel("mnist_200", "MNIST, 784-20-10 sigmoid, 200 steps", MNISTMLP(), 200, {"learned": "lstm-mnist"}),
        Panel(
            "hidden_40",
            "40 hidden units, 100 steps",
            MNISTMLP([40]),
            100,
            {"learned": "lstm-mnist"},
            with_reference=True,
        ),
        Panel(
            "layers_2",
            "Two hidden layers of 20, 100 steps",
            MNISTMLP([20, 20]),
            100,
            {"learned": "lstm-mnist"},
            with_reference=True,
        ),
        Panel(
            "layers_2_init_01",
            "Two hidden layers of 20, θ0 ~ N(0, 0.1²), 100 steps",
            MNISTMLP([20, 20], init_std=0.1),
            100,
            {"learned": "lstm-mnist"},
        ),
    )

    def findings(self, losses: dict[str, dict[str, Tensor]]) -> tuple[list[Finding], list[str]]:
        """Against the study's failure, and the paper's figures."""
        figures = {
            "mnist_100": ("784-20-10 @100", 0.25, 0.36),
            "mnist_200": ("784-20-10 @200", 0.21, 0.31),
            "hidden_40": ("40 hidden @100", 0.19, 0.32),
            "layers_2": ("2 layers @100", 0.32, 0.70),
        }
        findings = []
        for key, (what, learned, adam) in figures.items():
            found = losses[key]
            ours = final(found["learned"])
            text = against_all(found, "learned")
            word = "Not reproduced" if text.startswith("not") else "Reproduced"
            study = "behind SGD and RMSProp" if key == "mnist_100" else "–"
            findings.append(
                Finding(
                    what,
                    study,
                    f"LSTM {learned}, Adam {adam}",
                    f"learned {ours}, Adam {final(found['adam'])}",
                    f"{word}: {text}; {_within(ours.mean, learned)}.",
                )
            )
        two, larger = losses["layers_2"], losses["layers_2_init_01"]
        notes = [
            "Two layers: the paper's Adam reads 0.70 and its LSTM 0.32; with θ0 ~ N(0, 0.01²) two layers "
            "of sigmoids begin on a plateau, and our best tuned baseline reads "
            f"{final(two[best_baseline(two)])}, our rule {final(two['learned'])}. The paper "
            "calls θ0 an IID Gaussian without its deviation. "
            f"Tested with θ0 ~ N(0, 0.1²): Adam {final(larger['adam'])}, the rule {final(larger['learned'])}."
        ]
        return findings, notes


def _epoch_rules() -> dict[str, str]:
    names = {f"learned, {number} meta-epochs": f"lstm-mnist-relu-{number}" for number in SNAPSHOTS}
    return {"learned, 3000 meta-epochs": "lstm-mnist-relu", **names}


class EpochsExperiment(Curves):
    """Figures 4 to 6 of the study."""

    name = "epochs"
    title = "MNIST with ReLU after 10, 200 and 3000 meta-epochs: the study's figures 4, 5 and 6"
    panels = (
        Panel("relu_epochs", "MNIST, 784-20-10 ReLU, 100 steps", MNISTMLP([20], "relu"), 100, _epoch_rules()),
    )

    def findings(self, losses: dict[str, dict[str, Tensor]]) -> tuple[list[Finding], list[str]]:
        """What more meta-training brings; the study's own figures cannot be MNIST."""
        found = losses["relu_epochs"]
        findings = []
        for label in sorted(_epoch_rules(), key=lambda label: int(label.split()[1])):
            text = against_all(found, label)
            word = "Not reproduced" if text.startswith("not") else "Better"
            if "3000" not in label:
                word = "New"
            findings.append(
                Finding(
                    f"ReLU @100, {label}",
                    "below 1e-20 (*)",
                    "–",
                    str(final(found[label])),
                    f"{word}: {text}.",
                )
            )
        notes = [
            "(*) The study's figures 4 to 6 fall to 1e-20 and below. A cross-entropy on ever new minibatches "
            "of MNIST cannot: the figures begin like its quadratic and are probably mislabelled. A "
            "meta-epoch is a rollout of 100 steps here."
        ]
        return findings, notes


class TransferExperiment(Curves):
    """Figure 7 of the study, and the paper's transfer in the other direction."""

    name = "relu-to-sigmoid"
    title = "Transfer between activations: the study's figure 7, and the paper's sigmoid to ReLU"
    panels = (
        Panel(
            "relu_to_sigmoid",
            "Trained on ReLU, applied to sigmoid, 100 steps",
            MNISTMLP(),
            100,
            {"trained on ReLU": "lstm-mnist-relu", "trained on the mixture": "lstm-mnist-mixture"},
        ),
        Panel(
            "sigmoid_to_relu",
            "Trained on sigmoid, applied to ReLU, 100 steps",
            MNISTMLP([20], "relu"),
            100,
            {"trained on sigmoid": "lstm-mnist", "trained on the mixture": "lstm-mnist-mixture"},
        ),
    )

    def findings(self, losses: dict[str, dict[str, Tensor]]) -> tuple[list[Finding], list[str]]:
        """The study stayed at chance; the paper's rule stayed flat."""
        there, back = losses["relu_to_sigmoid"], losses["sigmoid_to_relu"]

        def finding(what: str, study: str, paper: str, found: dict[str, Tensor], rule: str) -> Finding:
            word = "Better" if final(found[rule]).mean < 0.9 * float(found[rule][0].mean()) else "Reproduced"
            text = (
                f"{word} than chance: {against_all(found, rule)}."
                if word == "Better"
                else (f"Reproduced: it fails; {against_all(found, rule)}.")
            )
            return Finding(what, study, paper, str(final(found[rule])), text)

        findings = [
            finding("ReLU → sigmoid @100", "10^0.355 = 2.26, chance", "–", there, "trained on ReLU"),
            finding("mixture → sigmoid @100", "–", "–", there, "trained on the mixture"),
            finding("sigmoid → ReLU @100", "–", "2.5, flat", back, "trained on sigmoid"),
            finding("mixture → ReLU @100", "–", "–", back, "trained on the mixture"),
        ]
        return findings, []
