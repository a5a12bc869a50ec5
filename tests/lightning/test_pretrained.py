"""Rules as files: what is saved comes back, what is wrong is named, the package's rules do what they say."""

import contextlib
import json
import os
import pickle
import re
import sys
from decimal import Decimal
from pathlib import Path

import pytest
import torch
from learned_momentum import LearnedMomentum
from mixed_features import MixedLSTM, TensorwiseMomentum
from safetensors.torch import load_file, save_file
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import make_pretrained

from l2l_lightning import CoordinatewiseLSTM, LearnedOptimizer, Optimizees, pretrained, rules, run_rule
from l2l_lightning.class_paths import from_class_config
from l2l_lightning.comparison.baselines import BASELINES
from l2l_lightning.comparison.statistics import final_losses
from l2l_lightning.data import load_images
from l2l_lightning.pretrained import FORMAT, WeightsError
from l2l_lightning.reproduce.generalise import AIM
from l2l_lightning.reproduce.recipes import ABLATIONS
from l2l_lightning.rules import Grouped, RNNprop, Rule, UpdateRule, ZeroShot
from l2l_lightning.tasks import Task


@pytest.fixture
def rule():
    torch.manual_seed(0)
    return CoordinatewiseLSTM(num_layers=1, hidden_size=3, p=7.0, output_scale=0.3, backend="reference")


@pytest.fixture
def file(rule, tmp_path):
    """A saved rule, and a function that saves it anew with other tensors or metadata."""
    path = tmp_path / "rule.safetensors"
    pretrained.save(rule, path)
    tensors = load_file(path)
    config = json.dumps(rule.config())

    def rewrite(tensors=tensors, **metadata):
        content = {"format": FORMAT, "rule": "CoordinatewiseLSTM", "config": config} | metadata
        save_file(tensors, path, {key: value for key, value in content.items() if value is not None})
        return path

    rewrite.path, rewrite.tensors = path, tensors
    return rewrite


WRONG_TEXTS = [
    ({"format": "l2l_lightning rule, version 0"}, "version 0"),
    ({"format": None}, "None"),
    ({"rule": "os.system"}, r"'os\.system', not one of CoordinatewiseLSTM"),
    ({"config": None}, "describes no CoordinatewiseLSTM"),
    ({"config": '{"colour": 1}'}, "colour"),
    ({"config": '{"hidden_size": 4096}'}, "hidden_size must be 1 to 64, got 4096"),
    ({"config": '{"num_layers": 2, "hidden_size": 3}'}, "lacks bias_1, weight_1"),
    ({"config": '{"num_layers": 1, "hidden_size": 4}'}, "the shape of bias_0 is"),
]
WRONG_TENSORS = [
    (lambda t: t.pop("head_weight"), "lacks head_weight"),
    (lambda t: t.update(extra=torch.ones(1)), "has not: extra"),
    (lambda t: t.update(bias_0=t["bias_0"][1:].clone()), "the shape of bias_0"),
    (lambda t: t.update(bias_0=t["bias_0"].double()), "the dtype of bias_0"),
    (lambda t: t["weight_0"].__setitem__((0, 0), torch.nan), "weight_0 holds a number that is not finite"),
]


def test_what_is_wrong_with_a_file_is_named(file):
    for texts, message in WRONG_TEXTS:
        with pytest.raises(WeightsError, match=message):
            pretrained.load(file(**texts))
    for change, message in WRONG_TENSORS:
        tensors = {key: value.clone() for key, value in file.tensors.items()}
        change(tensors)
        with pytest.raises(WeightsError, match=message):
            pretrained.load(file(tensors))


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("something was unpickled",)


def test_a_foreign_file_is_refused(file, tmp_path):
    """So is every truncation of one of ours."""
    whole, path = file.path.read_bytes(), tmp_path / "foreign.safetensors"
    foreign = (b"\0" * 100, b"\xff" * 100, pickle.dumps(Bomb()), b'{"format": 1}')
    for content in (*foreign, *(whole[:length] for length in range(0, len(whole), 7))):
        path.write_bytes(content)
        with pytest.raises(WeightsError, match=r"foreign\.safetensors cannot be read as safetensors"):
            pretrained.load(path)


