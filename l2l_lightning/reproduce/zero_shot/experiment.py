"""`reproduce zero-shot`: the rule that needs no tuning beside what its user would otherwise take."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import Tensor

from l2l_lightning.comparison.plots import heatmap_figure, png
from l2l_lightning.errors import ReproductionError
from l2l_lightning.reproduce.experiment import Experiment, Finding, Outcome, markdown_table
from l2l_lightning.reproduce.result_store import Request, ResultStore
from l2l_lightning.reproduce.zero_shot.peers import BEST_OF, PEERS
from l2l_lightning.reproduce.zero_shot.problem import PROBLEMS, QUICK, make_problem
from l2l_lightning.reproduce.zero_shot.published import origins, published
from l2l_lightning.reproduce.zero_shot.ratios import WORSE, Comparison
from l2l_lightning.reproduce.zero_shot.store import Effort, Entry, Store
from l2l_lightning.reproduce.zero_shot.suite import complete, one_thread

NUM_SEEDS, NUM_TUNING_SEEDS = 5, 2
QUICK_PROTOCOL = {"max_steps": 60, "max_rates": 3}

BEST_VALIDATED = "best of three"
"""The optimizer of BEST_OF that did best on a problem's validation data: what a user would have chosen."""
BEST_TESTED = "best of three on test data"
"""The one of BEST_OF whose test losses are the least, which nobody can know beforehand."""

TARGETS = {BEST_VALIDATED: 0.80, "muon": 0.95, "best untuned": 0.75}
"""The geometric means of ratios that the rule is meant to reach."""
MATRIX_TARGET = 34
"""Cells of the matrix within 10% of the best of three."""

Entries = dict[str, dict[str, Entry]]
"""By peer, then by problem."""


