"""What README.md and the pages of docs/ say runs, is linked, and is what the committed results say.

Every `python` block runs, the blocks of a page in order and in one namespace, as in a notebook; one that
begins with "# NAME.py" is that file. Every command of a `bash` block runs with tiny sizes, or is of a kind
that is named below. What is not to be run is a `console` or `text` block.
"""

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image

from l2l_lightning import ComparisonSettings
from l2l_lightning.cli import main, presets
from l2l_lightning.comparison.statistics import Interval, student_t_quantile
from l2l_lightning.pretrained import names

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
}
README, MOST_LINES = "README.md", 150
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
COMMAND = "python -m l2l_lightning "


def blocks(text, *languages):
    return re.findall(rf"^```(?:{'|'.join(languages)})\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def lines_of(block):
    """The commands of a bash block, without comments; a heading says that it is a whole script."""
    if block.startswith("#!"):
        return []
    lines = (line.partition(" #")[0].strip() for line in block.replace("\\\n", " ").splitlines())
    return [line for line in lines if line]


def commands():
    found = {line for text in PAGES.values() for block in blocks(text, "bash") for line in lines_of(block)}
    return sorted(found)


# FOLDER stands for a full MNIST, which a fresh machine does not have; ddp would start these tests once more
# (lightning/test_devices.py runs what docs/clusters.md says of several processes).
SLOW = re.compile(r"^reproduce|corrected_|zero_shot")
NOT_HERE = re.compile(r"FOLDER --|--data-root FOLDER|--trainer.strategy ddp")
ELSEWHERE = re.compile(
    r"pip install -e '?\.|pytest|ruff |mkdocs |TORCH_DISABLE|python (?P<script>(docs|benchmarks)/[\w/]+\.py)"
)
"""Commands that install, that .ci/run runs, or whose scripts have tests of their own."""


@pytest.mark.parametrize("command", [c for c in commands() if not c.startswith(COMMAND)])
def test_any_other_command_is_of_a_known_kind(command):
    found = ELSEWHERE.match(command)
    assert found
    if script := found["script"]:
        text = (ROOT / script).read_text(encoding="utf-8")
        assert all(f'"{option}"' in text for option in re.findall(r"--[\w-]+", command))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    main(["fit", "--config=mnist", *TINY, "--model.task.batch_size=2", f"--trainer.default_root_dir={root}"])
    (path,) = root.glob("*/*/checkpoints/last.ckpt")
    return path


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, marks=pytest.mark.slow if SLOW.search(command) else ())
        for command in (c.removeprefix(COMMAND) for c in commands() if c.startswith(COMMAND))
        if not NOT_HERE.search(command)
    ],
)
def test_a_command_runs(command, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for text in PAGES.values():
        write_files(text, tmp_path)
    if "smiles" in command:
        make_smiles(tmp_path / "smiles")
        command = command.replace("FOLDER", str(tmp_path / "smiles"))
    if command.endswith("--data.root FOLDER"):
        command = command.removesuffix("--data.root FOLDER")
    arguments = shlex.split(command.replace("CHECKPOINT", str(checkpoint)).replace("FOLDER", str(tmp_path)))
    tiny = {"info": [], "reproduce": ["--quick", "--num-tuning-optimizees=1"]}.get(arguments[0], TINY)
    if "zero-shot" in arguments:
        tiny = [*tiny, "--problems", "logistic*"]
    main([*arguments, *tiny])
    assert capsys.readouterr().out


def write_files(text, folder):
    """Writes the blocks that are files, and returns the others."""
    others = []
    for block in blocks(text, "python"):
        if name := re.match(r"# (\w+\.py)\n", block):
            (folder / name[1]).write_text(block, encoding="utf-8")
        else:
            others.append(block)
    return others


def make_smiles(folder):
    """Two folders of images: one bright, one dark."""
    for name, grey in (("non_smile", 40), ("smile", 200)):
        (folder / name).mkdir(parents=True)
        for index in range(6):
            Image.new("L", (30, 34), grey + index).save(folder / name / f"{index}.png")


def a_loop_trains(variables):
    losses = variables["losses"]
    assert len(losses) == 100
    assert sum(losses[-10:]) < 0.3 * sum(losses[:10])
    assert variables["curves"].shape == (100, 4)
    assert variables["known"]["headline"]["optimizers"]["learned"]["diverged"] == 0


def a_run_is_compared(variables):
    assert "learned" in variables["comparison"].results
    trained, read = (variables[name].state_dict() for name in ("trained", "rule"))
    assert all(torch.equal(read[name], value) for name, value in trained.items())


def rules_and_tasks_are_ones_own(variables):
    assert variables["update"].shape == (5,)
    assert (variables["losses"][-1] < variables["losses"][0]).all()
    assert type(variables["rule"]).__name__ == "Grouped"


def statistics_are_as_printed(variables):
    assert str(variables["Interval"].of(variables["learned"])) == "4.8 ± 9.7"


def the_first_page_runs(variables):
    assert variables["loss"] < 2.0  # of random labels, from log 10 = 2.3
    assert variables["Momentum"]().phi.shape == (2,)


AFTER = {
    README: the_first_page_runs,
    "docs/use.md": a_loop_trains,
    "docs/meta-train.md": a_run_is_compared,
    "docs/extend.md": rules_and_tasks_are_ones_own,
    "docs/evaluation.md": statistics_are_as_printed,
}
"""What a page's variables are held to when its blocks have run."""


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if blocks(text, "python")])
def test_a_pages_python_runs(page, tmp_path, monkeypatch):
    """With a comparison of a few optimizees and one baseline in place of the default's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    tiny = ComparisonSettings(num_optimizees=2, num_tuning_optimizees=1, baselines=["sgd"])
    monkeypatch.setattr("l2l_lightning.training.trainer.ComparisonSettings", lambda: tiny)
    torch.manual_seed(0)
    variables = {"__name__": "page"}
    for block in write_files(PAGES[page], tmp_path):
        exec(compile(block, page, "exec"), variables)
    AFTER.get(page, lambda variables: None)(variables)


def test_every_page_whose_variables_are_checked_is_there():
    assert AFTER.keys() <= PAGES.keys()


def test_the_readme_is_short_and_names_what_a_newcomer_needs():
    assert len(PAGES[README].splitlines()) <= MOST_LINES
    for needed in (
        "git clone",
        "pip install -e '.[train]'",
        "python -m l2l_lightning fit",
        "total_steps=",
        "When it fails",
    ):
        assert needed in PAGES[README]


@pytest.mark.parametrize("page", PAGES)
def test_a_pages_links_lead_to_files(page):
    text = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    links = re.findall(r"\]\(([^()\s#]+)(?:#[^()]*)?\)", text)
    within = [link for link in links if not re.match(r"https?://", link)]
    assert all((ROOT / page).parent.joinpath(link).exists() for link in within), within


@pytest.mark.parametrize("repository", [None, "https://example.org/owner/name/"])
def test_on_a_package_index_the_readmes_links_are_absolute(repository):
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    setup_script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup_script)
    shown, relative = setup_script.long_description(repository), re.compile(r"\]\((?!https?://)")
    assert not relative.search(shown)
    absolute = re.findall(r"\]\(https://example.org/owner/name/(raw|blob)/HEAD/([^)#]+)", shown)
    assert len(absolute) == (len(relative.findall(PAGES[README])) if repository else 0)
    assert all((ROOT / path).exists() for _, path in absolute)


def test_every_preset_and_every_rule_is_named():
    assert all(f"`{name}`" in PAGES["docs/meta-train.md"] for name in presets())
    assert all(f"`{name}`" in PAGES["docs/which-rule.md"] for name in names())


REPRODUCTION = ROOT / "benchmarks/results/reproduction"


def test_the_findings_are_the_reports_and_its_are_the_committed_results():
    report = (REPRODUCTION / "REPORT.md").read_text(encoding="utf-8")
    rows = [
        line
        for line in PAGES["docs/reproduction.md"].splitlines()
        if re.match(r"\| (mnist|generalise|epochs|quadratic|cifar|art) \|", line)
    ]
    assert len(rows) > 10
    assert all(row in report for row in rows)
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in REPRODUCTION.glob("*/results.json")]
    assert len(documents) == 9
    for document in documents:
        assert document["commit"] in report
        for finding in document["findings"]:
            assert f"| {finding['ours']} | {finding['verdict']} |" in report
        for picture in document["pictures"]:
            assert (REPRODUCTION / document["experiment"] / picture).is_file()


@pytest.mark.parametrize("page", [README, "docs/zero-shot.md"])
def test_the_first_table_is_the_suites(page):
    document = json.loads((ROOT / "benchmarks/results/zero_shot.json").read_text())
    found = document["results"]["comparisons"]["zero-shot"]
    table = [line for line in PAGES[page].splitlines() if re.search(r"\] \| \d+ of \d+ \|$", line)][:8]
    peers = ("best of three", "best of three on test data", "adamw", "adamw-cosine", "muon")
    for line, peer in zip(table, (*peers, "prodigy-cosine", "schedule-free", "adamw-0.001"), strict=True):
        low, high = found[peer]["ci95_over_problems"]
        ratio = f"{found[peer]['geometric_mean']:.3f}"
        cells = f"| {ratio} [{low:.3f}, {high:.3f}] | {found[peer]['ahead']} of {found[peer]['problems']} |"
        assert cells in line.replace("**", "")
    assert document["commit"][:7] in PAGES[page]


def test_the_limits_in_words_are_the_suites():
    document = json.loads((ROOT / "benchmarks/results/zero_shot.json").read_text())
    found = document["results"]["comparisons"]["zero-shot"]
    steps = {name: problem["steps"] for name, problem in document["results"]["problems"].items()}
    for longer, words in ((False, "ahead up to 600 steps"), (True, "of 800 to 10,000 steps, at")):
        ratios = [r for p, r in found["best of three"]["by_problem"].items() if (steps[p] > 600) is longer]
        ahead = f"{sum(ratio < 1 for ratio in ratios)} of {len(ratios)}"
        pattern = rf"{words}\s\(?{ratio_of(ratios)}, {ahead}".replace(" ", r"\s")
        assert re.search(pattern, PAGES[README])
    behind = len(found["best of three"]["worse_by_10_percent"])
    assert f"[{behind} of the problems]" in PAGES[README]
    others = [r for p, r in found["muon"]["by_problem"].items() if p not in ("sine, 500", "sine, 3000")]
    assert f"the ratio to it is {ratio_of(others).replace(chr(92), '')}" in PAGES["docs/zero-shot.md"]


def ratio_of(ratios):
    """A geometric mean with its 95% interval, as a pattern."""
    logs = torch.tensor(ratios, dtype=torch.float64).log()
    half = student_t_quantile(len(logs) - 1) * logs.std() / len(logs) ** 0.5
    mean, low, high = (x.exp().item() for x in (logs.mean(), logs.mean() - half, logs.mean() + half))
    return rf"{mean:.3f} \[{low:.3f}, {high:.3f}\]"


def test_the_mnist_table_is_the_reports():
    page = PAGES["docs/reproduction.md"]
    document = json.loads((REPRODUCTION / "mnist/results.json").read_text(encoding="utf-8"))
    for numbers in document["results"]["mnist_100"]["optimizers"].values():
        values = (numbers[key] for key in ("final_loss", "sum_loss"))
        final, total = (Interval(value["mean"], *value["ci95"]) for value in values)
        assert f" | {final} | {total} | " in page
    assert document["commit"][:7] in page
