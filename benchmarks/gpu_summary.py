"""What a run of gpu_suite.sh has found, in at most 60 lines: of each stage what decides.

python benchmarks/gpu_summary.py FOLDER
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MOST_LINES = 60


def kernel_rows(document: dict[str, Any], most: int) -> Iterator[str]:
    """The fused kernels' times and shares of the device's bounds; what failed first, then the fastest."""
    bounds = document["bounds"]
    yield f"copy {bounds['copy_gb_per_s']:.0f} GB/s; TFLOP/s {bounds['tflops']}"
    rows = sorted(document["rows"], key=lambda row: ("ms" in row, row["kernel"], row.get("ms_per_1e9", 0.0)))
    for row in rows[:most]:
        launched = [row["kernel"], f"N={row['N']}", row["state_dtype"], row["precision"]]
        launched += [f"{row['block']}/{row['num_warps']}"]
        launched += [f"maxnreg {row['max_registers']}"] if row.get("max_registers") else []
        launched += ["lanes"] if row.get("lanes") else []
        launched += ["2 launches"] if row.get("launches") == 2 else []
        if "ms" not in row:
            yield f"  {' '.join(launched)}: {row.get('failure') or 'disagrees'}"[:110]
            continue
        shares = f"{row['share_of_copy']:.0%} of copy, {row['share_of_matrix_rate']:.0%} of matrix rate"
        met = {None: "", True: ", met", False: ", MISSED"}[row.get("meets_target")]
        yield f"  {' '.join(launched)}: {row['ms_per_1e9']:.0f} ms per 1e9, {shares}{met}"


def optimizer_rows(document: dict[str, Any]) -> Iterator[str]:
    """The default optimizer's step beside AdamW's."""
    for size, rows in document["in_turns"].items():
        ratios = (f"{name} {row['ms']:.3f} ms ({row['ratio']:.2f})" for name, row in rows.items())
        yield f"  {size}: {', '.join(ratios)}"


def meta_step_rows(document: dict[str, Any]) -> Iterator[str]:
    """Meta-steps beside the peers'."""
    for row in document["rows"]:
        yield f"  T={row['unroll']}: ms {row['ms']}, ratios {row['ratio']}, met {row['meets_target']}"
        yield from (f"    {name} failed: {why}" for name, why in row["failures"].items())


def tests_rows(document: dict[str, Any]) -> Iterator[str]:
    """How the tests went, and which failed."""
    yield f"  {document['counts']} in {document['seconds']:.0f} s"
    bad = [test["test"] for test in document["tests"] if test["outcome"] not in ("passed", "skipped")]
    yield from (f"  {name}"[:110] for name in bad[:8])


def quality_rows(document: dict[str, Any]) -> Iterator[str]:
    """When meta-training was ahead of tuned Adam."""
    curve = document["curve"]
    last = f", {curve[-1]['sum_of_losses']} at the end" if curve else ""
    reached, plain = document["reached_s"], document["plain_s"]
    adam = f"  tuned Adam {document['adam']['sum_of_losses']:.4g}"
    yield f"{adam}; reached after {reached} s (plain {plain} s){last}"


SECTIONS = {
    "kernel_throughput": lambda document: kernel_rows(document, 18),
    "optimizer_step": optimizer_rows,
    "tests": tests_rows,
    "meta_step": meta_step_rows,
    "kernel_sweep": lambda document: kernel_rows(document, 10),
    "time_to_quality": quality_rows,
}


def summary(folder: Path) -> Iterator[str]:
    """The lines of all stages that have left something."""
    for name, lines in SECTIONS.items():
        path = folder / f"gpu_{name}.json"
        if not path.is_file():
            yield f"{name}: nothing was left"
            continue
        yield f"{name}:"
        try:
            yield from lines(json.loads(path.read_text(encoding="utf-8")))
        except (KeyError, ValueError, TypeError) as error:  # a stage that was cut short has not got so far
            yield f"  not to be read: {type(error).__name__}: {error}"


def main() -> None:
    """Prints the summary of a folder."""
    lines = list(summary(Path(sys.argv[1])))
    print("\n".join(lines[:MOST_LINES]))


if __name__ == "__main__":
    main()
