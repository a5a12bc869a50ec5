"""`reproduce zero-shot`: its problems, peers, search, store and statistics."""

import csv
import json
import math
import re

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn
from torch.nn import functional as F

from l2l_lightning.errors import ReproductionError
from l2l_lightning.reproduce.command import reproduce
from l2l_lightning.reproduce.settings import Settings, parse
from l2l_lightning.reproduce.zero_shot import (
    PEERS,
    PROBLEMS,
    Data,
    Peer,
    Problem,
    data,
    experiment,
    peers,
    published,
    runs,
    store,
)
from l2l_lightning.reproduce.zero_shot.experiment import QUICK, chosen
from l2l_lightning.reproduce.zero_shot.peers import FlatMuon, cosine, muon_split
from l2l_lightning.reproduce.zero_shot.problems import factors, functions, images
from l2l_lightning.reproduce.zero_shot.problems.networks import CausalTransformer, Recurrent
from l2l_lightning.reproduce.zero_shot.ratios import Comparison, Ratio
from l2l_lightning.reproduce.zero_shot.store import Effort, Entry, Store, Trial
from l2l_lightning.reproduce.zero_shot.suite import complete
from l2l_lightning.rules import ZeroShot

PACKAGES = {
    "prodigy": "prodigyopt",
    "prodigy-cosine": "prodigyopt",
    "dog": "dog",
    "schedule-free": "schedulefree",
}


def line(steps=20):
    """2x + 1 by a linear function: a user's problem."""
    x = torch.linspace(-1, 1, 60)[:, None]
    rows = Data.split("a line", x, 2 * x + 1)

    def loss(module, batch):
        return F.mse_loss(module(batch[0]), batch[1])

    return Problem("mine", steps, lambda: nn.Linear(1, 1), rows.batches(8), rows.held_out, loss, rows.source)


def adagrad(module, steps, rate):
    return [torch.optim.Adagrad(module.parameters(), rate)]


# Problems


def test_there_are_problems_of_many_kinds():
    assert len([name for name in PROBLEMS if name.startswith("matrix: ")]) == 36
    assert len(PROBLEMS) >= 36 + 30
    assert set(QUICK) < set(PROBLEMS)
    steps = {make().steps for make in PROBLEMS.values()}
    assert {100, 300, 1000, 3000, 10000} <= steps


@pytest.fixture
def no_pretraining(monkeypatch):
    monkeypatch.setattr(images, "pretrained_resnet", lambda: images.NarrowResNet18(5))


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_problem_can_be_learned_from(name, no_pretraining):
    problem = PROBLEMS[name]()
    module, generator = runs.start(problem, 0)
    loss = problem.loss(module, problem.batch(generator))
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())
    assert sum(parameter.grad.abs().sum() for parameter in module.parameters()) > 0
    test = problem.held_out_loss(module, "test")
    assert math.isfinite(test)
    assert problem.held_out_loss(module, "test") == test
    inputs = [problem.held_out(part)[0] for part in ("validation", "test")]
    assert not torch.equal(*(batch if isinstance(batch, torch.Tensor) else batch[0] for batch in inputs))
    assert module.training


def test_a_seed_is_the_initialisation_and_the_minibatches(no_pretraining):
    problem = PROBLEMS["VAE digits, 1000"]()
    (one, first), (two, second), (other, third) = (runs.start(problem, seed) for seed in (3, 3, 4))
    assert all(map(torch.equal, one.parameters(), two.parameters()))
    assert all(map(torch.equal, problem.batch(first), problem.batch(second)))
    assert not torch.equal(next(other.parameters()), next(one.parameters()))
    assert not torch.equal(problem.batch(third)[0], problem.batch(first)[0])


SOURCES = {
    "mnist": lambda: data.images("mnist"),
    "digits": lambda: data.images("digits"),
    "mnist's last digits": lambda: images.digits_of_mnist(5),
    "diabetes": lambda: data.table("diabetes"),
    "breast cancer": lambda: data.table("breast_cancer"),
    "wine": lambda: data.table("wine"),
    "china.jpg": lambda: data.picture("china", 6),
    "flower.jpg": lambda: data.picture("flower", 6),
    "a table of numbers": lambda: factors.known_numbers(120, 80, 6, 0.0),
    "with duplicates": lambda: Data.split("duplicates", torch.arange(60) // 5),
}


@pytest.mark.parametrize("source", SOURCES)
def test_no_row_is_in_two_parts(source):
    rows = SOURCES[source]()
    parts = [{row.numpy().tobytes() for row in part[0]} for part in (rows.train, rows.validation, rows.test)]
    assert min(map(len, parts)) > 1
    assert not parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2]
    assert re.search("SHA-256 [0-9a-f]{12}", rows.source)


