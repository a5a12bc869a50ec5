"""Writes the tables of README.md and docs/ from the committed results, between their markers.

    python benchmarks/tables.py            # rewrites the pages whose results have changed
    python benchmarks/tables.py --check    # writes nothing; fails if a page would change

A page has a table between the lines "<!-- table: NAME -->" and "<!-- end -->"; under it follows where its
numbers come from, as the JSON says: file, machine, versions, commit.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import quality_tables
import speed_tables
from measuring import Table
from speed_tables import counted

from l2l_lightning.reproduce.experiment import markdown_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PLACE = re.compile(r"(?P<start><!-- table: (?P<name>[\w-]+) -->\n).*?(?P<end><!-- end -->)", re.DOTALL)
EXPERIMENTS = (
    *("quadratic", "mnist", "epochs", "relu-to-sigmoid", "graph", "preprocessing", "generalise"),
    *("cifar", "art"),
)


class Source(NamedTuple):
    """Where a table's numbers are, and what makes rows of them."""

    file: str
    """Relative to the results; {} stands for every experiment of the reproduction."""
    table: Callable[[Any], Table]


TABLES = {
    "zero-shot": Source("zero_shot.json", quality_tables.zero_shot),
    "zero-shot-others": Source("zero_shot.json", quality_tables.zero_shot_others),
    "zero-shot-rules": Source("zero_shot.json", quality_tables.zero_shot_rules),
    "zero-shot-by-steps": Source("zero_shot.json", quality_tables.zero_shot_by_steps),
    "zero-shot-decay": Source("zero_shot_decay.json", quality_tables.decay_fit),
    "zero-shot-behind": Source("zero_shot.json", quality_tables.zero_shot_behind),
    "corrections": Source("corrections.json", quality_tables.corrections),
    "training-resnet": Source("training/resnet/results.json", quality_tables.training),
    "training-transformer": Source("training/transformer/results.json", quality_tables.training),
    "quadratic": Source("quadratic_summary.json", quality_tables.comparison),
    "mnist": Source("reproduction/mnist/results.json", quality_tables.mnist),
    "cifar": Source("reproduction/cifar/results.json", quality_tables.panels),
    "art": Source("reproduction/art/results.json", quality_tables.panels),
    "findings": Source("reproduction/{}/results.json", quality_tables.findings),
    "time-to-quality": Source("time_to_quality_cpu.json", quality_tables.time_to_quality),
    "meta-step": Source("meta_step_cpu.json", speed_tables.meta_step),
    "meta-step-memory": Source("meta_step_cpu.json", speed_tables.meta_step_memory),
    "meta-step-avx2": Source("meta_step_cpu_avx2.json", speed_tables.meta_step),
    "scaling-kernels": Source("meta_step_cpu.json", speed_tables.scaling_kernels),
    "scaling-meta-step": Source("meta_step_cpu.json", speed_tables.scaling_meta_step),
    "cells": Source("cells_cpu.json", speed_tables.cells),
    "processes": Source("devices_cpu.json", speed_tables.processes),
    "optimizer-step": Source("optimizer_step_cpu.json", speed_tables.optimizer_step),
    "zero-shot-step": Source("zero_shot_step_cpu.json", speed_tables.zero_shot_step),
    "large-optimizees": Source("large_optimizees_cpu.json", speed_tables.large_optimizees),
    "growth": Source("endurance_cpu.json", speed_tables.growth),
    "rounded-products": Source("product_precision.json", speed_tables.rounded_products),
    "rounded-kernels": Source("rounded_products_cpu.json", speed_tables.rounded_kernels),
    "rounded-meta-steps": Source("rounded_products_cpu.json", speed_tables.rounded_meta_steps),
    "rounded-meta-gradients": Source("rounded_products_cpu.json", speed_tables.rounded_meta_gradients),
    "rounded-quality": Source("rounded_products_cpu.json", speed_tables.rounded_quality),
    "rounded-training": Source("rounded_training_cpu.json", speed_tables.rounded_training),
    "spills": Source("compile_report.json", speed_tables.spills),
    "spills-oldest-triton": Source("compile_report_triton_3.6.json", speed_tables.spills),
    "alternatives": Source("compile_alternatives.json", speed_tables.alternatives),
}


def rendered(name: str) -> str:
    """Returns a table in Markdown, with a line that says where its numbers come from.

    Raises:
        ValueError: There is no table of this name.
    """
    if name not in TABLES:
        raise ValueError(f"there is no table {name!r}: the tables are {', '.join(sorted(TABLES))}")
    file, make = TABLES[name]
    names = [file.format(experiment) for experiment in (EXPERIMENTS if "{}" in file else [""])]
    documents = [json.loads((RESULTS / one).read_text(encoding="utf-8")) for one in names]
    table = make(documents if "{}" in file else documents[0])
    path = file.replace("{}", "*")
    source = "; ".join(dict.fromkeys(origin(document) for document in documents))
    return f"{markdown_table(table.columns, table.rows)}\n\n`benchmarks/results/{path}`: {source}.\n"


def origin(document: dict[str, Any]) -> str:
    """Says of a result what it depends on, as far as the file does.

    Example:
        >>> origin({"origin": {"device": "Intel(R) Xeon(R) Processor", "cores": 2, "commit": "0874c6d"}})
        'Intel Xeon Processor, 2 cores, commit 0874c6d'
    """
    found = document | document.get("origin", {})
    found |= found.get("versions", {})
    if "commit" in found:
        commit, *dirty = str(found["commit"]).split("-")
        found["commit"] = "-".join([commit[:7], *dirty])
    found |= {what: counted(found[what], what[:-1]) for what in ("cores", "threads") if what in found}
    names = {"torch": "torch ", "triton": "Triton ", "jax": "JAX ", "seed": "seed ", "commit": "commit "}
    keys = ("device", "instruction_set", "cores", "threads", *names)
    texts = (f"{names.get(key, '')}{found[key]}" for key in keys if found.get(key) is not None)
    return ", ".join(texts).replace("(R)", "")


def with_tables(text: str) -> str:
    """Returns a page's text with every table between markers made anew."""
    return PLACE.sub(lambda place: f"{place['start']}\n{rendered(place['name'])}\n{place['end']}", text)


def pages() -> Iterator[Path]:
    """Yields what may have tables."""
    yield ROOT / "README.md"
    yield from sorted((ROOT / "docs").rglob("*.md"))


def main(arguments: list[str] | None = None) -> None:
    """Rewrites the pages, or says which would change."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page would change")
    check = parser.parse_args(arguments).check
    changed = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if (made := with_tables(text)) != text:
            changed.append(str(page.relative_to(ROOT)))
            if not check:
                page.write_text(made, encoding="utf-8")
    if check and changed:
        raise SystemExit(f"not the committed results' (python benchmarks/tables.py): {', '.join(changed)}")
    print("\n".join(changed) or "nothing changes")


if __name__ == "__main__":
    main()
