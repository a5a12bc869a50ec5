"""The loops of docs/examples/loops train as the plain one does: others' loops are held to it, bit for bit."""

import functools
import importlib
import re
from pathlib import Path

import pytest
import torch

from l2l_lightning import LearnedOptimizer

LOOPS = Path(__file__).parents[2] / "docs/examples/loops"
PAGE = (LOOPS.parents[1] / "loops.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(LOOPS))


@functools.cache
def plain():
    return importlib.import_module("plain").main()


def parameters(network):
    return [parameter.detach().clone() for parameter in network.parameters()]


def assert_as_plain(network):
    for found, expected in zip(parameters(network), parameters(plain()[0]), strict=True):
        assert torch.equal(found, expected)


def differ(network):
    pairs = zip(parameters(network), parameters(plain()[0]), strict=True)
    return any(not torch.equal(found, expected) for found, expected in pairs)


def learned(network):
    """The loss on all data, as a part of what it was."""
    problem = importlib.import_module("small_problem")
    inputs, labels = problem.make_data().tensors
    with torch.no_grad():
        before, after = (problem.mse(n(inputs), labels).item() for n in (problem.make_network(), network))
    return after / before


@pytest.mark.parametrize("path", sorted(LOOPS.glob("*.py")), ids=lambda path: path.stem)
def test_a_loop_is_short_and_the_page_has_it(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    assert f"(examples/loops/{path.name})" in PAGE
    assert path.stem == "small_problem" or f"docs/examples/loops/{path.name}" in text


def test_the_pages_excerpts_are_lines_of_the_files():
    sections = PAGE.split("\n## ")[1:]
    assert len(sections) == 8
    for section in sections:
        (name,) = re.findall(r"\(examples/loops/(\w+\.py)\)", section)
        excerpt = re.search(r"^```text\n(.*?)^```", section, re.DOTALL | re.MULTILINE)[1]
        assert set(excerpt.splitlines()) <= set((LOOPS / name).read_text(encoding="utf-8").splitlines())


def test_the_plain_loop_learns():
    network, losses = plain()
    assert len(losses) == 40
    assert learned(network) < 0.25


def test_lightning_counts_the_steps_and_trains_alike():
    assert_as_plain(importlib.import_module("with_lightning").main())


@pytest.mark.slow  # its imports take long
def test_transformers_trains_alike_without_its_schedule_and_clipping(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    loop = importlib.import_module("with_transformers")
    assert_as_plain(loop.main(str(tmp_path)))
    assert differ(loop.main(str(tmp_path), lr_scheduler_type="linear"))
    assert differ(loop.main(str(tmp_path), max_grad_norm=0.1))


@pytest.mark.slow  # its imports take long
def test_accelerate_trains_alike():
    pytest.importorskip("accelerate")
    assert_as_plain(importlib.import_module("with_accelerate").main())


def test_fsdp2_trains_alike(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    found = importlib.import_module("with_fsdp2").main()
    for value, expected in zip(found, parameters(plain()[0]), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow  # it compiles
def test_a_compiled_step_trains_alike_to_rounding():
    found = parameters(importlib.import_module("with_compile").main())
    for value, expected in zip(found, parameters(plain()[0]), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-4)


def test_an_average_is_beside_the_training_and_ends_near_it():
    loop = importlib.import_module("with_average")
    network, average = loop.main(decay=0.9)
    assert_as_plain(network)
    problem = importlib.import_module("small_problem")
    twin, expected = problem.make_network(), None
    start, optimizer = parameters(twin), LearnedOptimizer(twin.parameters(), total_steps=problem.STEPS)
    for inputs, labels in problem.make_loader():
        optimizer.zero_grad()
        problem.mse(twin(inputs), labels).backward()
        optimizer.step()
        now = [value.double() for value in parameters(twin)]
        expected = (
            now if expected is None else [0.9 * e + 0.1 * n for e, n in zip(expected, now, strict=True)]
        )
    for found, value in zip(parameters(average), expected, strict=True):
        torch.testing.assert_close(found.double(), value, rtol=1e-5, atol=1e-6)

    def distance(these, those):
        return sum((a - b).square().sum() for a, b in zip(these, those, strict=True)).sqrt()

    trained = parameters(network)
    assert distance(parameters(average), trained) < 0.1 * distance(start, trained)


def test_a_grad_scaler_changes_nothing_and_a_skipped_step_is_not_counted():
    loop = importlib.import_module("with_grad_scaler")
    network, optimizer = loop.main(autocast=False)  # its scale is a power of two
    assert_as_plain(network)
    assert optimizer.param_groups[0]["step"] == loop.STEPS
    network, optimizer = loop.main(autocast=False, overflow_at=3)
    assert optimizer.param_groups[0]["step"] == loop.STEPS - 1
    assert all(value.isfinite().all() for value in parameters(network))


def test_mixed_precision_learns():
    loop = importlib.import_module("with_grad_scaler")
    network, _ = loop.main()
    assert learned(network) < 0.25


def test_a_constant_scheduler_changes_nothing_and_another_multiplies():
    loop = importlib.import_module("with_scheduler")
    network, rates = loop.main(loop.constant)
    assert_as_plain(network)
    assert rates == [1.0] * loop.STEPS
    network, rates = loop.main(loop.cosine)
    assert differ(network)
    half = 0.5 * (1 + torch.cos(torch.arange(loop.STEPS) * torch.pi / loop.STEPS))
    torch.testing.assert_close(torch.tensor(rates), half)


def test_a_scheduler_multiplies_the_update_and_leaves_the_rules_state():
    """With gradients that θ does not change, half of lr is half of every move."""
    moved = []
    for factor in (1.0, 0.5):
        parameter = torch.nn.Parameter(torch.zeros(6))
        optimizer = LearnedOptimizer([parameter], rule="lstm-mnist")
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step, factor=factor: factor)
        for _ in range(5):
            parameter.grad = torch.linspace(-1, 1, 6)
            optimizer.step()
            scheduler.step()
        moved.append((parameter.detach(), optimizer.state[parameter]["rule_state"]))
    assert torch.equal(0.5 * moved[0][0], moved[1][0])
    assert torch.equal(moved[0][1], moved[1][1])
