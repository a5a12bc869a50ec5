"""Every command and every example in the README runs."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image

from l2l_lightning import ComparisonSettings
from l2l_lightning.cli import main
from l2l_lightning.comparison.statistics import Interval, student_t_quantile

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TINY = [
    "--data.num_rollouts=1",
    "--model.horizon=2",
    "--model.unroll=2",
    "--model.num_tasks=2",
    "--model.num_validation_optimizees=2",
    "--trainer.enable_progress_bar=false",
    "--trainer.accelerator=cpu",
    "--comparison.num_optimizees=2",
    "--comparison.num_tuning_optimizees=2",
    "--comparison.baselines=[sgd]",
    "--wandb=off",
]


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands():
    lines = [line.partition("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    prefix = "python -m l2l_lightning "
    return sorted({line.removeprefix(prefix) for line in lines if line.startswith(prefix)})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    main(["fit", "--config=mnist", *TINY, "--model.task.batch_size=2", f"--trainer.default_root_dir={root}"])
    (path,) = root.glob("*/*/checkpoints/last.ckpt")
    return path


# FOLDER stands for a full MNIST, which a fresh machine does not have; ddp would start these tests once more
# (lightning/test_devices.py runs what the README says of several processes).
SLOW = re.compile(r"^reproduce|corrected_|zero_shot")
NOT_HERE = re.compile(r"FOLDER --|--data-root FOLDER|--trainer.strategy ddp")


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, marks=pytest.mark.slow if SLOW.search(command) else ())
        for command in commands()
        if not NOT_HERE.search(command)
    ],
)
def test_the_readmes_commands_run(command, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_problem.py").write_text(next(b for b in blocks("python") if "# my_problem.py" in b))
    if "smiles" in command:
        make_smiles(tmp_path / "smiles")
        command = command.replace("FOLDER", str(tmp_path / "smiles"))
    if command.endswith("--data.root FOLDER"):
        command = command.removesuffix("--data.root FOLDER")
    arguments = shlex.split(command.replace("CHECKPOINT", str(checkpoint)).replace("FOLDER", str(tmp_path)))
    tiny = {"info": [], "reproduce": ["--quick", "--num-tuning-optimizees=1"]}.get(arguments[0], TINY)
    main([*arguments, *tiny])
    assert capsys.readouterr().out


def make_smiles(folder):
    """Two folders of images: one bright, one dark."""
    for name, grey in (("non_smile", 40), ("smile", 200)):
        (folder / name).mkdir(parents=True)
        for index in range(6):
            Image.new("L", (30, 34), grey + index).save(folder / name / f"{index}.png")


def executed(words):
    """The variables that the README's one Python example with these words leaves."""
    (example,) = (block for block in blocks("python") if words in block)
    variables = {}
    torch.manual_seed(0)
    exec(example, variables)
    return variables


def test_the_readmes_python_runs(tmp_path, monkeypatch):
    """With a comparison of a few optimizees and one baseline in place of the default's."""
    monkeypatch.chdir(tmp_path)
    tiny = ComparisonSettings(num_optimizees=2, num_tuning_optimizees=1, baselines=["sgd"])
    monkeypatch.setattr("l2l_lightning.training.trainer.ComparisonSettings", lambda: tiny)
    assert "learned" in executed("MetaLearner")["comparison"].results


def test_the_readmes_trained_rule_runs():
    variables = executed('load("lstm-mnist")')
    assert variables["losses"].shape == (100, 4)
    assert variables["known"]["headline"]["optimizers"]["learned"]["diverged"] == 0


def test_the_readmes_training_loop_runs():
    variables = executed("losses.append")
    assert len(variables["losses"]) == 100
    assert sum(variables["losses"][-10:]) < 0.3 * sum(variables["losses"][:10])
    assert variables["optimizer"].state_bytes == 12 * 15_910


def test_the_readme_names_every_preset():
    from l2l_lightning.cli import presets

    assert all(f"`{name}`" in README for name in presets())


def meta_steps(document):
    for row in document["rows"]:
        ratios = [row["ratio"][name] for name in ("jax", "plain", "autograd")]
        yield [row["threads"], row["unroll"], f"{row['ms']['ours']:.0f} ms", *(f"{r:.2f}" for r in ratios)]