def chosen(registry: Sequence[str], patterns: Sequence[str], option: str) -> list[str]:
    """Returns the names that match one of the patterns (`*`, `?`), in the registry's order; all without one.

    Raises:
        ReproductionError: A pattern matches none.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in registry):
            raise ReproductionError(f"{option} {pattern!r} matches none of {', '.join(registry)}")
    return [name for name in registry if not patterns or any(fnmatchcase(name, p) for p in patterns)]


def protocol(seed: int, quick: bool) -> Effort:
    """Returns the seeds of a suite; no two seeds of suites have one in common."""
    tuning, reported = (1, 2) if quick else (NUM_TUNING_SEEDS, NUM_SEEDS)
    first = 1000 * seed
    limits = QUICK_PROTOCOL if quick else {}
    return Effort(
        tuple(range(first + 500, first + 500 + tuning)), tuple(range(first, first + reported)), **limits
    )


def _requests(store: ResultStore) -> dict[Any, Request]:
    """Asks for nothing: the suite keeps entries of its own."""
    _names(store)
    return {}


def _names(store: ResultStore) -> tuple[list[str], list[str]]:
    settings = store.settings
    candidates = QUICK if settings.quick and not settings.problems else list(PROBLEMS)
    return (
        chosen(candidates, settings.problems, "--problems"),
        chosen(list(PEERS), settings.peers, "--peers"),
    )


def _outcome(store: ResultStore, losses: Mapping[Any, Tensor], folder: Path) -> Outcome:
    problems, peers = _names(store)
    settings = store.settings
    known = published() if settings.from_pretrained else {}
    results = Store(folder / "entries", protocol(settings.seed, settings.quick), known)
    jobs = [(problem, peer) for problem in problems for peer in peers]
    with one_thread():
        complete(results, jobs, settings.workers, store.report)
        entries: Entries = {peer: {name: results.entry(name, peer) for name in problems} for peer in peers}
    outcome = summarise(entries)
    if taken := [digest for job in jobs if (digest := results.taken(*job))]:
        note = (
            f"{len(taken)} of {len(jobs)} results are the package's own, of earlier runs: {origins(taken)}."
        )
        outcome.notes.append(note)
    return outcome


def summarise(entries: Entries) -> Outcome:
    """Makes findings, tables and a picture of all entries."""
    bars = _bars(entries)
    comparisons = {
        name: {bar: Comparison.of(entries[name], others) for bar, others in bars.items()}
        for name in entries
        if PEERS[name].ours and bars
    }
    some = next(iter(entries.values()))
    results = {
        "problems": {
            name: {"family": entry.family, "steps": entry.steps, "data": make_problem(name).data}
            for name, entry in some.items()
        },
        "comparisons": {
            name: {bar: comparison.as_json() for bar, comparison in found.items()}
            for name, found in comparisons.items()
        },
        "cpu_seconds": {
            name: round(sum(entry.seconds for entry in found.values()), 1) for name, found in entries.items()
        },
    }
    columns = ("problem", "family", "steps", "optimizer", "setting", "seed", "first_loss", "test_loss")
    rows = [
        [name, entry.family, entry.steps, peer, _setting(entry), seed, first, "" if loss is None else loss]
        for peer, found in entries.items()
        for name, entry in found.items()
        for seed, first, loss in zip(entry.seeds, entry.first, entry.test, strict=True)
    ]
    tables = [_comparison_table(name, found) for name, found in comparisons.items()]
    tables += [_family_table(name, found) for name, found in comparisons.items()]
    findings = [finding for name, found in comparisons.items() for finding in _findings(name, found)]
    return Outcome(
        *(findings, results, columns, rows, _pictures(entries, bars), [*tables, _problem_table(entries)]),
        [
            "A seed is an initialisation and an order of minibatches, the same for all optimizers; rates and "
            "settings were chosen on validation data and on other seeds. Losses are held out, after the last "
            "step; ratios are paired by seed, their means geometric. A run that diverged (not finite, or "
            "above ten times the first loss) counts as ten times the first loss, a loss below 1e-8 as 1e-8. "
            "Intervals are at 95%, over problems in the tables; results.json has those over seeds too."
        ],
    )


def _bars(entries: Entries) -> dict[str, dict[str, Entry]]:
    """Returns what ours is compared with: the best of three, then every peer."""
    peers = {name: found for name, found in entries.items() if not PEERS[name].ours}
    three = [peers[name] for name in BEST_OF if name in peers]
    bars: dict[str, dict[str, Entry]] = {}
    if len(three) == len(BEST_OF):
        for name, key in ((BEST_VALIDATED, _validation), (BEST_TESTED, _test)):
            bars[name] = {problem: min((found[problem] for found in three), key=key) for problem in three[0]}
    return bars | peers


def _validation(entry: Entry) -> float:
    return math.inf if entry.validation is None else entry.validation


def _test(entry: Entry) -> float:
    return statistics.geometric_mean(entry.losses)


def _findings(name: str, comparisons: Mapping[str, Comparison]) -> list[Finding]:
    untuned = [bar for bar in comparisons if bar in PEERS and not PEERS[bar].tuned]
    found = {
        bar: (bar, comparisons[bar]) for bar in (BEST_VALIDATED, BEST_TESTED, "muon") if bar in comparisons
    }
    if untuned:
        strongest = max(untuned, key=lambda bar: comparisons[bar].ratio.mean)
        found["best untuned"] = (f"best untuned, {strongest}", comparisons[strongest])
    findings = []
    for target, (label, comparison) in found.items():
        ours = (
            f"{comparison.ratio}; ahead in {comparison.wins} of {len(comparison.by_problem)}; worse by more "
            f"than 10% in {len(comparison.losses)}; {comparison.diverged} runs diverged"
        )
        worst = f"worst {comparison.by_problem[comparison.worst]:.2f} ({comparison.worst})"
        aim = f", aim {TARGETS[target]:.2f} " if target in TARGETS else ""
        if aim:
            aim += "reached" if comparison.ratio.mean <= TARGETS[target] else "missed"
        findings.append(Finding(f"{name} / {label}", "–", "–", ours, f"New{aim}: {worst}."))
    if BEST_VALIDATED in comparisons:
        cells = [r for p, r in comparisons[BEST_VALIDATED].by_problem.items() if p.startswith("matrix: ")]
        within = sum(ratio <= WORSE for ratio in cells)
        if cells:
            text = f"{within} of {len(cells)} cells of the matrix within 10% of the best of three"
            findings.append(Finding(name, "–", "–", text, f"New: aim {MATRIX_TARGET} of 36."))
    return findings


def _comparison_table(name: str, comparisons: Mapping[str, Comparison]) -> str:
    rows = [
        [
            *(bar, comparison.ratio, f"{comparison.balanced:.3f}"),
            f"{comparison.wins} of {len(comparison.by_problem)}",
            f"{len(comparison.losses)}",
            f"{comparison.by_problem[comparison.worst]:.2f} ({comparison.worst})",
        ]
        for bar, comparison in comparisons.items()
    ]
    head = ["against", "ratio of losses", "each family once", "ahead", "worse by > 10%", "worst"]
    return f"**{name}**\n\n{markdown_table(head, rows)}"


def _family_table(name: str, comparisons: Mapping[str, Comparison]) -> str:
    families = next(iter(comparisons.values())).by_family
    rows = [[family, *(c.by_family[family] for c in comparisons.values())] for family in families]
    return f"**{name}**, by family\n\n{markdown_table(['family', *comparisons], rows)}"


def _setting(entry: Entry) -> str:
    return " ".join(f"{key}={value:g}" for key, value in entry.chosen.items())


def _problem_table(entries: Entries) -> str:
    def text(entry: Entry) -> str:
        lost = f" [{entry.diverged}/{len(entry.seeds)}]" if entry.diverged else ""
        rate = f" ({', '.join(f'{value:g}' for value in entry.chosen.values())})" if entry.chosen else ""
        return f"{_test(entry):.3g}{rate}{lost}"

    problems = list(next(iter(entries.values())))
    rows = [[problem, *(text(found[problem]) for found in entries.values())] for problem in problems]
    return (
        "Test losses (geometric means over seeds), the rate and setting in parentheses, diverged runs in "
        f"brackets\n\n{markdown_table(['problem', *entries], rows)}"
    )


def _pictures(entries: Entries, bars: Mapping[str, dict[str, Entry]]) -> dict[str, bytes]:
    """Draws every optimizer's ratio to the best of three by family."""
    if BEST_VALIDATED not in bars:
        return {}
    found = {name: Comparison.of(values, bars[BEST_VALIDATED]) for name, values in entries.items()}
    families = list(next(iter(found.values())).by_family)
    picture = heatmap_figure(
        [[comparison.by_family[family].mean for comparison in found.values()] for family in families],
        families,
        list(found),
        "Held-out loss as a multiple of the best of AdamW, AdamW-cosine and NAG, each tuned on every problem",
        "ratio",
        middle=1.0,
    )
    return {"families": png(picture)}


ZERO_SHOT = Experiment(
    "Zero-shot: nothing tuned, beside optimizers that were tuned on every problem or need no tuning",
    _requests,
    _outcome,
    keeps_its_own=True,
    in_all=False,
)
"""Problems of many kinds × optimizers, as ratios of held-out losses."""
