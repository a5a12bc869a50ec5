"""benchmarks/training: its optimizers are paired, its report is of its runs, its data is what it says."""

import csv
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks/training"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import compare
import loop
import quality_tables
import resnet
import transformer

from l2l_lightning.comparison.statistics import Interval
from l2l_lightning.data import load_images
from l2l_lightning.errors import CommandLineError
from l2l_lightning.rollout.optimizees import derive_generator

ROOT = Path(__file__).resolve().parents[2]
RULE = "lstm-mnist-mixture"


def digits(**changes):
    args = {"width": 2, "weights": None, "data_root": None, "seed": 3, "device": "cpu"}
    return resnet.resnet_problem(
        SimpleNamespace(**args | {"pretraining_steps": 10, "batch_size": 4} | changes)
    )


@pytest.mark.parametrize("name", ["transformer", pytest.param("resnet", marks=pytest.mark.slow)])
def test_the_report_is_of_paired_runs(name, tmp_path):
    rules = [RULE, "zero-shot"]
    compare.main([name, "--quick", "--device=cpu", f"--out={tmp_path}", "--rules", *rules, "--seed=4"])
    assert (tmp_path / "curves.png").read_bytes()[1:4] == b"PNG"
    document = json.loads((tmp_path / "results.json").read_text())
    with (tmp_path / "curves.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))

    def losses(split, step):
        """Of every seed, [4 optimizers, 2 seeds]."""
        found = [float(r["loss"]) for r in rows if (r["split"], r["step"]) == (split, str(step))]
        return torch.tensor(found, dtype=torch.float64).view(4, 2)

    assert len(rows) == 8 * (10 + 11)
    for split in ("train", "held_out"):
        assert (losses(split, 0) == losses(split, 0)[0]).all()
        assert (losses(split, 9)[1:] != losses(split, 9)[0]).all()
    assert losses("train", 0)[0, 0] != losses("train", 0)[0, 1]
    finals = losses("held_out", 10)
    names = (loop.ADAMW, loop.ADAMW_COSINE, *rules)
    for optimizer, values, state_bytes in zip(names, finals, (8, 8, 320, 12), strict=True):
        numbers = document["optimizers"][optimizer]
        assert numbers["held_out_loss"]["mean"] == pytest.approx(float(values.mean()), rel=1e-6)
        difference = float((values - finals[0]).mean())
        rounded_by = 5e-9 * float((values + finals[0]).mean())  # the file has nine digits of each
        assert numbers["loss_minus_adamw"]["mean"] == pytest.approx(difference, abs=1.01 * rounded_by)
        assert numbers["state_bytes"] / document["parameters"] == pytest.approx(state_bytes, abs=0.1)
        assert min(numbers["seconds_per_step"], numbers["cpu_seconds_per_step"]) > 0
        trials = numbers["tuning"]["trials"]
        if optimizer == "zero-shot":
            assert (trials, numbers["setting"]["lr"]) == ([], 1.0)
            continue
        assert min(trials, key=lambda trial: trial["validation_loss"])["lr"] == numbers["setting"]["lr"]
        assert len(trials) == 2
    assert {"commit", "device", "versions", "data", "threads"} <= set(document)


def test_an_evaluation_is_of_all_held_out_data_and_changes_nothing(monkeypatch):
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    inputs, labels = torch.randn(10, 3), torch.randint(4, (10,))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    monkeypatch.setattr(loop, "EVALUATION_BATCH_SIZE", 3)
    found = loop.evaluate(network, TensorDataset(inputs, labels))
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert network.training
    logits = network.eval()(inputs)
    loss, accuracy = cross_entropy(logits, labels), (logits.argmax(1) == labels).float().mean()
    assert found == pytest.approx((loss.item(), accuracy.item()))


def fake_runs(monkeypatch, loss):
    """Runs whose last held-out loss is a function of the setting."""
    monkeypatch.setattr(
        compare, "run", lambda _, setting, *__: [loop.Run([1.0], [(0, 2.0, 0.1), (10, loss(setting), 0.5)])]
    )


@pytest.mark.parametrize(
    ("loss", "best", "tried"),
    [
        (lambda s: abs(math.log(s.lr / 0.1)) + s.weight_decay, (0.1, 0.0), 4),
        (lambda s: s.lr, (0.001, 0.0), 7),  # three rates beyond the grid at most
        (lambda s: math.nan if s.lr > 0.1 else 1 / (s.lr + s.weight_decay), (0.1, 0.001), 4),
    ],
    ids=["inside", "beyond", "decay, beside what diverges"],
)
def test_a_search_tries_rates_and_then_decays(loss, best, tried, monkeypatch):
    fake_runs(monkeypatch, loss)
    trials = compare.tune(None, RULE, SimpleNamespace(quick=False))
    assert min(trials, key=trials.get) == loop.Setting(RULE, *best)
    assert len(trials) == tried


def test_what_diverges_everywhere_or_is_not_paired_is_refused(monkeypatch):
    fake_runs(monkeypatch, lambda _: math.inf)
    with pytest.raises(CommandLineError, match="adamw diverged at every setting"):
        compare.tune(None, loop.ADAMW, SimpleNamespace(quick=False))

    def run(problem, setting, stream, args):
        return [loop.Run([1.0 + (setting.optimizer == RULE)], [(0, 2.0, 0.1)], [0.1], [0.1])]

    monkeypatch.setattr(compare, "run", run)
    with pytest.raises(RuntimeError, match=f"{RULE} and adamw are not paired"):
        compare.compare(None, SimpleNamespace(rules=[RULE], untuned=[], quick=True))


def test_a_narrow_resnet_is_torchvisions_with_narrow_stages():
    ours, theirs = resnet.NarrowResNet18(64, 7), torchvision.models.resnet18(num_classes=7)
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(3, 3, 28, 28)
    assert torch.equal(ours(images), theirs(images))
    narrow = resnet.NarrowResNet18(width=4, num_classes=5)
    stages = (narrow.layer1, narrow.layer2, narrow.layer3, narrow.layer4)
    assert [stage[-1].bn2.num_features for stage in stages] == [4, 8, 16, 32]


def test_the_resnet_is_fine_tuned_with_a_new_head_on_digits_that_it_was_not_pretrained_on():
    problem, splits = digits(), load_images("mnist")
    for data, images in zip(problem[-3:], splits, strict=True):
        pixels, labels = data[:]
        new = images.labels >= 5
        assert torch.equal(labels + 5, images.labels[new])
        # Undone, torchvision's normalisation gives the grey values in every channel.
        for channel, (mean, std) in enumerate(zip(resnet.IMAGENET_MEAN, resnet.IMAGENET_STD, strict=True)):
            grey = pixels[:, channel].flatten(1) * std + mean
            torch.testing.assert_close(grey, images.pixels[new], rtol=0, atol=1e-5)

    draws = [
        loop.draw_network(problem.make_network, derive_generator(3, "test", index)).state_dict()
        for index in range(2)
    ]
    different = {key for key in draws[0] if not torch.equal(draws[0][key], draws[1][key])}
    assert different == {"fc.weight", "fc.bias"}


def test_torchvisions_weights_are_what_is_fine_tuned(monkeypatch):
    downloaded = torchvision.models.resnet18()
    monkeypatch.setattr(torchvision.models, "resnet18", lambda weights: downloaded)
    network = digits(weights="IMAGENET1K_V1").make_network()
    assert network.fc.out_features == 5
    for key, value in network.state_dict().items():
        assert key.startswith("fc.") or torch.equal(value, downloaded.state_dict()[key])


@pytest.mark.parametrize("training", [True, False])
def test_the_transformer_does_not_look_ahead(training):
    torch.manual_seed(0)
    network = transformer.CharacterTransformer(context=9, dim=8).train(training)
    text = torch.randint(128, (2, 9))
    changed = text.clone()
    changed[:, 5] = (text[:, 5] + 1) % 128
    with torch.no_grad():
        difference = (network(text) - network(changed)).abs().amax(dim=(0, 1))
    assert difference[:5].max() < 1e-6
    assert difference[5:].min() > 1e-4


def test_the_splits_are_stretches_of_the_text_without_a_paragraph_in_common():
    written = transformer.documentation()
    paragraphs = written.split("\n\n")
    assert len(written) > 100_000
    assert len(set(paragraphs)) == len(paragraphs)
    problem, text = (
        transformer.transformer_problem(SimpleNamespace(context=12, dim=8)),
        torch.tensor(list(written.encode("ascii"))),
    )
    first, second = len(text) * 8 // 10, len(text) * 9 // 10
    bounds = ((0, first, 1), (first, second, 12), (second, len(text), 12))
    for data, (start, stop, stride) in zip(problem[-3:], bounds, strict=True):
        for index in (0, 1, len(data) - 1):
            begin = start + index * stride
            inputs, labels = data[index]
            assert torch.equal(inputs, text[begin : begin + 12])
            assert torch.equal(labels, text[begin + 1 : begin + 13])
        assert stop - stride <= start + (len(data) - 1) * stride + 12 < stop


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps=15"], "--steps must be a multiple of 10, got 15"),
        (["--num-seeds=0"], "--num-seeds must be at least 1"),
        (["--rules", "lstm-mnist", "lstm-mnist"], "--rules names a rule twice"),
        (["--rules", "nothing"], "there is no rule 'nothing'"),
        (["--out=/dev/null/folder"], "--out says where"),
    ],
)
def test_what_the_user_can_mend_is_one_message(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        compare.main(["transformer", "--device=cpu", *arguments])
    assert message in f"{stopped.value.code}{capsys.readouterr().err}"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["resnet", "transformer"])
def test_the_pages_table_is_the_committed_results(name):
    page = (ROOT / "docs/trainings.md").read_text(encoding="utf-8")
    folder = ROOT / "benchmarks/results/training" / name
    document = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert document["quick"] is False
    assert document["num_seeds"] >= 3
    for optimizer, numbers in document["optimizers"].items():
        values = torch.tensor(numbers["held_out_losses"], dtype=torch.float64)
        assert numbers["held_out_loss"]["mean"] == pytest.approx(Interval.of(values).mean)
        accuracies = torch.tensor(numbers["held_out_accuracies"], dtype=torch.float64)
        assert f"| {optimizer} | {Interval.of(values)} | {Interval.of(accuracies)} |" in page
    rows = quality_tables.training(document).rows
    assert len(rows) == len(document["optimizers"])
    assert all(f"| {' | '.join(map(str, row))} |" in page for row in rows)
    assert document["commit"][:7] in page
    assert (folder / "curves.png").is_file()
