"""The paper's convolutional experiment (section 3.3): CIFAR-10, and colour images that need no download."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from l2l_lightning import pretrained
from l2l_lightning.errors import WeightsError
from l2l_lightning.reproduce.curves import Panel, Row, panel_outcome, panel_requests
from l2l_lightning.reproduce.experiment import Experiment, Finding, Outcome
from l2l_lightning.reproduce.recipes import HELD_OUT_LABELS, LABELS
from l2l_lightning.reproduce.result_store import Request, ResultStore
from l2l_lightning.tasks import ImageConvNet

NUM_OPTIMIZEES = 10
"""The test optimizees of every panel."""

PAPER = "on CIFAR-10: ahead of ADAM, RMSprop, SGD and NAG"
DEEPMIND = "LSTM, DeepMind's settings"


class _Images(NamedTuple):
    """A data set that the experiment is run on."""

    dataset: str
    title: str
    task: dict[str, Any]
    """`ImageConvNet`'s arguments, as the rules' presets have them."""


COLOUR_DIGITS = _Images("colour-digits", "Colour digits, 16×16", {"shrink": 2, "batch_size": 32})
CIFAR = _Images("cifar10", "CIFAR-10", {})

QUICK_TASK = {"channels": [2, 2, 2], "hidden_sizes": [4], "batch_size": 4, "shrink": 8}
"""`ImageConvNet`'s arguments where everything is to be tiny."""

NOTE = (
    "Colour digits are not CIFAR-10: only the order of the curves can be held against the paper's figure 7. "
    "LSTM-sub was trained on nothing but the labels that the panels of 5 and 2 leave out, "
    f"{', '.join(map(str, HELD_OUT_LABELS))}. It and the LSTM went on from the rule of the mixture of "
    "perceptrons on MNIST, which is shown as it was. With DeepMind's settings (k = 5, scale 0.01, windows of "
    "20, rate 0.001) φ was drawn, and trained on as many rollouts as the others; DeepMind's takes 10,000."
)


def _missing(store: ResultStore) -> str | None:
    """Says why CIFAR-10 is not measured; None if it can be."""
    if store.cifar_root is None:
        return "give --cifar-root FOLDER, which holds cifar-10-batches-py"
    if store.settings.from_pretrained:
        try:
            pretrained.load(f"lstm-{CIFAR.dataset}")
        except WeightsError:
            return "the package has no rule that was trained on it: leave out --from-pretrained"
    return None


def _panels(store: ResultStore) -> dict[str, Panel]:
    panels = {}
    for images in (COLOUR_DIGITS,) if _missing(store) else (COLOUR_DIGITS, CIFAR):
        name = f"lstm-{images.dataset}"
        rules = {"LSTM": name, DEEPMIND: f"{name}-deepmind"}
        rules |= {"LSTM of MNIST's perceptrons": "lstm-mnist-mixture", "zero-shot": "zero-shot"}
        for count, labels in LABELS.items():
            arguments = QUICK_TASK if store.settings.quick else images.task
            panels[f"{images.dataset}-{count}"] = Panel(
                f"{images.title}, {_words(labels)}",
                ImageConvNet(images.dataset, classes=labels, **arguments),
                rules if labels is None else rules | {"LSTM-sub": f"{name}-sub"},
                num_optimizees=NUM_OPTIMIZEES,
            )
    return panels


def _words(labels: tuple[int, ...] | None) -> str:
    return "all labels" if labels is None else f"the labels {', '.join(map(str, labels))}"


def _rows(panels: Mapping[str, Panel]) -> list[Row]:
    """The lines of the report: the rules that were trained for the experiment, panel by panel."""
    rows = []
    for key, panel in panels.items():
        # Only CIFAR-10 can tell whether the paper's figure reproduces.
        is_theirs = key.startswith(CIFAR.dataset)
        words = ("Reproduced: ", "Not reproduced: ") if is_theirs else ("New: ", "New: ")
        for rule in ("LSTM", "LSTM-sub", DEEPMIND):
            if rule in panel.rules:
                what, paper = f"{panel.title}, {rule}", "–" if rule == DEEPMIND else PAPER
                ours = "{rule} ({best} {least})"
                row = Row(
                    key, f"{what} @100", rule, paper=paper, ours=ours, reached=words[0], missed=words[1]
                )
                rows.append(row)
                if rule != DEEPMIND:
                    rows.append(row._replace(what=f"{what}, sum of 100", aim="sum"))
    return rows


def _requests(store: ResultStore) -> dict[tuple[str, str], Request]:
    return panel_requests(_panels(store), store)


def _outcome(store: ResultStore, losses: Mapping[tuple[str, str], Tensor], folder: Path) -> Outcome:
    panels = _panels(store)
    outcome = panel_outcome(panels, _rows(panels), NOTE, store, losses, folder)
    if why := _missing(store):
        outcome.findings.append(Finding(CIFAR.title, "–", PAPER, "not measured", f"Not measured: {why}."))
    return outcome


CIFAR_EXPERIMENT = Experiment(
    "Convolutional networks, with an LSTM for the convolutions and one for the rest: the paper's figure 7",
    _requests,
    _outcome,
    in_all=False,
)
"""Rules on all labels, and on labels that only some of them have been trained on."""
