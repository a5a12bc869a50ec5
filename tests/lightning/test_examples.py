"""`example`: plain loops give its curves, its optimizers are paired, and it reports what it measured."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torchvision
from torch.nn import functional as F
from torch.utils.data import Subset

from l2l_lightning import LearnedOptimizer
from l2l_lightning.cli import CommandLineError, main
from l2l_lightning.comparison.statistics import Interval
from l2l_lightning.data import load_images
from l2l_lightning.examples import comparison, resnet
from l2l_lightning.examples.module import ADAMW, OptimizerSetting
from l2l_lightning.examples.resnet import NarrowResNet18, resnet_problem
from l2l_lightning.examples.training import Evaluation, Run
from l2l_lightning.examples.transformer import CharacterTransformer, documentation, transformer_problem
from l2l_lightning.examples.tuning import ADAMW_GRID, RULE_GRID, tune
from l2l_lightning.rollout.optimizees import derive_generator

RULE = "lstm-mnist-mixture"
SMALL = {"steps": 10, "batch_size": 4, "seed": 3, "accelerator": "cpu"}


def small_resnet(**arguments):
    return few_held_out(resnet_problem(**{"width": 2, "pretraining_steps": 10, **SMALL, **arguments}))


def small_transformer():
    return few_held_out(transformer_problem(context=12, dim=8, **SMALL))


def few_held_out(problem):
    few = range(40)
    return replace(problem, validation=Subset(problem.validation, few), test=Subset(problem.test, few))


@pytest.fixture(scope="module", params=["resnet", "transformer"])
def quick(request, tmp_path_factory):
    """A finished quick run: its document and its curves."""
    out = tmp_path_factory.mktemp(request.param)
    options = ["--quick", "--accelerator=cpu", f"--out={out}", f"--rules=[{RULE}]", "--seed=4"]
    main(["example", request.param, *options])
    with (out / "curves.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert (out / "curves.png").read_bytes()[1:4] == b"PNG"
    return json.loads((out / "results.json").read_text()), rows


def losses(rows, optimizer, seed, split):
    chosen = (r for r in rows if (r["optimizer"], r["seed"], r["split"]) == (optimizer, str(seed), split))
    return [float(row["loss"]) for row in chosen]


def test_all_optimizers_begin_alike_and_go_on_differently(quick):
    document, rows = quick
    assert list(document["optimizers"]) == [ADAMW, RULE]
    for seed in range(document["num_seeds"]):
        for split, count in (("train", 10), ("held_out", 11)):
            adamw, rule = (losses(rows, name, seed, split) for name in (ADAMW, RULE))
            assert len(adamw) == len(rule) == count
            assert adamw[0] == rule[0]
            assert adamw[1] != rule[1]
    assert losses(rows, RULE, 0, "train")[0] != losses(rows, RULE, 1, "train")[0]


def test_the_report_is_of_the_curves(quick):
    document, rows = quick
    assert document["quick"] is True
    assert {"commit", "device", "versions", "data", "threads"} <= set(document)
    finals = {name: [losses(rows, name, seed, "held_out")[-1] for seed in range(2)] for name in (ADAMW, RULE)}
    for name, numbers in document["optimizers"].items():
        assert numbers["held_out_loss"]["mean"] == pytest.approx(sum(finals[name]) / 2, rel=1e-6)
        assert numbers["seconds_per_step"] > 0
        assert numbers["cpu_seconds_per_step"] > 0
        trials = numbers["tuning"]["trials"]
        best = min(trials, key=lambda trial: trial["validation_loss"])
        assert best["lr"] == numbers["setting"]["lr"]
        assert len(trials) == 2
    difference = [a - b for a, b in zip(finals[RULE], finals[ADAMW], strict=True)]
    assert document["optimizers"][RULE]["loss_minus_adamw"]["mean"] == pytest.approx(
        sum(difference) / 2, rel=1e-5
    )
    parameters = document["parameters"]
    assert document["optimizers"][RULE]["state_bytes"] == 320 * parameters
    assert 8 * parameters <= document["optimizers"][ADAMW]["state_bytes"] < 8.1 * parameters


def by_hand(problem, make_optimizer, held_out):
    """A training loop as anyone would write it: its losses, and the held-out loss at its end."""
    generator = derive_generator(problem.seed, "tuning", 1)
    network = problem.network(generator)
    optimizer = make_optimizer(network.parameters())
    found = []
    network.train()
    for _ in range(problem.steps):
        indices = torch.randint(len(problem.train), (problem.batch_size,), generator=generator)
        inputs, labels = problem.train[indices]
        loss = F.cross_entropy(network(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    network.eval()
    with torch.no_grad():
        inputs, labels = held_out[:]
        logits = network(inputs)
    return found, F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).float().mean().item()


@pytest.mark.parametrize("make_problem", [small_resnet, small_transformer])
@pytest.mark.parametrize(
    ("setting", "make_optimizer"),
    [
        (
            OptimizerSetting(ADAMW, 0.003, 0.1),
            lambda parameters: torch.optim.AdamW(parameters, lr=0.003, weight_decay=0.1),
        ),
        (
            OptimizerSetting(RULE, 0.2, 0.01),
            lambda parameters: LearnedOptimizer(parameters, RULE, lr=0.2, weight_decay=0.01),
        ),
    ],
    ids=["adamw", "learned"],
)
def test_a_hand_written_loop_gives_the_same_curve(make_problem, setting, make_optimizer):
    problem = make_problem()
    run = problem.run(setting, "tuning", 1)
    found, held_out_loss, accuracy = by_hand(problem, make_optimizer, problem.validation)
    # Lightning evaluates in between, which must change nothing.
    assert run.losses == pytest.approx(found, rel=1e-4)
    assert run.held_out[-1] == pytest.approx((10, held_out_loss, accuracy), rel=1e-4)
    assert [evaluation.step for evaluation in run.held_out] == list(range(11))


def test_a_run_depends_on_nothing_but_its_stream_index_and_setting():
    problem, setting = small_transformer(), OptimizerSetting(RULE, 0.1, 0.0, torch.bfloat16)
    first = problem.run(setting, "test", 0)
    torch.manual_seed(99)
    again, other = problem.run(setting, "test", 0), problem.run(setting, "test", 1)
    assert first.losses == again.losses
    assert first.held_out == again.held_out
    assert first.losses[0] != other.losses[0]
    parameters = sum(p.numel() for p in problem.network(torch.Generator()).parameters())
    assert first.state_bytes == 160 * parameters


def test_a_resnet_of_full_width_is_torchvisions():
    ours, theirs = NarrowResNet18(64, 7), torchvision.models.resnet18(num_classes=7)
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(3, 3, 28, 28)
    assert torch.equal(ours(images), theirs(images))


def test_a_narrow_resnet_has_narrow_stages():
    network = NarrowResNet18(width=4, num_classes=5)
    stages = (network.layer1, network.layer2, network.layer3, network.layer4)
    assert [stage[-1].bn2.num_features for stage in stages] == [4, 8, 16, 32]


def test_the_resnet_is_fine_tuned_on_digits_that_it_was_not_pretrained_on():
    arguments = {"width": 2, "pretraining_steps": 10, **SMALL}
    problem, splits = resnet_problem(**arguments), load_images("mnist")
    for data, images in zip((problem.train, problem.validation, problem.test), splits, strict=True):
        pixels, labels = data[:]
        new = images.labels >= 5
        assert torch.equal(labels + 5, images.labels[new])
        # Undone, torchvision's normalisation gives the grey values in every channel.
        for channel, (mean, std) in enumerate(zip(resnet.IMAGENET_MEAN, resnet.IMAGENET_STD, strict=True)):
            grey = pixels[:, channel].flatten(1) * std + mean
            torch.testing.assert_close(grey, images.pixels[new], rtol=0, atol=1e-5)


def test_the_pretrained_network_is_one_and_its_heads_are_drawn_anew():
    problem = small_resnet()
    first, second = (problem.network(derive_generator(3, "test", index)).state_dict() for index in range(2))
    different = {key for key in first if not torch.equal(first[key], second[key])}
    assert different == {"fc.weight", "fc.bias"}
    untrained = small_resnet(pretraining_steps=20).network(derive_generator(3, "test", 0)).state_dict()
    assert not torch.equal(first["conv1.weight"], untrained["conv1.weight"])


def test_torchvisions_weights_are_what_is_fine_tuned(monkeypatch):
    downloaded = torchvision.models.resnet18()
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, weights: downloaded)
    network = small_resnet(width=64, weights="IMAGENET1K_V1").network(torch.Generator())
    assert network.fc.out_features == 5
    for key, value in network.state_dict().items():
        if not key.startswith("fc."):
            assert torch.equal(value, downloaded.state_dict()[key])


def test_weights_that_cannot_be_had_are_an_error(monkeypatch, fails):
    def offline(name, weights):
        raise URLError("no network")

    monkeypatch.setattr(torchvision.models, "get_model", offline)
    weights = ["example", "resnet", "--weights", "IMAGENET1K_V1"]
    assert "no network" in fails(*weights, "--width", "64")
    assert "add --width 64" in fails(*weights)
    assert "IMAGENET1K_V1 only" in fails("example", "resnet", "--width=64", "--weights=BEST")


@pytest.mark.parametrize("training", [True, False])
def test_the_transformer_does_not_look_ahead(training):
    torch.manual_seed(0)
    network = CharacterTransformer(context=9, dim=8).train(training)
    text = torch.randint(128, (2, 9))
    changed = text.clone()
    changed[:, 5] = (text[:, 5] + 1) % 128
    with torch.no_grad():
        difference = (network(text) - network(changed)).abs().amax(dim=(0, 1))
    assert difference[:5].max() < 1e-6
    assert difference[5:].min() > 1e-4


def test_no_paragraph_is_in_two_splits():
    text = documentation()
    paragraphs = text.split("\n\n")
    assert len(text) > 100_000
    assert len(set(paragraphs)) == len(paragraphs)
    assert text.isascii()


def test_the_splits_are_stretches_of_the_text_and_labels_the_next_characters():
    problem, text = (
        transformer_problem(context=12, dim=8, **SMALL),
        torch.tensor(list(documentation().encode())),
    )
    first, second = len(text) * 8 // 10, len(text) * 9 // 10
    for data, start, stop, stride in (
        (problem.train, 0, first, 1),
        (problem.validation, first, second, 12),
        (problem.test, second, len(text), 12),
    ):
        for index in (0, 1, len(data) - 1):
            begin = start + index * stride
            inputs, labels = data[index]
            assert torch.equal(inputs, text[begin : begin + 12])
            assert torch.equal(labels, text[begin + 1 : begin + 13])
        assert stop - stride <= start + (len(data) - 1) * stride + 12 < stop


class FakeProblem:
    """Its runs' losses are a function of the setting."""

    def __init__(self, loss):
        self.loss, self.streams = loss, set()

    def run(self, setting, stream, index):
        self.streams.add((stream, index))
        loss = self.loss(setting)
        return Run([1.0], [Evaluation(0, 2.0, 0.1), Evaluation(10, loss, 0.5)])