def held_to_avx2(document):
    for row in document["rows"]:
        ratios = [f"{row['ratio'][name]:.2f}" for name in ("jax", "plain", "autograd")]
        yield [row["threads"], f"{row['ms']['ours']:.0f} ms", *ratios]


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
        ("meta_step_cpu_avx2", held_to_avx2, 2),
        ("cells_cpu", cells, 5),
    ],
)
def test_the_readmes_tables_are_the_committed_results(file, table, count):
    document = json.loads((ROOT / f"benchmarks/results/{file}.json").read_text())
    rows = list(table(document))
    assert len(rows) == count
    for cells in rows:
        assert f"| {' | '.join(map(str, cells))} |" in README
    assert document["origin"]["commit"] in README


REPRODUCTION = ROOT / "benchmarks/results/reproduction"


def test_the_readmes_findings_are_the_reports_and_its_are_the_committed_results():
    report = (REPRODUCTION / "REPORT.md").read_text(encoding="utf-8")
    rows = [
        line for line in README.splitlines() if re.match(r"\| (mnist|generalise|epochs|quadratic) \|", line)
    ]
    assert len(rows) > 10
    assert all(row in report for row in rows)
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in REPRODUCTION.glob("*/results.json")]
    assert len(documents) == 7
    for document in documents:
        assert document["commit"] in report
        for finding in document["findings"]:
            assert f"| {finding['ours']} | {finding['verdict']} |" in report
        for picture in document["pictures"]:
            assert (REPRODUCTION / document["experiment"] / picture).is_file()


def test_the_readmes_first_table_is_the_suites():
    document = json.loads((ROOT / "benchmarks/results/zero_shot.json").read_text())
    found = document["results"]["comparisons"]["zero-shot"]
    table = [line for line in README.splitlines() if re.search(r"\] \| \d+ of \d+ \|$", line)][:8]
    peers = ("best of three", "best of three on test data", "adamw", "adamw-cosine", "muon")
    for line, peer in zip(table, (*peers, "prodigy-cosine", "schedule-free", "adamw-0.001"), strict=True):
        low, high = found[peer]["ci95_over_problems"]
        ratio = f"{found[peer]['geometric_mean']:.3f}"
        cells = f"| {ratio} [{low:.3f}, {high:.3f}] | {found[peer]['ahead']} of {found[peer]['problems']} |"
        assert cells in line.replace("**", "")
    assert document["commit"][:7] in README
    steps = {name: problem["steps"] for name, problem in document["results"]["problems"].items()}
    for longer, words in ((False, "Up to 600 steps the first row is"), (True, "800 to 10,000 steps it is")):
        ratios = [r for p, r in found["best of three"]["by_problem"].items() if (steps[p] > 600) is longer]
        ahead = f"{sum(ratio < 1 for ratio in ratios)} of {len(ratios)}"
        assert re.search(rf"{words}\s{ratio_of(ratios)}, {ahead}", README)
    others = [r for p, r in found["muon"]["by_problem"].items() if p not in ("sine, 500", "sine, 3000")]
    assert f"the ratio to it is {ratio_of(others).replace(chr(92), '')}" in README


def ratio_of(ratios):
    """A geometric mean with its 95% interval, as a pattern."""
    logs = torch.tensor(ratios, dtype=torch.float64).log()
    half = student_t_quantile(len(logs) - 1) * logs.std() / len(logs) ** 0.5
    mean, low, high = (x.exp().item() for x in (logs.mean(), logs.mean() - half, logs.mean() + half))
    return rf"{mean:.3f} \[{low:.3f}, {high:.3f}\]"


def test_the_readmes_mnist_table_is_the_reports():
    document = json.loads((REPRODUCTION / "mnist/results.json").read_text(encoding="utf-8"))
    for numbers in document["results"]["mnist_100"]["optimizers"].values():
        values = (numbers[key] for key in ("final_loss", "sum_loss"))
        final, total = (Interval(value["mean"], *value["ci95"]) for value in values)
        assert f" | {final} | {total} | " in README
    assert document["commit"] in README