@pytest.mark.parametrize("name", ["help", "code"])
def test_no_paragraph_is_in_two_parts_of_a_text(name):
    parts, source = data.text(name)
    paragraphs = [set(part.split(b"\n\n")) - {b""} for part in parts]
    assert not paragraphs[0] & paragraphs[1] | paragraphs[0] & paragraphs[2] | paragraphs[1] & paragraphs[2]
    assert len(parts[0]) > 5 * max(len(parts[1]), len(parts[2]))
    assert "SHA-256" in source
    inputs, targets = data.characters(name, 32).test
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_functions_are_held_out_at_places_that_differ():
    validation, test = (set(functions.GRID[part].tolist()) for part in ("validation", "test"))
    assert not validation & test


@pytest.mark.parametrize("equation", ["poisson", "burgers"])
def test_the_solution_of_an_equation_has_no_loss(equation):
    """Burgers' boundary values are met but for 9e-5."""

    class Solution(nn.Module):
        def forward(self, x):
            return (math.pi * x).sin() if equation == "poisson" else -(5 * x).tanh()

    problem = functions.physics_informed(equation, 1)
    assert problem.loss(Solution().double(), torch.linspace(-1, 1, 50).double()[:, None]).item() < 1e-9
    assert problem.held_out_loss(Solution(), "test") < 1e-12


def test_the_matrix_is_that_of_generalise():
    cell = next(cell for cell in images.cells("star") if cell.dataset == "mnist" and cell.depth == 2)
    module = images.matrix(cell).build()
    assert sum(parameter.numel() for parameter in module.parameters()) == cell.task.num_coordinates
    values = nn.utils.parameters_to_vector(module.parameters())
    assert values.std().item() == pytest.approx(0.01, rel=0.03)


# Peers


@pytest.mark.parametrize("name", PEERS)
def test_every_peer_learns(name):
    pytest.importorskip(PACKAGES.get(name, "torch"))
    problem, peer = PROBLEMS["logistic digits, 100"](), PEERS[name]
    how = {"rate": 0.05} if peer.tuned else {}
    loss = runs.train(problem, peer, how, 0, "test")
    # DoG begins with steps of 1e-6.
    assert loss < (1.0 if name == "dog" else 0.8) * runs.first_loss(problem, 0, "test")
    assert runs.train(problem, peer, how, 0, "test") == loss


def test_nag_is_nesterovs_momentum():
    problem, rate = line(), 0.1
    module, generator = runs.start(problem, 5)
    theta = [parameter.detach().clone() for parameter in module.parameters()]
    momentum = [torch.zeros_like(value) for value in theta]
    for _ in range(problem.steps):
        x, y = problem.batch(generator)
        error = x @ theta[0].T + theta[1] - y
        gradients = [2 * (error.T @ x) / len(x), 2 * error.mean(0)]
        momentum = [0.9 * m + g for m, g in zip(momentum, gradients, strict=True)]
        theta = [v - rate * (g + 0.9 * m) for v, g, m in zip(theta, gradients, momentum, strict=True)]
    (x, y), *_ = problem.held_out("test")
    expected = F.mse_loss(x @ theta[0].T + theta[1], y).item()
    assert runs.train(problem, PEERS["nag"], {"rate": rate}, 5, "test") == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("step", "factor"), [(0, 0.1), (4, 0.5), (9, 1.0), (100, 0.5), (150, (1 - 0.5**0.5) / 2), (200, 0.0)]
)
def test_warm_up_and_cosine(step, factor):
    """T = 200: ten steps of warm-up, during which the cosine falls by less than 1%."""
    assert cosine(step, 200) == pytest.approx(factor, rel=0.01, abs=1e-12)


def test_the_schedule_is_that_of_the_rate():
    module = nn.Linear(1, 1)
    optimizer, schedule = PEERS["adamw-cosine"].make(module, 100, 0.3)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == [0.3 * cosine(step, 100) for step in range(100)]