def log_distance(best):
    return lambda setting: abs(math.log(setting.lr / best)) + setting.weight_decay


@pytest.mark.parametrize("optimizer", [ADAMW, RULE])
def test_a_search_finds_the_best_rate_and_decay(optimizer):
    grid = ADAMW_GRID if optimizer == ADAMW else RULE_GRID
    problem = FakeProblem(log_distance(grid.rates[1]))
    tuned = tune(problem, optimizer, 2)
    assert (tuned.setting.lr, tuned.setting.weight_decay) == (grid.rates[1], grid.weight_decays[0])
    assert len(tuned.trials) == 4
    assert problem.streams == {("tuning", 0), ("tuning", 1)}


@pytest.mark.parametrize(("best", "tried"), [(1.0, 6), (0.003, 7), (1e-6, 7), (0.01, 6)])
def test_a_search_goes_on_at_its_edges(best, tried):
    tuned = tune(FakeProblem(log_distance(best)), RULE, 1)
    assert tuned.setting.lr == pytest.approx(max(best, 0.001))  # three rates beyond the grid at most
    assert len(tuned.trials) == tried


def test_a_search_takes_a_better_decay_and_leaves_what_diverges():
    def loss(setting):
        return math.nan if setting.lr > 0.1 else 1 / (setting.lr + setting.weight_decay)

    tuned = tune(FakeProblem(loss), RULE, 1)
    assert (tuned.setting.lr, tuned.setting.weight_decay) == (0.1, 0.001)
    with pytest.raises(CommandLineError, match="diverged at every setting"):
        tune(FakeProblem(lambda _: math.inf), ADAMW, 1)