def test_names_that_are_none_list_those_that_are(tmp_path):
    with pytest.raises(WeightsError, match="no rule 'lstm-mars': choose one of lstm-mnist"):
        pretrained.load("lstm-mars")
    with pytest.raises(WeightsError, match="no rule 'lstm-mars'"):
        pretrained.card("lstm-mars")
    with pytest.raises(WeightsError, match="cannot be read"):
        pretrained.load(tmp_path / "absent.safetensors")


@pytest.mark.parametrize(
    ("make", "trust"),
    [
        (lambda: CoordinatewiseLSTM(1, 3, p=7.0, output_scale=0.3, backend="reference"), []),
        (lambda: RNNprop(1, 3, beta=0.8, backend="reference", precision="bf16"), []),
        (lambda: ZeroShot(orthogonal=False), []),
        (lambda: Grouped({"conv.weight|fc": RNNprop(1, 2), "": CoordinatewiseLSTM(1, 3)}), []),
        (lambda: Grouped({"a": CoordinatewiseLSTM(1, 3), "b|c": LearnedMomentum()}), ["learned_momentum"]),
        (MixedLSTM, ["mixed_features"]),
        (TensorwiseMomentum, ["mixed_features.TensorwiseMomentum"]),
    ],
)
def test_any_rule_is_saved_and_comes_back_where_it_is_trusted(make, trust, tmp_path):
    path, rule = tmp_path / "rule.safetensors", make()
    for parameter in rule.parameters():
        nn.init.normal_(parameter)
    config = rule.config()
    pretrained.save(rule, path)
    before = torch.get_rng_state()
    loaded = pretrained.load(path, trust=trust)
    assert torch.equal(torch.get_rng_state(), before)
    assert type(loaded) is type(rule)
    assert loaded.config() == config | {name: None for name in ("backend", "precision") if name in config}
    for name, value in rule.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    if trust:
        with pytest.raises(WeightsError, match=f"names {trust[0]}.*load\\(path, trust="):
            pretrained.load(path)
    named = [(name, nn.Parameter(torch.ones(2, 2))) for name in ("conv.weight", "a", "b")]
    LearnedOptimizer(named, loaded, total_steps=10).step()


def test_a_module_that_is_not_trusted_is_not_imported(tmp_path, monkeypatch, file):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "hostile.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\n")
    inside = {"rules": {"a": {"class_path": "hostile.Rule", "init_args": {}}}}
    for name, config in (
        ("hostile.Rule", {}),
        ("Grouped", inside),
        ("Grouped", inside | {"by": "hostile.f"}),
    ):
        file(rule=name, config=json.dumps(config))
        with pytest.raises(WeightsError, match=r"names hostile\."):
            pretrained.load(file.path)
    assert not (tmp_path / "mark").exists()


def test_only_what_can_be_loaded_is_saved(rule, tmp_path):
    class Mine(CoordinatewiseLSTM):
        pass

    path = tmp_path / "rule.safetensors"
    for saved, to, error, message in (
        (rule, tmp_path / "rule.pt", ValueError, r"must end in \.safetensors"),
        (Mine(hidden_size=2), path, ValueError, "must be of a class at a module's top level, .*Mine is not"),
        (nn.Linear(1, 1), path, TypeError, "rule must be a Rule, got Linear"),
        (CoordinatewiseLSTM().double(), path, ValueError, r"float32 to be saved: rule\.float\(\)"),
    ):
        with pytest.raises(error, match=message):
            pretrained.save(saved, to)
    assert not path.exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", pretrained.names())
