"""The tables of losses: one function for each question, from the JSON of a comparison to its rows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from measuring import Table

from l2l_lightning.comparison.baselines import setting_text
from l2l_lightning.comparison.statistics import Interval

Document = dict[str, Any]

FIRST = "best of three"
"""The strongest peer of the suite: of AdamW, AdamW with cosine and NAG, the best of each problem."""
PEERS = {
    FIRST: "the best of AdamW, AdamW with warm-up and cosine, and NAG, each tuned",
    "best of three on test data": "the same three, the best by the very losses that are reported",
    "adamw": "AdamW, tuned",
    "adamw-cosine": "AdamW with warm-up and cosine, tuned",
    "muon": "Muon, tuned",
    "prodigy-cosine": "Prodigy with cosine, untuned",
    "schedule-free": "Schedule-Free AdamW, untuned",
    "adamw-0.001": "AdamW at 10⁻³, untuned",
}
ALL_PEERS = {
    "adamw-betas": "AdamW, its β tuned too",
    "nag": "NAG, tuned",
    "prodigy": "Prodigy, untuned",
    "dog": "DoG, untuned",
    "lstm-mnist-mixture": "`lstm-mnist-mixture`, untuned",
}
SHORT = {
    FIRST: "against the best of three, tuned",
    "adamw-cosine": "AdamW with cosine, tuned",
    "muon": "Muon, tuned",
}
"""The strongest peers, for tables that have a column of each."""
LONG = 600
"""The suite's problems of more steps than these are called long."""


def interval(value: dict[str, Any]) -> Interval:
    """Reads {"mean", "ci95"}, with null for what is not finite."""
    return Interval(*(math.nan if x is None else x for x in (value["mean"], *value["ci95"])))


def ratio(mean: float, low: float, high: float) -> str:
    """A ratio and its interval: "0.849 [0.770, 0.937]"."""
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def ratio_over(ratios: Iterable[float]) -> str:
    """The geometric mean of ratios, with its 95% interval over them, and how many are below 1."""
    values = torch.tensor(list(ratios), dtype=torch.float64)
    ahead = int((values < 1).sum())
    return f"{ratio(*(math.exp(x) for x in Interval.of(values.log())))}, {ahead} of {len(values)}"


def zero_shot(document: Document) -> Table:
    """How far is `zero-shot`, of which nothing is tuned, ahead of other optimizers?"""
    return _beside(document, "zero-shot", PEERS)


def zero_shot_others(document: Document) -> Table:
    """The same for the peers that `zero_shot` leaves out."""
    return _beside(document, "zero-shot", ALL_PEERS)


def _beside(document: Document, rule: str, peers: dict[str, str]) -> Table:
    found = document["results"]["comparisons"][rule]
    rows = []
    for peer, words in peers.items():
        numbers = found[peer]
        text = ratio(numbers["geometric_mean"], *numbers["ci95_over_problems"])
        if peer == FIRST:
            first, _, rest = text.partition(" ")
            text = f"**{first}** {rest}"
        rows.append([words, text, f"{numbers['ahead']} of {numbers['problems']}"])
    return Table([f"`{rule}`, nothing tuned, against", "ratio of losses", "ahead"], rows)


def zero_shot_rules(document: Document) -> Table:
    """How do the rules that need no tuning compare?"""
    rows = []
    for rule, found in document["results"]["comparisons"].items():
        numbers = [found[peer] for peer in SHORT]
        ratios = (ratio(n["geometric_mean"], *n["ci95_over_problems"]) for n in numbers)
        cells = (f"{r}, {n['ahead']} of {n['problems']}" for r, n in zip(ratios, numbers, strict=True))
        rows.append([f"`{rule}`", *cells])
    return Table(["rule", *SHORT.values()], rows)


def zero_shot_by_steps(document: Document) -> Table:
    """Where is `zero-shot` ahead: on short runs or on long ones?"""
    results = document["results"]
    steps = {name: problem["steps"] for name, problem in results["problems"].items()}
    rows = []
    for longer in (False, True):
        names = [name for name in steps if (steps[name] > LONG) is longer]
        lengths = [steps[name] for name in names]
        ratios = (results["comparisons"]["zero-shot"][peer]["by_problem"] for peer in SHORT)
        cells = (ratio_over(by_problem[name] for name in names) for by_problem in ratios)
        rows.append([f"{min(lengths):,} to {max(lengths):,}", *cells])
    return Table(["steps", *SHORT.values()], rows)


def zero_shot_behind(document: Document) -> Table:
    """On which problems is `zero-shot` behind the best of three by more than 10%?"""
    ratios = document["results"]["comparisons"]["zero-shot"][FIRST]["by_problem"]
    behind = sorted(((value, name) for name, value in ratios.items() if value > 1.1), reverse=True)
    return Table(["problem, steps", "ratio of losses"], [[name, f"{value:.2f}"] for value, name in behind])


def decay_fit(document: Document) -> Table:
    """How much lower are losses if the decay of the weights follows their gain and the horizon?"""
    chosen = document["changes"]
    gains, horizons = (
        sorted({t[name] for t in document["tried"] if name in t}) for name in ("log gain", "log T")
    )
    rows = []
    for gain in gains:
        row = [f"{gain:g}"]
        for horizon in horizons:
            wanted = {**chosen, "log gain": gain, "log T": horizon}
            (found,) = (t for t in document["tried"] if wanted.items() <= t.items())
            text = f"{found['families']:.3f}, {found['endless']:.3f}"
            row.append(f"**{text}**" if wanted == chosen else text)
        rows.append(row)
    return Table(["power of the gain", *(f"of the horizon: {horizon:g}" for horizon in horizons)], rows)


