"""Neural art, section 3.4 of the paper: one style to train on, then other pictures, styles and sizes."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from l2l_lightning.comparison.plots import png
from l2l_lightning.reproduce.art_pictures import Strip, in_a_palette, pictures_figure, styled
from l2l_lightning.reproduce.art_tasks import HORIZON, SIZE, style_task
from l2l_lightning.reproduce.curves import Panel, Row, panel_outcome, panel_requests
from l2l_lightning.reproduce.experiment import Experiment, Outcome
from l2l_lightning.reproduce.result_store import Request, ResultStore
from l2l_lightning.reproduce.settings import Settings

RULES = {"learned": "lstm-art", "zero-shot": "zero-shot"}
"""The rules' names, by their names in the legend."""

BASELINES = ("sgd", "nag", "rmsprop", "adam")
"""The paper's, which are tuned on the styles of their panel at the size that the rule is trained at."""

SHOWN = (*RULES, "adam")
"""Whose pictures are shown."""

PAPER = "LSTM ahead of ADAM, RMSprop, SGD and NAG (figure 8; other network and pictures)"

NOTE = (
    "The paper's curves are of VGG and ImageNet's pictures: its losses are no figures to compare with, its "
    "order is. Baselines are tuned on validation contents at 64×64, for the trained and for the new styles, "
    "and keep their settings at 128×128, where the gradient in a pixel has the same size."
)


@functools.cache
def _panels(settings: Settings) -> dict[str, Panel]:
    """Both kinds of style at both sizes; at twice the size, of four times the work, fewer contents."""
    panels = {}
    for size, count in ((SIZE, 16), (2 * SIZE, 8)):
        for key, words, new in (("style", "the style trained on", False), ("new_styles", "new styles", True)):
            panels[f"{key}_{size}"] = Panel(
                f"Neural art, {words} at {size}×{size}",
                style_task(settings, new=new, size=size),
                RULES,
                HORIZON,
                count,
                baselines=BASELINES,
                tuned_on=style_task(settings, new=new, size=SIZE),
            )
    return panels


def _rows(panels: Mapping[str, Panel]) -> list[Row]:
    shown = "learned {learned}, zero-shot {zero-shot}, Adam {adam}"
    rows = []
    for key, panel in panels.items():
        row = Row(key, panel.title.removeprefix("Neural art, "), ours=shown, paper=PAPER)
        # The paper shows its own style at 64×64 and a new one at 128×128.
        if key in (f"new_styles_{SIZE}", f"style_{2 * SIZE}"):
            row = row._replace(paper="–", reached="New: ", missed="New: ")
        rows.append(row)
    return rows


def _requests(store: ResultStore) -> dict[tuple[str, str], Request]:
    return panel_requests(_panels(store.settings), store)


def _outcome(store: ResultStore, losses: Mapping[tuple[str, str], Tensor], folder: Path) -> Outcome:
    """Makes what every panel gives, and the pictures of a content in each of them."""
    panels = _panels(store.settings)
    outcome = panel_outcome(panels, _rows(panels), NOTE, store, losses, folder)
    requests = panel_requests(panels, store)
    strips = []
    for key, panel in panels.items():
        store.report(f"pictures of {panel.title}")
        content, style, results = styled(store, {name: requests[key, name] for name in SHOWN})
        title = panel.title.removeprefix("Neural art, ").replace(" at ", "\n")
        strips.append(Strip(title, {"content": content, "style": style, **results}))
    outcome.pictures["pictures"] = in_a_palette(png(pictures_figure(strips), dpi=72))
    return outcome


ART = Experiment("Neural art: the paper's figures 8 and 9 (section 3.4)", _requests, _outcome, in_all=False)
"""A rule that is trained on one style, against tuned baselines on others and at twice the resolution."""
