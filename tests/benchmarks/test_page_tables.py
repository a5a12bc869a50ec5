"""The tables of README and docs are the committed results': benchmarks/tables.py would change none."""

import json
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import measuring
import tables

ROOT = Path(__file__).resolve().parents[2]
PERFORMANCE = (ROOT / "docs/performance.md").read_text(encoding="utf-8")


def test_writing_the_tables_changes_no_page(capsys):
    tables.main(["--check"])
    assert "nothing changes" in capsys.readouterr().out


def test_every_table_is_on_a_page():
    places = {
        place for page in tables.pages() for place in re.findall(r"<!-- table: (\S+) -->", page.read_text())
    }
    assert places == tables.TABLES.keys()


def test_a_number_that_was_changed_by_hand_is_told_and_set_right():
    page = ROOT / "docs/zero-shot.md"
    text = page.read_text(encoding="utf-8")
    (ratio,) = set(re.findall(r"\*\*0\.(\d+)\*\*", text))
    assert tables.with_tables(text.replace(f"**0.{ratio}**", "**0.001**")) == text


def test_an_unknown_table_is_told_with_those_there_are():
    with pytest.raises(ValueError, match=r"there is no table 'speed': the tables are .*zero-shot-step"):
        tables.with_tables("<!-- table: speed -->\n<!-- end -->")


def test_a_changed_result_is_told(tmp_path, monkeypatch):
    results = tmp_path / "results"
    for name in {source.file for source in tables.TABLES.values()}:
        for path in tables.RESULTS.glob(name.replace("{}", "*")):
            copy = results / path.relative_to(tables.RESULTS)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    monkeypatch.setattr(tables, "RESULTS", results)
    document = json.loads((results / "cells_cpu.json").read_text())
    document["origin"]["commit"] = "0123456"
    (results / "cells_cpu.json").write_text(json.dumps(document))
    with pytest.raises(SystemExit, match=r"docs/performance\.md$"):
        tables.main(["--check"])


def test_a_table_is_printed_in_columns(capsys):
    measuring.print_table(measuring.Table(["what", "ms"], [["a step", 1.5], ["b", ""]]))
    assert capsys.readouterr().out == "what     ms\na step  1.5\nb\n"


def meta_steps(document):
    for row in document["rows"]:
        ratios = [row["ratio"][name] for name in ("jax", "plain", "autograd")]
        yield [row["threads"], row["unroll"], f"{row['ms']['ours']:.0f} ms", *(f"{r:.2f}" for r in ratios)]


def large_optimizees(document):
    ways = {}
    for row in document["rows"]:
        memory = row["held_mib" if row["computed"] else "working_mib"]
        seconds = f"{row['seconds']:{'.2g' if row['seconds'] < 100 else '.0f'}}"
        cell = f"{memory:,.0f} MiB, {seconds} s"
        ways.setdefault(row["name"], []).append(f"*{cell}*" if row["computed"] else cell)
    for name, cells in ways.items():
        yield [name, *cells]


def optimizer_steps(document):
    for name, row in document["rows"].items():
        cells = [f"{row['ms']:.1f}", f"{row['ratio']:.2f}", f"{row['ns_per_coordinate']:.1f}"]
        yield [name, *cells, f"{row['state_bytes_per_coordinate']:.0f}"]


def two_processes(document):
    names = {"mnist": "MNIST", "quadratic": "quadratics", "zero-shot": "`zero-shot`"}
    for problem, name in names.items():
        rows = {row["name"]: row for row in document["rows"] if row["problem"] == problem}
        rates = [f"{rows[key]['meta_steps_per_s']:.3g}" for key in ("one", "one, all tasks", "ddp")]
        scaling = [f"{document['scaling'][problem][key]:.2f}" for key in ("weak", "strong")]
        communication = f"{100 * rows['ddp']['communication']:.1f}%"
        pairs = " antithetic pairs" if problem == "zero-shot" else ""
        yield [f"{name}, k = {rows['ddp']['num_tasks']}{pairs}", *rates, *scaling, communication]


def cells(document):
    rows, bound = {}, document["product_gflops"]
    for row in document["rows"]:
        kernels = (f"{row[f'{k}_ns']:.0f} ({row[f'{k}_gflops'] / bound:.0%})" for k in ("step", "bptt"))
        rows[row["units"], row["layers"], row["inputs"]] = ", ".join(kernels)
    for units in sorted({units for units, _, _ in rows}):
        yield [units, *(rows[units, layers, inputs] for layers, inputs in ((1, 1), (2, 2), (2, 32)))]


def zero_shot_steps(document):
    sizes = list(document["in_turns"].values())
    for name in sizes[0]:
        cells = (f"{s[name]['ms']:,.2f} ({s[name]['ratio']:,.2f})" if name in s else "" for s in sizes)
        yield [name, *cells]


@pytest.mark.parametrize(
    ("file", "table", "count"),
    [
        ("meta_step_cpu", meta_steps, 4),
        ("large_optimizees_cpu", large_optimizees, 6),
        ("optimizer_step_cpu", optimizer_steps, 5),
        ("devices_cpu", two_processes, 3),
        ("zero_shot_step_cpu", zero_shot_steps, 8),
        ("meta_step_cpu_avx2", meta_steps, 2),
        ("cells_cpu", cells, 5),
    ],
)
def test_the_tables_of_speed_are_the_committed_results(file, table, count):
    document = json.loads((ROOT / f"benchmarks/results/{file}.json").read_text())
    rows = list(table(document))
    assert len(rows) == count
    for row in rows:
        assert f"| {' | '.join(map(str, row))} |" in PERFORMANCE
    assert document["origin"]["commit"] in PERFORMANCE
