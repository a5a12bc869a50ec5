"""The table of cells: every size is timed, and its FLOPs are those of its products."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import cells


def test_every_cell_is_timed(tmp_path, monkeypatch):
    path = tmp_path / "cells.json"
    arguments = [
        "cells.py",
        "--device",
        "cpu",
        "--coordinates",
        "64",
        "--units",
        "4",
        "5",
        "--json",
        str(path),
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    cells.main()
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == len(cells.LAYERS) * 2 * len(cells.INPUTS)
    for row in rows:
        H, inputs = row["units"], row["inputs"]
        weights = 4 * H * (inputs + H) + (row["layers"] - 1) * 4 * H * 2 * H
        assert row["step_gflops"] * row["step_ns"] == pytest.approx(2 * (weights + H))
