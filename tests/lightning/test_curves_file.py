"""curves.csv, written and read; what is damaged or something else is refused in one line."""

import math

import pytest
import torch

from l2l_lightning.comparison.curves_file import COLUMNS, csv_text, curves_text, loss_rows, read_curves
from l2l_lightning.errors import L2LError, ResultsError

LOSSES = {
    "learned": torch.rand(7, 3, generator=torch.Generator().manual_seed(0)).double(),
    "adam, with a comma": torch.tensor([[1.0, math.inf], [math.nan, 0.5]], dtype=torch.float64),
}


def test_what_was_written_is_read(tmp_path):
    path = tmp_path / "curves.csv"
    path.write_text(curves_text("Quadratic(dim=10, variant=paper)", LOSSES), encoding="utf-8")
    curves = read_curves(path)
    assert curves.task == "Quadratic(dim=10, variant=paper)"
    assert list(curves.losses) == list(LOSSES)
    for name, losses in LOSSES.items():
        found = curves.losses[name]
        assert found.dtype == torch.float64
        assert torch.allclose(found, losses, rtol=1e-8, atol=0, equal_nan=True)
        assert torch.equal(found.isfinite(), losses.isfinite())


def test_one_panel_of_several_is_read(tmp_path):
    path = tmp_path / "results.csv"
    rows = [
        row
        for panel in ("a", "b")
        for row in loss_rows([panel, f"task {panel}", "adam"], LOSSES["learned"] * len(panel))
    ]
    path.write_text(csv_text(("panel", *COLUMNS), rows), encoding="utf-8")
    assert read_curves(path, "b").task == "task b"
    with pytest.raises(ResultsError, match=r"a second loss of adam.*--panel: a, b"):
        read_curves(path)
    with pytest.raises(ResultsError, match="no panel c: choose from a, b"):
        read_curves(path, "c")


GOOD = curves_text("task", LOSSES).splitlines(keepends=True)
DAMAGED = {
    "empty": ("", "its first line has no column optimizer"),
    "a head alone": (GOOD[0], "holds no losses"),
    "another table": ("a,b\n1,2\n", "no column optimizer, seed, step, loss"),
    "cut in a line": ("".join(GOOD)[:-9], "line 26 has 2 of 5 cells"),
    "cut after a line": ("".join(GOOD[:-1]), "adam, with a comma has no loss of seed 1, step 1"),
    "a line less": ("".join(GOOD[:5] + GOOD[6:]), "learned has no loss of seed 0, step 4"),
    "a line twice": (
        "".join([*GOOD, GOOD[-1]]),
        "line 27 is a second loss of adam, with a comma, seed 1, step 1",
    ),
    "no number": (
        "".join(GOOD[:-1]) + "task,adam,1,1,low\n",
        "line 26 has 1, 1, low for seed, step and loss",
    ),
    "begins late": ("".join([GOOD[0], *GOOD[8:15]]), "learned begins with seed 1, step 0"),
    "another field": (GOOD[0] + "x" * 200_000 + "\n", "field larger than field limit"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_what_is_damaged_is_refused_in_one_line(damage, tmp_path):
    text, said = DAMAGED[damage]
    path = tmp_path / "curves.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ResultsError) as refused:
        read_curves(path)
    assert str(refused.value).startswith(f"{path} is not a file of curves, or is damaged: ")
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_is_no_text_or_no_file_is_refused_in_one_line(tmp_path):
    path = tmp_path / "curves.csv"
    path.write_bytes(b"\xff\xfe\x00" * 100)
    with pytest.raises(ResultsError, match="not text in UTF-8"):
        read_curves(path)
    with pytest.raises(L2LError, match="there is no file"):
        read_curves(tmp_path / "nothing.csv")
    with pytest.raises(L2LError, match="cannot be read: Is a directory"):
        read_curves(tmp_path)