@pytest.mark.parametrize(
    ("build", "inside"),
    [
        (lambda: nn.Linear(3, 2), []),
        (lambda: images.mlp((5, 4, 3, 2), nn.ReLU), ["0.weight", "2.weight"]),
        (lambda: images.conv(4, True), ["1.weight", "4.weight"]),
        (lambda: factors.Factors(5, 4, 2), []),
        (lambda: Recurrent(nn.GRU, 9, 4), ["cells.weight_ih_l0", "cells.weight_hh_l0"]),
        (
            lambda: CausalTransformer(9, 4, 8, 1),
            [f"layers.0.{part}" for part in ("self_attn.in_proj_weight", "self_attn.out_proj.weight")]
            + [f"layers.0.linear{number}.weight" for number in (1, 2)],
        ),
    ],
)
def test_muons_matrices_are_those_inside_a_network(build, inside):
    module = build()
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    matrices, others = muon_split(module)
    assert [names[id(parameter)] for parameter in matrices] == inside
    assert {id(p) for p in matrices + others} == set(names)
    assert len(matrices) + len(others) == len(names)


def test_muon_moves_a_convolution_as_the_matrix_that_it_is():
    conv, flat = nn.Conv2d(3, 8, 2), nn.Linear(12, 8)
    flat.weight.data = conv.weight.detach().flatten(1).clone()
    gradient = torch.randn(8, 3, 2, 2)
    before = conv.weight.detach().clone()
    for weight, value in ((conv.weight, gradient), (flat.weight, gradient.flatten(1))):
        weight.grad = value
        FlatMuon([weight], 0.1).step()
    assert torch.equal(conv.weight.flatten(1), flat.weight)
    update = (before * (1 - 0.1 * 0.01) - conv.weight.detach()).flatten(1)
    # 0.2 √max(8, 12) times a matrix whose singular values Newton–Schulz leaves between 0.7 and 1.2.
    values = torch.linalg.svdvals(update) / (0.1 * 0.2 * math.sqrt(12))
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_what_is_missing_is_named(monkeypatch, tmp_path):
    with pytest.raises(ReproductionError, match=r"l2l-lightning\[peers\].*--peers"):
        peers.optional("no_such_package")
    entries = Store(tmp_path, EFFORT)
    monkeypatch.setitem(PEERS, "no package", Peer(lambda module, steps: peers.optional("no_such_package")))
    monkeypatch.setattr(Store, "entry", lambda *_: pytest.fail("something was computed before"))
    with pytest.raises(ReproductionError, match="no_such_package"):
        complete(
            entries,
            [("logistic wine, 100", "nag"), ("logistic wine, 100", "no package")],
            1,
            lambda text: None,
        )
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ReproductionError, match=r"no Muon.*--peers"):
        FlatMuon([nn.Linear(2, 2).weight], 0.1)


def test_averages_are_judged_with_statistics_of_their_own():
    """A peer that averages θ leaves BatchNorm's running statistics of another θ."""

    class Back:
        """Judged by θ0, whatever the training did."""

        def __init__(self, module):
            self.module, self.first = module, {k: v.clone() for k, v in module.state_dict().items()}

        def step(self):
            pass

        def eval(self):
            self.module.load_state_dict(self.first)

    problem = PROBLEMS["conv 8 channels BatchNorm, 100"]()
    seen = {}

    def score(module, batch):
        seen["mean"] = module[2].running_mean.clone()
        return problem.loss(module, batch)

    judged = Problem(**{**vars(problem), "steps": 2, "score": score})
    runs.train(judged, Peer(lambda module, steps: [Back(module)]), {}, 0, "test")
    module, generator = runs.start(problem, 0)
    for _ in range(2):
        problem.batch(generator)
    batches = torch.cat([problem.batch(generator)[0] for _ in range(runs.NORMALISATION_BATCHES)])
    expected = module[1](module[0](batches)).mean((0, 2, 3))
    torch.testing.assert_close(seen["mean"], expected, rtol=1e-4, atol=1e-5)


# Search and store


@pytest.fixture
def line_and_adagrad(monkeypatch):
    monkeypatch.setitem(PROBLEMS, "line, 20", line)
    monkeypatch.setitem(PEERS, "adagrad", Peer(adagrad, range(-4, 0)))


