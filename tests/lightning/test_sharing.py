"""What a rule does is the same after export and `load`, bit for bit; what is damaged is said in one line."""

import re

import pytest
import torch
from learned_momentum import LearnedMomentum

from l2l_lightning import CoordinatewiseLSTM, LearnedOptimizer, MetaData, MetaLearner, MetaTrainer, Quadratic
from l2l_lightning.cli import main
from l2l_lightning.errors import L2LError, WeightsError
from l2l_lightning.pretrained import card, load, save
from l2l_lightning.rules import Grouped, RNNprop, ZeroShot


def updates(rule):
    """Every iterate of five steps on two tensors, of gradients that θ changes."""
    generator = torch.Generator().manual_seed(0)
    named = [
        ("conv.weight", torch.nn.Parameter(torch.randn(4, 3, generator=generator))),
        ("theta", torch.nn.Parameter(torch.randn(5, generator=generator))),
    ]
    optimizer, found = LearnedOptimizer(named, rule, total_steps=10), []
    for _ in range(5):
        optimizer.zero_grad()
        sum((value.square() + value.sin()).sum() for _, value in named).backward()
        optimizer.step()
        found += [value.detach().clone() for _, value in named]
    return found


@pytest.mark.parametrize(
    ("make", "trust"),
    [
        (lambda: CoordinatewiseLSTM(1, 3), ""),
        (lambda: Grouped({"conv": RNNprop(1, 2), "": CoordinatewiseLSTM(1, 3)}), ""),
        (ZeroShot, ""),
        (LearnedMomentum, "learned_momentum"),
    ],
    ids=["lstm", "grouped", "zero-shot", "own"],
)
def test_an_exported_rule_makes_the_same_updates(make, trust, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rule = make()
    rule.reset_parameters(torch.Generator().manual_seed(1))
    estimator = {"estimator": "evolution"} if isinstance(rule, ZeroShot) else {}
    learner = MetaLearner(Quadratic(dim=3), rule, horizon=4, unroll=4, num_tasks=2, **estimator)
    quiet = {"enable_progress_bar": False, "logger": False, "accelerator": "cpu"}
    trainer = MetaTrainer(max_steps=2, **quiet)
    trainer.fit(learner, datamodule=MetaData(num_rollouts=2))
    trainer.save_checkpoint("last.ckpt")
    main(["export", "last.ckpt", "rule.safetensors", *([f"--trust={trust}"] if trust else [])])
    printed = capsys.readouterr().out
    assert f"l2l_lightning.load('rule.safetensors'{', trust=' if trust else ''}" in printed
    assert card("rule.safetensors")["rule"]["class"] == type(rule).__name__
    loaded = load("rule.safetensors", trust=[trust] if trust else [])
    for before, after in zip(updates(learner.rule), updates(loaded), strict=True):
        assert torch.equal(before, after)
    if trust:
        with pytest.raises(WeightsError, match=r"names learned_momentum\.LearnedMomentum\. If you trust"):
            load("rule.safetensors")


@pytest.mark.parametrize("place", [0.001, 0.3, 0.9, 0.999])
def test_a_damaged_file_is_one_error_in_one_line(place, tmp_path):
    path = tmp_path / "rule.safetensors"
    save(CoordinatewiseLSTM(1, 3), path)
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    for damaged in (content, content[: int(place * len(content))]):
        path.write_bytes(damaged)
        with pytest.raises(WeightsError, match=re.escape(str(path))) as caught:
            load(path)
        assert isinstance(caught.value, L2LError)
        assert "\n" not in str(caught.value)
