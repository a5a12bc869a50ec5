"""The scripts of docs/examples run, and do what they say."""

from pathlib import Path

import pytest
import torch

from l2l_lightning import FunctionTask, load

EXAMPLES = Path(__file__).parents[2] / "docs/examples"


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 80


def test_the_loop_trains_with_every_optimizer_from_the_same_start(capsys):
    import own_training_loop

    assert sum(parameter.numel() for parameter in own_training_loop.make_network().parameters()) == 5130
    data = own_training_loop.load_data()
    makers = [lambda ps, steps, make=make: make(ps, 1) for make in own_training_loop.OPTIMIZERS.values()]
    start = [own_training_loop.train(make, data, seed, 0)[0] for seed in range(2) for make in makers]
    assert start == [start[0]] * 4 + [start[4]] * 4
    found = own_training_loop.main(steps=20, num_seeds=2)
    assert all((losses < torch.tensor([start[0], start[4]])).all() for losses in found.values())
    assert (found["learned"] < found["AdamW, lr 0.001"]).all()
    assert capsys.readouterr().out.count("learned - it") == 3


def test_the_optimizer_that_was_trained_on_ones_own_data_is_compared_on_its_held_out_part():
    import own_data

    assert len((EXAMPLES / "own_data.py").read_text(encoding="utf-8").splitlines()) <= 40
    comparison = own_data.main(num_rollouts=2, baselines=["sgd"])
    assert comparison.data_source == "own data: tensors [M, 2], [M] (600 + 200 + 200 examples)"
    assert {*comparison.results} == {"learned", "sgd"}
    starts = [result.losses[0] for result in comparison.results.values()]
    assert all((start - starts[0]).abs().max() < 1e-4 for start in starts)


def test_the_rule_is_learned_saved_and_used():
    import own_task_and_rule

    before, after, reached = own_task_and_rule.main()
    assert after < 0.1 * before
    assert own_task_and_rule.valley(reached) < 0.01  # from 4
    kept = load("own_rule.safetensors", trust=["own_task_and_rule"])
    assert type(kept) is own_task_and_rule.BoundedMomentum
    task = FunctionTask(own_task_and_rule.valley, dim=2)
    assert own_task_and_rule.final_loss(task, kept) == after