def comparison(document: Document) -> Table:
    """How does the learned optimizer compare with tuned baselines, in the final loss and in the sum?"""
    optimizers = document["optimizers"]
    measures = ("final_loss", "sum_loss")
    learned = {measure: interval(optimizers["learned"][measure]) for measure in measures}
    columns = ["optimizer", "final loss", "sum of losses", "diverged", "learning rate"]
    rows = []
    for name, found in sorted(optimizers.items(), key=lambda item: item[1]["final_loss"]["mean"]):
        ours = name == "learned"
        values = {measure: interval(found[measure]) for measure in measures}
        standings = (standing(learned[measure], values[measure]) for measure in measures)
        rate = f"{found['learning_rate']:g}" if found.get("learning_rate") else ""
        setting = setting_text(found.get("setting") or {})
        cells = [f"**{name}**" if ours else name, *values.values(), found["diverged"]]
        cells += [f"{rate} ({setting})" if setting else rate, "" if ours else " / ".join(standings)]
        rows.append(cells)
    return Table([*columns, "learned against it"], rows)


PANELS = {
    "colour-digits-10": "all ten labels",
    "colour-digits-5": "2, 3, 4, 5, 6",
    "colour-digits-2": "8, 9",
    "style_64": "its style, 64×64",
    "new_styles_64": "new styles, 64×64",
    "style_128": "its style, 128×128",
    "new_styles_128": "new styles, 128×128",
}
"""The columns of `panels`, by the panels' names."""


def panels(document: Document) -> Table:
    """What final losses do rules and tuned baselines reach in every panel of an experiment?"""
    results = document["results"]
    found = {key: panel["optimizers"] for key, panel in results.items()}
    names = dict.fromkeys(name for optimizers in found.values() for name in optimizers)
    first, *_ = found.values()

    def rank(name: str) -> float:
        mean = interval(first[name]["final_loss"]).mean if name in first else math.nan
        return mean if math.isfinite(mean) else math.inf

    rows = []
    for name in sorted(names, key=rank):
        is_rule = any("rule" in optimizers.get(name, {}) for optimizers in found.values())
        cells = (_final(optimizers.get(name)) for optimizers in found.values())
        rows.append([f"**{name}**" if is_rule else name, *cells])
    return Table(["final loss", *(PANELS[key] for key in found)], rows)


def _final(optimizer: Document | None) -> str:
    """A final loss; of one that is not finite, how many diverged; "" of an optimizer that is not there."""
    if optimizer is None:
        return ""
    value = interval(optimizer["final_loss"])
    if math.isfinite(value.mean):
        return str(value)
    return f"{optimizer['diverged']} of {optimizer['num_optimizees']} diverged"


def standing(ours: Interval, theirs: Interval) -> str:
    """Says where a lower loss lies: "ahead" or "behind" only where the two 95% intervals are disjoint."""
    return "ahead" if ours.high < theirs.low else "behind" if ours.low > theirs.high else "level"


def mnist(document: Document) -> Table:
    """The same on all of MNIST, for 100 steps."""
    return comparison(document["results"]["mnist_100"])


def findings(documents: list[Document]) -> Table:
    """What of the study and the paper was reproduced?"""
    # Here: it needs rich, and the GPU suite, which prints other tables, does without.
    from l2l_lightning.reproduce.report import FINDING_COLUMNS, finding_rows

    return Table(FINDING_COLUMNS, finding_rows(documents))


def corrections(document: Document) -> Table:
    """What does an LSTM on top of `zero-shot` gain, as ratios of held-out losses?"""
    found: dict[str, list[str]] = {}
    for row in document["rows"]:
        text = ratio(row["geometric_mean"], *row["ci95_over_problems"])
        ahead = f"{row['ahead']} of {len(row['by_problem'])}"
        found.setdefault(f"`{row['rule']}`", []).extend([text, ahead])
    columns = ["rule", "in distribution", "ahead", "out of distribution", "ahead"]
    return Table(columns, [[rule, *cells] for rule, cells in found.items()])


def training(document: Document) -> Table:
    """What does a larger training reach with learned rules, and with AdamW?"""
    reference = next(iter(document["optimizers"]))
    rows = [
        [
            name,
            interval(numbers["held_out_loss"]),
            interval(numbers["held_out_accuracy"]),
            "" if name == reference else interval(numbers["loss_minus_adamw"]),
            f"{numbers['setting']['lr']:g}, {numbers['setting']['weight_decay']:g}",
            len(numbers["tuning"]["trials"]),
            f"{numbers['seconds_per_step']:.2g}",
            f"{numbers['cpu_seconds_per_step']:.2g}",
            f"{numbers['state_bytes'] / document['parameters']:.1f}",
        ]
        for name, numbers in document["optimizers"].items()
    ]
    columns = ["optimizer", "held-out loss", "accuracy", "minus AdamW's loss", "lr, weight decay", "tried"]
    return Table([*columns, "s / step", "CPU s / step", "state B / parameter"], rows)


def time_to_quality(document: Document) -> Table:
    """How long does meta-training take until it is ahead of tuned Adam, and how long does plain unrolling?"""
    reached, plain = document["reached_s"], document["plain_s"]
    columns = ["tuned Adam's sum of losses", "reached after", "meta-steps", "plain unrolling", "ratio"]
    adam = f"{document['adam']['sum_of_losses']:.1f}"
    if not reached:
        return Table(columns, [[adam, "not reached", "", "", ""]])
    steps = next(p["meta_step"] for p in document["curve"] if p["seconds"] == reached)
    ratio_ = f"{plain / reached:.1f}"
    return Table(columns, [[adam, f"{reached:.0f} s", steps, f"{plain:.0f} s", ratio_]])