def test_a_shipped_rule_does_what_its_card_says(name):
    """On what needs no data but the package's: the very optimizees of the card's figures, and others."""
    said, rule = pretrained.card(name)["repeatable"], pretrained.load(name)
    task = from_class_config(said["task"], Task)
    images = None if task.dataset is None else load_images(task.dataset).test
    assert images is None or said["data"] == images.source
    count = said["num_optimizees"]
    for first in (0, 1000):
        optimizees = Optimizees(task, images, said["seed"], "test", range(first, first + count))
        losses = run_rule(rule, optimizees, said["horizon"])
        low, high = said["sum_of_losses"]["ci95"]
        assert low < losses.sum(0).mean() < high
        if first == 0:
            assert losses.sum(0).mean().item() == pytest.approx(said["sum_of_losses"]["mean"], rel=1e-3)
            assert final_losses(losses).mean().item() == pytest.approx(said["final_loss"]["mean"], rel=1e-2)


@pytest.mark.parametrize("name", pretrained.names())
def test_a_card_says_where_a_rule_comes_from_and_where_it_fails(name):
    card = pretrained.card(name)
    assert {"seed", "commit", "device", "settings", "seconds", "data"} <= set(card["meta_training"])
    assert len(card["headline"]["learning_curve"]) == card["headline"]["horizon"]
    assert set(card["headline"]["optimizers"]) == {"learned", *BASELINES}
    behind = [
        row for row in card["generalisation"] if row["ratio"] is None or row["ratio"] > AIM or row["diverged"]
    ]
    *cells, _ = card["known_failures"]  # the last is about gradients of zero
    assert len(cells) == len(behind)
    text = json.dumps(card)
    assert "NaN" not in text
    assert "/" not in card["meta_training"]["data"]


def drift_in(text):
    """θ after 1,000 steps from 0 without a gradient, as a text says it."""
    return Decimal(re.search(r"from 0 to (\S+) in\s+1,000\s+steps", text)[1].replace("−", "-"))


LSTMS = [name for name in pretrained.names() if name.startswith("lstm")]


@pytest.mark.parametrize("name", sorted(set(pretrained.names()) - set(LSTMS)))
def test_a_rule_that_stands_still_without_a_gradient_has_a_card_that_says_so(name):
    assert make_pretrained.drift(pretrained.load(name)) == 0
    assert pretrained.card(name)["known_failures"] == [make_pretrained.unmoved()]


@pytest.mark.parametrize("name", LSTMS)
def test_a_card_says_how_far_its_rule_moves_a_parameter_without_a_gradient(name):
    rule, failure = pretrained.load(name), pretrained.card(name)["known_failures"][-1]
    said = drift_in(failure)
    assert failure == make_pretrained.drift_failure(float(said))
    # Half of the last printed digit, and what CPUs round in another way: float32 on AVX-512, AVX2 and SSE2,
    # the reference in float32 and the definition in float64 lie within 2e-5 (1 + |θ|) of each other.
    tolerance = 0.5 * 10.0 ** said.as_tuple().exponent + 5e-5 * (1 + abs(float(said)))
    expected = pytest.approx(float(said), abs=tolerance, rel=0)
    assert make_pretrained.drift(rule) == expected
    definition, theta = rule.double().requires_grad_(False), 0.0
    state, zero = definition.init_state(1), torch.zeros(1, dtype=torch.float64)
    for _ in range(1000):
        before = state
        update, state = definition.step(zero, state)
        theta += update.item()
    assert theta == expected
    # Without bound: the state has settled, and with it an update that is not 0.
    torch.testing.assert_close(state, before, rtol=0, atol=1e-9)
    assert abs(update.item()) > 1e-6