@pytest.fixture
def trained(monkeypatch, line_and_adagrad):
    """The runs (rate and setting, seed, part), whose losses are least at the rate 1 and β1 = 0.5."""
    calls = []

    def train(problem, peer, how, seed, part):
        calls.append((dict(how), seed, part))
        return abs(math.log(how.get("rate", 2))) + how.get("beta1", 0.9) + seed / 1e6

    monkeypatch.setattr(store, "train", train)
    return calls


EFFORT = Effort((500, 501), (0, 1, 2))


def test_a_rate_is_searched_for_on_other_seeds_and_data(trained, tmp_path):
    entry = Store(tmp_path, EFFORT).entry("line, 20", "adagrad")
    assert entry.chosen == {"rate": 1.0}
    assert [trial.how["rate"] for trial in entry.trials] == [0.05, 0.1, 0.2, 0.5, 1.0, 2.0]
    assert {(seed, part) for _, seed, part in trained[:-3]} == {(500, "validation"), (501, "validation")}
    assert trained[-3:] == [({"rate": 1.0}, seed, "test") for seed in (0, 1, 2)]
    assert entry.validation == pytest.approx(0.9, rel=1e-2)
    assert len(entry.test) == len(entry.first) == 3


def test_a_search_goes_on_from_anothers(trained, tmp_path):
    results = Store(tmp_path, EFFORT)
    base = results.entry("line, 20", "adamw")
    del trained[:]
    entry = results.entry("line, 20", "adamw-betas")
    assert entry.trials[: len(base.trials)] == base.trials
    assert entry.chosen == {"rate": 1.0, "beta1": 0.5, "beta2": 0.99}
    assert len([call for call in trained if call[2] == "validation"]) == 4 * 3 * 2


def test_an_interrupted_search_is_begun_anew_and_a_finished_one_is_read(trained, tmp_path, monkeypatch):
    results, train = Store(tmp_path, EFFORT), store.train
    results.entry("line, 20", "nag")

    def interrupted(*arguments):
        if len(trained) > 50:
            raise KeyboardInterrupt
        return train(*arguments)

    monkeypatch.setattr(store, "train", interrupted)
    results.entry("line, 20", "adagrad")
    with pytest.raises(KeyboardInterrupt):
        results.entry("line, 20", "adamw")
    monkeypatch.setattr(store, "train", train)
    kept = len(list(tmp_path.glob("*.json")))
    del trained[:]
    again = Store(tmp_path, EFFORT)
    assert again.entry("line, 20", "nag").peer == "nag"
    assert trained == []
    again.entry("line, 20", "adagrad")
    assert trained == []
    assert again.entry("line, 20", "adamw").chosen == {"rate": 1.0}
    assert (kept, len(list(tmp_path.glob("*")))) == (2, 3)
    path = again.path(again.identity("line, 20", "nag"))
    path.write_text(path.read_text()[:50])
    assert again.read("line, 20", "nag") is None


def test_results_are_kept_by_what_determines_them(trained, tmp_path, monkeypatch):
    results = Store(tmp_path, EFFORT)
    names = ("adagrad", "zero-shot")
    for name in names:
        results.entry("line, 20", name)
    assert all(results.read("line, 20", name) for name in names)
    assert Store(tmp_path, Effort((500,), (0, 1, 2))).read("line, 20", "adagrad") is None
    monkeypatch.setitem(PROBLEMS, "line, 20", lambda: Problem(**{**vars(line()), "version": 2}))
    assert not any(results.read("line, 20", name) for name in names)
    monkeypatch.setitem(PROBLEMS, "line, 20", line)
    other = ZeroShot()
    with torch.no_grad():
        next(other.parameters()).add_(0.1)
    changed = peers.learned(lambda: other, ours=True)
    monkeypatch.setitem(PEERS, "zero-shot", changed)
    store.rule_identity.cache_clear()
    assert results.read("line, 20", "adagrad")
    assert results.read("line, 20", "zero-shot") is None
    store.rule_identity.cache_clear()