def test_a_comparison_that_is_not_paired_is_refused():
    class Shifting(FakeProblem):
        def run(self, setting, stream, index):
            run = super().run(setting, stream, index)
            run.losses[0] += setting.optimizer == RULE
            return run

    with pytest.raises(RuntimeError, match=f"{RULE} and adamw begin with other losses"):
        comparison.compare(Shifting(lambda _: 1.0), [RULE], num_seeds=1, num_tuning_seeds=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps=15"], "--steps must be a positive multiple of 10, got 15"),
        (["--rules=[nothing]"], "there is no rule 'nothing'"),
        (["--rules=[lstm-mnist,lstm-mnist]"], "--rules names a rule twice"),
        (["--num-seeds=0"], "--num-seeds must be at least 1"),
        (["--state-dtype=float16"], "state_dtype"),
    ],
)
def test_what_the_user_can_mend_is_one_message(arguments, message, fails, tmp_path):
    assert message in fails("example", "transformer", f"--out={tmp_path}", "--accelerator=cpu", *arguments)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_named_before_anything_runs(fails, tmp_path):
    (tmp_path / "file").touch()
    assert "--out says where" in fails("example", "transformer", f"--out={tmp_path / 'file'}")


ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["resnet", "transformer"])
def test_the_readmes_table_is_the_committed_results(name):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    folder = ROOT / "benchmarks/results/examples" / name
    document = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert document["quick"] is False
    assert document["num_seeds"] >= 3
    for row in comparison.rows(document):
        assert f"| {name} | {' | '.join(row)} |" in readme
    for numbers in document["optimizers"].values():
        values = torch.tensor(numbers["held_out_losses"], dtype=torch.float64)
        assert numbers["held_out_loss"]["mean"] == pytest.approx(Interval.of(values).mean)
    assert document["commit"] in readme
    assert (folder / "curves.png").is_file()