def test_the_parameters_that_a_card_names_move_without_a_gradient():
    embedding, unit = torch.nn.Embedding(3, 1, padding_idx=0), torch.nn.Linear(1, 1)
    with torch.no_grad():
        embedding.weight.copy_(torch.tensor([[0.0], [1.0], [0.0]]))
        unit.weight.zero_()
        unit.bias.fill_(-100.0)  # dead
    optimizer = LearnedOptimizer([*embedding.parameters(), *unit.parameters()], "lstm-mnist")
    for _ in range(100):
        optimizer.zero_grad()
        vectors = embedding(torch.tensor([0, 1]))  # padding, and a word; the other word is not in the batch
        (vectors.square().sum() + unit(vectors).relu().sum()).backward()
        optimizer.step()
    expected = make_pretrained.drift(pretrained.load("lstm-mnist"), steps=100)
    assert expected < -0.3
    for moved in (embedding.weight[0], embedding.weight[2], unit.weight[0]):
        assert moved.item() == pytest.approx(expected, rel=1e-4)


def test_the_documentation_and_the_optimizer_say_the_cards_number():
    said = drift_in(pretrained.card("lstm-mnist")["known_failures"][-1])
    page = (Path(__file__).resolve().parents[2] / "docs/use.md").read_text(encoding="utf-8")
    assert drift_in(page) == drift_in(LearnedOptimizer.__doc__) == said


def test_a_file_names_every_rule_of_the_package_in_short():
    concrete = {
        name: rule
        for name, rule in vars(rules).items()
        if isinstance(rule, type)
        and issubclass(rule, Rule)
        and rule not in (Rule, UpdateRule, rules.LSTMRule)
    }
    assert concrete == pretrained.RULES


def test_the_rules_that_experiments_need_are_shipped():
    for name in [ablation.name for ablation in ABLATIONS] + ["lstm-mnist-relu-10"]:
        assert pretrained.load(name).spec.hidden_size == 20
        assert name not in pretrained.names()
        with pytest.raises(WeightsError, match="no card"):
            pretrained.card(name)


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


CONTEXTS = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "meta": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("what", CONTEXTS)
def test_a_file_is_read_the_same_whatever_the_caller_computes_with(what):
    expected = pretrained.load("lstm-mnist")
    with CONTEXTS[what]():
        rule = pretrained.load("lstm-mnist")
    for (name, ours), theirs in zip(rule.named_parameters(), expected.parameters(), strict=True):
        assert ours.dtype == torch.float32, name
        assert ours.device.type == "cpu"
        assert torch.equal(ours, theirs)
        assert ours.requires_grad
        assert not ours.is_inference()


ARGUMENTS = {
    "p": ["NaN", "1e999", '"10"', "9" * 400, "9" * 5000],
    "num_layers": ["null", "1000000000", "[2]"],
    "hidden_size": ["1000000", "-1", "2.5", '"20"'],
    "preprocessing": ['"x"', "{}"],
    "output_scale": ["null", "-1", "Infinity"],
    "backend": ['"x"', '["cpu"]'],
    "precision": ['"tf32"', "1"],
    "gradient_scale": ["0"],
    "forget_bias": ['"x"'],
    "head_init_scale": ["NaN"],
    "f": ["1"],
}
"""JSON that no rule has as its arguments."""


def test_no_configuration_in_a_file_does_more_than_being_refused(tmp_path):
    rule = pretrained.load("lstm-mnist")
    configs = [f'{{"{name}": {value}}}' for name, values in ARGUMENTS.items() for value in values]
    tensors = {key: value.clone() for key, value in rule.state_dict().items()}
    path = tmp_path / "hostile.safetensors"
    for config in (*configs, "[" * 100_000, "null", "[]", "3", '"x"', "{"):
        metadata = {"format": pretrained.FORMAT, "rule": "CoordinatewiseLSTM", "config": config}
        save_file(tensors, path, metadata | {"sha256": pretrained._digest(tensors, metadata)})
        with pytest.raises(WeightsError, match=r"hostile\.safetensors"):
            pretrained.load(path)


def test_what_is_no_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")  # to open it would wait for ever
    (tmp_path / "folder.safetensors").mkdir()
    for path in ("pipe", "folder", "x" * 5000, "a/" * 3000, "nul\0"):
        with pytest.raises(WeightsError, match="there is no such file"):
            pretrained.load(tmp_path / f"{path}.safetensors")