def test_what_is_published_is_taken_where_nothing_was_run(trained, tmp_path):
    for name in ("adagrad", "zero-shot"):
        Store(tmp_path / "run", EFFORT).entry("line, 20", name)
    assert published.publish(tmp_path / "run", tmp_path / "published.json") == 1  # ours is left out
    assert published.publish(tmp_path / "run", tmp_path / "published.json") == 1
    content = json.loads((tmp_path / "published.json").read_text())
    assert len(content["origins"]) == 1
    [(digest, found)] = content["entries"].items()
    known = {digest: store.entry_from_json(found["entry"])}
    del trained[:]
    results = Store(tmp_path / "another", EFFORT, known)
    taken, made = results.entry("line, 20", "adagrad"), Store(tmp_path / "run", EFFORT)
    assert trained == []
    assert taken.test == pytest.approx(made.entry("line, 20", "adagrad").test, rel=1e-5)
    assert results.taken("line, 20", "adagrad") == digest
    assert results.read("line, 20", "zero-shot") is None
    assert made.taken("line, 20", "adagrad") is None
    # Of other seeds nothing is published.
    assert Store(tmp_path / "another", Effort((500,), (0, 1)), known).read("line, 20", "adagrad") is None


def test_the_packages_results_are_of_todays_problems_and_peers():
    """One that is not would never be taken: it is to be published anew."""
    results = Store(published.FILE.parent, experiment.protocol(0, quick=False))
    entries = published.published()
    others = {peer for peer in PEERS if not PEERS[peer].ours}
    stale = []
    for digest, found in entries.items():
        assert found.peer in others
        # Texts come with Python, and differ from version to version.
        of_python = " of Python " in PROBLEMS[found.problem]().data
        if not of_python and results.path(results.identity(found.problem, found.peer)).stem != digest:
            stale.append((found.problem, found.peer))
    assert stale == []
    assert len(entries) >= 500


def test_a_run_with_the_packages_results_says_whose_they_are(tmp_path, capsys):
    problem, peer = "logistic digits, 100", "adamw-0.001"
    wanted = {"problems": (problem,), "peers": (peer,), "workers": 1, "out": str(tmp_path)}
    reproduce(["zero-shot"], Settings(**wanted, from_pretrained=True))
    assert list((tmp_path / "zero-shot" / "entries").glob("*.json")) == []
    assert "1 of 1 results are the package's own" in (tmp_path / "REPORT.md").read_text()


# Statistics


def entry(losses, first=2.0, **values):
    given = {"problem": "p", "peer": "a", "family": "f", "steps": 1, "chosen": {}, "validation": None}
    given |= {"trials": [], "seeds": list(range(len(losses))), "first": [first] * len(losses), "seconds": 0.0}
    return Entry(**given | values, test=losses)


def test_diverged_runs_are_counted_and_kept():
    mixed = entry([None, 1.0, 20.5, 0.0])
    assert mixed.diverged == 2
    assert mixed.losses == [20.0, 1.0, 20.0, 1e-8]


def test_intervals_of_ratios():
    logs = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)) + torch.arange(6)[:, None]
    ratio = Ratio.of(list(logs))
    means = logs.mean(1).numpy()
    assert ratio.mean == pytest.approx(math.exp(means.mean()), rel=1e-5)
    over = scipy.stats.t.interval(0.95, 5, means.mean(), scipy.stats.sem(means))
    assert np.log(ratio.over_problems) == pytest.approx(over, rel=1e-5)
    error = math.sqrt((logs.var(1) / 5).sum().item()) / 6
    seeds = scipy.stats.t.interval(0.95, 24, means.mean(), error)
    assert np.log(ratio.over_seeds) == pytest.approx(seeds, rel=1e-5)
    alone = Ratio.of([torch.tensor([0.5])])
    assert math.isnan(alone.over_seeds[0])
    assert json.dumps(alone.as_json(), allow_nan=False)


def test_a_comparison_is_paired_by_problem_and_seed():
    """Seeds that are hard for both cancel."""
    ours = {"a": entry([1.0, 10.0]), "b": entry([3.0, 3.0], family="g"), "c": entry([None, 4.0], family="g")}
    others = {
        "a": entry([2.0, 20.0]),
        "b": entry([1.0, 9.0]),
        "c": entry([10.0, 4.0]),
        "d": entry([1.0, 1.0]),
    }
    found = Comparison.of(ours, others)
    assert found.by_problem == pytest.approx({"a": 0.5, "b": 1.0, "c": math.sqrt(2)})
    assert found.ratio.mean == pytest.approx((0.5 * math.sqrt(2)) ** (1 / 3))
    assert (found.wins, found.losses, found.worst, found.diverged) == (1, ["c"], "c", 1)
    assert found.balanced == pytest.approx(math.sqrt(0.5 * 2**0.25))
    assert found.by_family["f"].mean == pytest.approx(0.5)
    # The ratio is the same with both seeds of "a".
    assert Ratio.of([torch.tensor([0.5, 0.5]).log()]).over_seeds == pytest.approx((0.5, 0.5))


