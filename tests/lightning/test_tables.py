"""Tables on terminals of any width: every number whole, and no line too long."""

import itertools
import random
import re

import pytest
import torch
from rich.console import Console

from l2l_lightning.comparison.baselines import BASELINES, Trial, TunedBaseline
from l2l_lightning.comparison.result import Comparison, Result
from l2l_lightning.console import make_console
from l2l_lightning.tables import Column, FittingTable
from l2l_lightning.training.trainer import tuning_table

COLUMNS = [
    Column("optimizer"),
    Column("final loss", is_number=True),
    Column("sum of losses", is_number=True),
    Column("diverged", is_number=True, spare=1),
    Column("learning rate", is_number=True),
    Column("setting", spare=3),
    Column("seconds", is_number=True, spare=2),
    Column("learned − it", is_number=True),
    Column("lead"),
]
ROWS = [
    ["learned", "0.2712 ± 0.0067", "49.81 ± 0.49", "0", "", "", "0.161", "", ""],
    *(
        [
            *(name, f"0.29{i}2 ± 0.0071", f"52.8{i} ± 0.53", "0", f"0.0{i}2", f"momentum 0.9{i}", "0.163"),
            *(f"-0.021{i} ± 0.0083", "paired / clear"),
        ]
        for i, name in enumerate(["sgd", "momentum", "adam"])
    ),
]
HEADLINE = (1, 2, 4, 7)
"""Positions of the numbers that no width leaves out."""
WIDTHS = (40, 60, 80, 100, 120, 140)


def numbers(text):
    return re.findall(r"-?\d[\d.e+-]*", text)


def table(rows=ROWS, **options):
    return FittingTable("MNISTMLP(hidden_sizes=[20]), 100 steps", COLUMNS, rows, **options)


@pytest.mark.parametrize("width", WIDTHS)
def test_every_number_is_whole_at_every_width(width):
    text = table().text(width)
    assert "…" not in text
    assert all(len(line) <= width for line in text.splitlines())
    for row in ROWS:
        for place in HEADLINE:
            assert row[place] in text
        assert row[0] in text
    known = {number for row in ROWS for cell in row for number in numbers(cell)} | set(numbers(table().title))
    assert set(numbers(text)) <= known  # no part of a number stands alone


def shown(text):
    """The columns that a table has."""
    words = " ".join(text.split())
    return [column.name for column in COLUMNS[1:] if column.name.split()[-1] in words]


def test_columns_are_left_out_in_their_order_and_then_words_are_spread():
    spared = [column for column in COLUMNS if column.spare]
    assert [c.name for c in sorted(spared, key=lambda c: c.spare)] == ["diverged", "seconds", "setting"]
    natural = 60 + 3 * 30  # where all of it fits
    at = {width: shown(table().text(width)) for width in range(60, natural + 1, 3)}
    everything = [column.name for column in COLUMNS[1:]]
    assert at[natural] == everything
    assert "diverged" not in at[129]
    for narrow, wide in itertools.pairwise(sorted(at)):
        assert set(at[narrow]) <= set(at[wide])
    assert at[60] == [column.name for column in COLUMNS[1:] if not column.spare]
    # The table of the default terminal is one, with a row for each optimizer.
    lines = table().text(80).splitlines()
    assert sum(line.startswith(("learned", "sgd", "momentum", "adam")) for line in lines) == 4
    assert any("0.2712 ± 0.0067" in line and "49.81 ± 0.49" in line for line in lines)


def test_a_wide_terminal_gets_a_row_for_each_optimizer_in_the_given_form():
    lines = [line for line in table().text(140).splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines]
    assert cells == ROWS


@pytest.mark.parametrize("seed", range(30))
def test_any_table_at_any_width(seed):
    draw = random.Random(seed)
    count = draw.randint(1, 8)
    columns = [
        Column(
            draw.choice(["x", "a longer name", "nom[bold]"]) + str(i),
            draw.random() < 0.6,
            draw.choice([0, 0, i]),
        )
        for i in range(count)
    ]
    rows = [
        [
            draw.choice(["", f"{draw.gauss(0, 10 ** draw.randint(-3, 5)):.4g}", "some words here"])
            for _ in columns
        ]
        for _ in range(draw.randint(0, 5))
    ]
    kept = [place for place, column in enumerate(columns) if not column.spare or not place]
    for width in (30, 40, 80, 200):
        text = FittingTable("title", columns, rows).text(width)
        assert all(len(line) <= width for line in text.splitlines())
        for row in rows:
            assert all(number in text for place in kept for number in numbers(row[place]))


def test_names_are_not_taken_for_markup_and_html_is_escaped():
    odd = FittingTable("[red]f<T>", [Column("[b]name"), Column("loss", True)], [["[x]<b>", "1 ± 2"]], {0})
    assert "[red]f<T>" in odd.text(80)
    assert "[b]name" in odd.text(80)
    assert "[x]<b>" in odd.text(80)
    html = odd._repr_html_()
    assert "[x]&lt;b&gt;" in html
    assert "[red]f&lt;T&gt;" in html
    assert re.search(r'<td style="text-align: right; font-weight: bold">1 ± 2</td>', html)
    assert "<b>" not in html


def test_it_fits_the_console_that_prints_it():
    console = Console(width=60)
    with console.capture() as capture:
        console.print(table())
    assert max(map(len, capture.get().splitlines())) <= 60
    assert "-0.0210 ± 0.0083" in capture.get()


LONG = "an_optimizer_of_mine_with_a_name_that_is_long"
TASK = "MNISTMLP(hidden_sizes=[20, 20, 20], activation=sigmoid, batch_size=128, init_std=0.01)"


def a_comparison(names):
    """Of losses from tiny to huge, and infinite ones."""
    generator = torch.Generator().manual_seed(0)
    sizes = (1e-9, 1.0, 1.034648867e9, torch.inf)
    results = {
        name: Result(
            torch.rand(12, 5, generator=generator, dtype=torch.float64) * sizes[place % 4], 123456.7, 0.00123
        )
        for place, name in enumerate(names)
    }
    fields = {"task": TASK, "horizon": 12345, "num_optimizees": 5, "data_source": "none", "seed": 0}
    return Comparison(**fields, device="a processor", dtype="float32", results=results)


def a_tuned(baseline, score):
    setting = baseline.settings[-1]
    trials = tuple(Trial(setting, rate, score) for rate in (1e-7, 123456.0))
    return TunedBaseline(baseline, 1e-7, setting, trials)


def every_table():
    yield a_comparison(["learned", *BASELINES]).table()
    yield a_comparison(["learned", *(f"{LONG}_{i}" for i in range(4))]).table()
    yield tuning_table([a_tuned(baseline, 1.0346e9) for baseline in BASELINES.values()], TASK)
    yield tuning_table([a_tuned(baseline, 1.2e-9) for baseline in BASELINES.values()], TASK)


@pytest.mark.parametrize("shown", list(every_table()), ids=["baselines", "long names", "large", "small"])
def test_every_printed_table_fits_80_columns_without_a_terminal(shown, capsys):
    make_console().print(shown)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert "…" not in printed
    kept = [place for place, column in enumerate(shown.columns) if column.is_number and not column.spare]
    for row in shown.rows:
        assert all(row[place] in printed for place in kept)
