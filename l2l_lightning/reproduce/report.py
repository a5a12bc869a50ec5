"""REPORT.md: every experiment's findings, from what the experiments left in their folders."""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

from l2l_lightning.comparison.report import csv_text
from l2l_lightning.files import write_atomically, write_json
from l2l_lightning.reproduce.experiment import Outcome, markdown_table


def write_experiment(head: dict[str, Any], outcome: Outcome, out: Path, seconds: float) -> None:
    """Writes an experiment's CSV, pictures and JSON, the JSON last: it says that the experiment is done.

    Args:
        head: What the JSON begins with: the experiment's name, its title, and the numbers' origin.
        outcome: What the experiment found.
        out: The folder of all experiments, and of the rules that were trained for them.
        seconds: How long it took.
    """
    folder = out / head["experiment"]
    write_atomically(folder / "results.csv", csv_text(outcome.columns, outcome.rows))
    for name, picture in outcome.pictures.items():
        write_atomically(folder / f"{name}.png", picture)
    found = {
        "seconds": round(seconds, 1),
        "rules_trained_here": sorted(path.parent.name for path in out.glob("rules/*/training.json")),
        "findings": [finding._asdict() for finding in outcome.findings],
        "results": outcome.results,
        "notes": outcome.notes,
        "tables": outcome.tables,
        "pictures": sorted(path.name for path in folder.glob("*.png")),
    }
    write_json(folder / "results.json", head | found)


def write_report(out: Path, order: list[str]) -> Path:
    """Writes REPORT.md from the results of every experiment that is there."""
    paths = [out / name / "results.json" for name in order]
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]
    lines = ["# Reproduction", ""]
    if any(document["quick"] for document in documents):
        lines += ["**A quick run: everything is tiny, and the figures mean nothing.**", ""]
    lines += [_origin(documents), "", _overview(documents)]
    for document in documents:
        lines += _section(document)
    methods = resources.files("l2l_lightning.reproduce").joinpath("methods.md")
    lines += ["", methods.read_text(encoding="utf-8")]
    path = out / "REPORT.md"
    write_atomically(path, "\n".join(lines).rstrip() + "\n")
    return path


FINDING_COLUMNS = ("experiment", "what", "study", "paper", "ours", "")
"""The heading of `finding_rows`."""


def finding_rows(documents: Iterable[dict[str, Any]]) -> list[list[str]]:
    """Returns a row of every finding in experiments' results.json, in their order, under FINDING_COLUMNS.

    Example:
        >>> finding = {"what": "x² @100", "study": "–", "paper": "0.1", "ours": "0.2", "verdict": "New: so."}
        >>> finding_rows([{"experiment": "quadratic", "findings": [finding]}])
        [['quadratic', 'x² @100', '–', '0.1', '0.2', 'New: so.']]
    """
    keys = ("what", "study", "paper", "ours", "verdict")
    return [
        [document["experiment"], *(finding[key] for key in keys)]
        for document in documents
        for finding in document["findings"]
    ]


def _origin(documents: list[dict[str, Any]]) -> str:
    def distinct(key: str) -> str:
        return ", ".join(sorted({str(document[key]) for document in documents}))

    data = sorted({source for document in documents for source in document["data"]})
    rules = "the package's" if all(d["from_pretrained"] for d in documents) else "trained for it"
    return (
        f"Seed {distinct('seed')}, commit {distinct('commit')}, {distinct('device')} with "
        f"{distinct('threads')} threads. Data: {'; '.join(data)}. Rules: {rules}."
    )


def _overview(documents: list[dict[str, Any]]) -> str:
    return markdown_table(FINDING_COLUMNS, finding_rows(documents))


def _section(document: dict[str, Any]) -> list[str]:
    name, seconds = document["experiment"], document["seconds"]
    duration = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
    lines = ["", f"## {document['title']}", "", f"`reproduce {name}`, {duration}.", ""]
    for paragraph in document["tables"] + document["notes"]:
        lines += [paragraph, ""]
    return lines + [
        f"![{picture.removesuffix('.png')}]({name}/{picture})" for picture in document["pictures"]
    ]