# The command


TRIED = ("adagrad", "adamw", "adamw-cosine", "nag", "zero-shot")


def test_a_users_problem_and_peer_from_end_to_end(line_and_adagrad, tmp_path, capsys):
    wanted = {
        "problems": ("line*", "logistic digits, 100"),
        "workers": 1,
        "quick": True,
        "out": str(tmp_path),
    }
    reproduce(["zero-shot"], Settings(**wanted, peers=TRIED[:-1]))
    report = (tmp_path / "REPORT.md").read_text()
    assert "| line, 20 |" in report
    assert "best of three |" not in report  # nothing of ours to compare
    reproduce(["zero-shot"], Settings(**wanted, peers=TRIED))
    document = json.loads((tmp_path / "zero-shot" / "results.json").read_text())
    assert (tmp_path / "zero-shot" / "families.png").is_file()
    found = document["results"]["comparisons"]["zero-shot"]
    with (tmp_path / "zero-shot" / "results.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    losses = {
        (name, problem): np.array(
            [float(r["test_loss"]) for r in rows if (r["optimizer"], r["problem"]) == (name, problem)]
        )
        for name in TRIED
        for problem in ("line, 20", "logistic digits, 100")
    }
    for problem in ("line, 20", "logistic digits, 100"):
        ratio = np.exp(np.log(losses["zero-shot", problem] / losses["adagrad", problem]).mean())
        assert found["adagrad"]["by_problem"][problem] == pytest.approx(ratio)
        best = min(np.exp(np.log(losses[name, problem]).mean()) for name in ("adamw", "adamw-cosine", "nag"))
        ours = np.exp(np.log(losses["zero-shot", problem]).mean())
        assert found["best of three on test data"]["by_problem"][problem] == pytest.approx(ours / best)
    assert found["best of three"]["geometric_mean"] > 0
    assert set(document["results"]["problems"]["line, 20"]) == {"family", "steps", "data"}
    assert "A quick run" in (tmp_path / "REPORT.md").read_text()


@pytest.mark.slow
def test_processes_find_what_one_finds(tmp_path):
    wanted = {
        "problems": ("logistic digits, 100",),
        "peers": ("adamw", "adamw-betas", "adamw-0.001"),
        "quick": True,
    }
    for workers in (1, 2):
        reproduce(["zero-shot"], Settings(**wanted, workers=workers, out=str(tmp_path / str(workers))))
    one, two = (
        {path.name: json.loads(path.read_text())["entry"] | {"seconds": 0} for path in folder.glob("*.json")}
        for folder in (tmp_path / "1/zero-shot/entries", tmp_path / "2/zero-shot/entries")
    )
    assert len(one) == 3
    assert one == two


def test_names_are_patterns():
    assert chosen(["adamw", "adamw-cosine", "nag"], ["adamw*"], "--peers") == ["adamw", "adamw-cosine"]
    with pytest.raises(ReproductionError, match="--peers 'sgd' matches none of adamw, nag"):
        chosen(["adamw", "nag"], ["sgd"], "--peers")
    names, settings = parse(
        ["zero-shot", "--problems", "sine*", "matrix*", "--peers", "nag", "--workers", "3"]
    )
    assert (names, settings.problems, settings.peers) == (["zero-shot"], ("sine*", "matrix*"), ("nag",))
    assert settings.workers == 3
    assert settings == Settings(problems=("sine*", "matrix*"), peers=("nag",), workers=3)


def test_all_leaves_out_what_takes_hours(tmp_path, monkeypatch):
    from l2l_lightning.reproduce import command

    asked = []
    kept = command.EXPERIMENTS["zero-shot"]._replace(requests=lambda store: asked.append(store) or {})
    monkeypatch.setattr(command, "EXPERIMENTS", {"zero-shot": kept})
    reproduce(["all"], Settings(out=str(tmp_path), quick=True))
    assert asked == []


def test_a_trial_is_of_a_rate_and_a_setting():
    trials = [Trial({"rate": 0.2}, 1.0), Trial({"rate": 0.5}, None), Trial({"rate": 0.5, "beta1": 0.5}, 0.1)]
    assert store._positions(trials) == {-2: 1.0, -1: math.inf}
