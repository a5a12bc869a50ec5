"""What the optimizer-step benchmark times, and what it refuses to time."""

import json
import sys
from pathlib import Path

import pytest
import torch
import torchvision

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import optimizer_step

from l2l_lightning import LearnedOptimizer


def test_the_parameters_are_a_resnet18s():
    theirs = [tuple(parameter.shape) for parameter in torchvision.models.resnet18().parameters()]
    assert list(optimizer_step.resnet18_shapes(64)) == theirs


def test_every_optimizer_is_timed_and_its_state_counted(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(optimizer_step, "SQUARES", (100, 400))
    monkeypatch.setattr(optimizer_step, "TURNS", 2)
    optimizer_step.main(["--device", "cpu", "--width", "1", "--json", str(tmp_path / "step.json")])
    document = json.loads((tmp_path / "step.json").read_text())
    rows = document["rows"]
    assert rows.keys() == optimizer_step.OPTIMIZERS.keys()
    assert [round(row["state_bytes_per_coordinate"]) for row in rows.values()] == [320, 160, 320, 8, 8]
    assert rows["learned"]["ratio"] == 1
    printed = capsys.readouterr().out
    for name, row in rows.items():
        assert row["ratio"] == pytest.approx(row["ms"] / rows["learned"]["ms"])
        assert name in printed
    assert len(document["in_turns"]) == 4
    for in_turns in document["in_turns"].values():
        assert in_turns.keys() >= optimizer_step.IN_TURNS.keys() | optimizer_step.peers().keys()
        assert in_turns[optimizer_step.PLAIN]["gb_per_s"] > 0
        assert in_turns["AdamW, fused"]["ratio"] == in_turns["AdamW, fused"]["least_over_least"] == 1
        assert in_turns["ZeroShot"]["share_of_orthogonalisation"] < 1
    resnet, *_ = document["in_turns"].values()
    assert resnet[optimizer_step.PLAIN]["host_and_packing"] > -1
    assert "Muon" in resnet
    assert document["coordinates"] == sum(torch.Size(s).numel() for s in optimizer_step.resnet18_shapes(1))


def test_nothing_is_timed_if_the_launches_disagree(monkeypatch):
    wrong = lambda params: LearnedOptimizer(params, optimizer_step.RULE, lr=0.9)  # noqa: E731
    monkeypatch.setitem(optimizer_step.OPTIMIZERS, "learned, launch per tensor", wrong)
    with pytest.raises(RuntimeError, match="nothing is timed"):
        optimizer_step.main(["--device", "cpu", "--width", "1"])
