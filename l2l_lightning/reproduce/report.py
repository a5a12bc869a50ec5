"""REPORT.md: every experiment's findings, from what the experiments left in their folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from l2l_lightning.files import write_atomically, write_json
from l2l_lightning.reproduce.bench import Bench
from l2l_lightning.reproduce.experiment import Experiment, Outcome, csv_text

METHODS = """\
## Methods

**Splits.** Rules are meta-trained on the first 50,000 MNIST images. Checkpoints are chosen, and baselines
tuned, on the last 10,000 training images. All figures are of fresh optimizees on the 10,000 test images.
(The subset that the package ships has 4,000, 1,000 and 1,000.) The three never share an image.

**Seeds.** An optimizee is one seed: its θ0 and its minibatches come from a generator that is derived from
(seed of the run, stream, index), so that all optimizers of a comparison see the same ones. The streams of
meta-training, validation, tuning and test are different.

**Baselines.** SGD, momentum, NAG, RMSProp, Adam and AdamW. "Tuned": for each task and horizon, the learning
rate with the least final loss over 16 or more log-spaced rates, and over other momenta, α or β at the rates
around where their best must lie; while the best is at an edge the search goes on. The score is the mean
over the tuning optimizees; one that diverges makes it infinite. "One for all": what is best on the
reference task, 784-20-10 with sigmoids for 100 steps, used everywhere, as a learned rule is. "Default":
PyTorch's learning rates.

**Statistics.** The final loss is the mean of a rollout's last ten losses (of minibatches that the optimizee
has not been trained on at that time). Intervals are Student's at 95%, over optimizees. "Ahead, disjoint
intervals": the two means' intervals do not touch; "ahead, paired": they do, but the interval of the
difference, optimizee by optimizee, lies below 0. Ratios are of means, with the delta method's interval from
the paired residuals. A run diverges if a loss is not finite or its final loss lies above its first; it is
counted, and stays in the means.

**Weights.** A rule is the best checkpoint by the validation optimizees' sum of losses; the test optimizees
were not looked at.
"""


def write_experiment(
    experiment: Experiment, outcome: Outcome, bench: Bench, folder: Path, seconds: float
) -> None:
    """Writes an experiment's CSV, pictures and JSON, the JSON last: it says that the experiment is done."""
    write_atomically(folder / "results.csv", csv_text(outcome.columns, outcome.rows))
    for name, picture in outcome.pictures.items():
        write_atomically(folder / f"{name}.png", picture)
    trained = sorted({path.parent.name for path in (bench.out / "rules").glob("*/training.json")})
    document: dict[str, Any] = {
        "experiment": experiment.name,
        "title": experiment.title,
        **bench.provenance(experiment.data(bench)),
        "seconds": round(seconds, 1),
        "rules_trained_here": trained,
        "findings": [vars(finding) for finding in outcome.findings],
        "results": outcome.results,
        "notes": outcome.notes,
        "tables": outcome.tables,
        "pictures": sorted(path.name for path in folder.glob("*.png")),
    }
    write_json(folder / "results.json", document)


def write_report(out: Path, order: list[str]) -> Path:
    """Writes REPORT.md from the results of every experiment that is there."""
    documents = []
    for name in order:
        path = out / name / "results.json"
        if path.is_file():
            documents.append(json.loads(path.read_text(encoding="utf-8")))
    lines = ["# Reproduction", ""]
    if any(document["quick"] for document in documents):
        lines += ["**A quick run: everything is tiny, and the figures mean nothing.**", ""]
    lines += [_origin(documents), "", *_overview(documents)]
    for document in documents:
        lines += _section(document)
    lines += ["", METHODS]
    path = out / "REPORT.md"
    write_atomically(path, "\n".join(lines).rstrip() + "\n")
    return path


def _origin(documents: list[dict[str, Any]]) -> str:
    def distinct(key: str) -> str:
        return ", ".join(sorted({str(document[key]) for document in documents}))

    data = sorted({source for document in documents for source in document["data"]})
    rules = "the package's" if all(d["from_pretrained"] for d in documents) else "trained for it"
    return (
        f"Seed {distinct('seed')}, commit {distinct('commit')}, {distinct('device')} with "
        f"{distinct('threads')} threads. Data: {'; '.join(data)}. Rules: {rules}."
    )


def _overview(documents: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| experiment | what | study | paper | ours | |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for document in documents:
        for finding in document["findings"]:
            cells = (finding[key] for key in ("what", "study", "paper", "ours", "verdict"))
            lines.append(f"| {document['experiment']} | {' | '.join(cells)} |")
    return lines


def _section(document: dict[str, Any]) -> list[str]:
    name = document["experiment"]
    lines = ["", f"## {document['title']}", "", f"`reproduce {name}`, {_duration(document['seconds'])}.", ""]
    for table in document["tables"]:
        lines += [table, ""]
    for note in document["notes"]:
        lines += [note, ""]
    lines += [f"![{picture.removesuffix('.png')}]({name}/{picture})" for picture in document["pictures"]]
    return lines


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
