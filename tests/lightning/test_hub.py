"""Rules on the Hugging Face Hub, by its client and a stand-in: what is pushed comes back, or it says why."""

import json
import os
import subprocess
import sys

import pytest
import torch
from hub_stand_in import TOKEN, Hub
from learned_momentum import LearnedMomentum

from l2l_lightning import LearnedOptimizer, MetaLearner, Quadratic, load
from l2l_lightning.errors import HubError, L2LError, MissingPackageError, WeightsError
from l2l_lightning.pretrained import card, hub, push_to_hub
from l2l_lightning.rules import CoordinatewiseLSTM

constants = pytest.importorskip("huggingface_hub.constants")


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    server = Hub()
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.stop()


@pytest.fixture
def rule():
    torch.manual_seed(0)
    return CoordinatewiseLSTM(num_layers=1, hidden_size=3)


def assert_same(found, rule):
    assert type(found) is type(rule)
    for key, value in rule.state_dict().items():
        assert torch.equal(found.state_dict()[key], value)


def test_what_is_pushed_is_loaded_by_name_wherever_a_rule_is_named(stand_in, rule):
    url = push_to_hub(
        rule, "me/rule", {"meta_training": {"seed": 3}, "known_failures": ["none"]}, private=True
    )
    assert url.startswith(f"{stand_in.url}/me/rule/commit/")
    assert stand_in.private["me/rule"] is True
    assert_same(load("me/rule"), rule)
    assert card("me/rule")["meta_training"] == {"seed": 3}
    assert card("me/rule")["rule"] == {"class": "CoordinatewiseLSTM"}
    parameter = torch.nn.Parameter(torch.ones(2))
    assert LearnedOptimizer([parameter], "me/rule").param_groups[0]["rule"].startswith("rule@")
    other = CoordinatewiseLSTM(num_layers=1, hidden_size=3)
    assert_same(MetaLearner(Quadratic(), other, start_from="me/rule").rule, rule)


def test_a_commit_holds_plain_numbers_and_texts_alone(stand_in, rule):
    push_to_hub(rule, "me/rule", card("lstm-mnist"))
    (files,) = stand_in.repositories["me/rule"]
    assert set(files) == {"rule.safetensors", "rule.json", "README.md"}
    assert json.loads(files["rule.json"])["headline"] == card("lstm-mnist")["headline"]
    readme = files["README.md"].decode()
    assert readme.startswith("---\nlibrary_name: l2l-lightning\n")
    adam = card("lstm-mnist")["headline"]["optimizers"]["adam"]["final_loss"]
    low, high = adam["ci95"]
    assert f"| adam | {adam['mean']:.4g} [{low:.4g}, {high:.4g}] |" in readme
    assert 'LearnedOptimizer(model.parameters(), rule="me/rule")' in readme
    assert all(f"- {failure}" in readme for failure in card("lstm-mnist")["known_failures"])


def test_a_repository_keeps_its_revisions(stand_in, rule):
    first = push_to_hub(rule, "me/rule").rpartition("/")[2]
    changed = CoordinatewiseLSTM(num_layers=1, hidden_size=3)
    push_to_hub(changed, "me/rule", message="Another one")
    assert_same(load("me/rule"), changed)
    assert_same(load("me/rule", revision=first), rule)
    with pytest.raises(HubError, match=r"me/rule on http://127\.0\.0\.1:\d+ has no revision 'v9'"):
        load("me/rule", revision="v9")
    with pytest.raises(ValueError, match="revision must be None where the rule is not the hub's, got 'v9'"):
        load("lstm-mnist", revision="v9")


def test_what_is_in_the_cache_needs_no_network(stand_in, rule, monkeypatch):
    push_to_hub(rule, "me/rule")
    load("me/rule")
    stand_in.stop()
    assert_same(load("me/rule"), rule)
    with pytest.raises(HubError, match=r"^me/new on .*: cannot upload the rule: \w+: .*refused"):
        push_to_hub(rule, "me/new")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_same(load("me/rule"), rule)
    with pytest.raises(HubError, match=r"^me/other on .* cannot be reached, and .* not in the cache: "):
        load("me/other")
    (path,) = hub.cached_rules()
    assert path.parents[2].name == "models--me--rule"


def test_a_class_of_ones_own_is_imported_where_its_module_is_trusted(stand_in):
    push_to_hub(LearnedMomentum(), "me/momentum")
    readme = stand_in.repositories["me/momentum"][0]["README.md"].decode()
    assert 'load("me/momentum", trust=["MODULE"])' in readme
    with pytest.raises(WeightsError, match=r"names learned_momentum\.LearnedMomentum"):
        load("me/momentum")
    assert_same(load("me/momentum", trust=["learned_momentum"]), LearnedMomentum())


REFUSED = [
    ("me/nothing", HubError, r"there is no such repository, or it is private: log in with `hf auth login`"),
    ("me/a-gated", HubError, "is gated: ask for access on its page"),
    ("me/a-private", HubError, "there is no such repository, or it is private"),
    ("me/data", HubError, r"has no file rule\.safetensors: it is not a rule that push_to_hub uploaded"),
    ("me/junk", WeightsError, r"rule\.safetensors cannot be read as safetensors"),
    ("me/large", HubError, r"rule\.safetensors has 300,000,000 bytes"),
    ("me/a..b", HubError, "cannot load rule.safetensors: HFValidationError"),
]


@pytest.mark.parametrize(("name", "error", "message"), REFUSED)
def test_what_cannot_be_loaded_is_said_in_one_line(stand_in, name, error, message):
    for private in ("me/a-gated", "me/a-private"):
        stand_in.repositories[private] = [{}]
    stand_in.repositories["me/data"] = [{"data.csv": b"1"}]
    stand_in.repositories[name] = stand_in.repositories.get(name) or [{"rule.safetensors": b"junk"}]
    if name == "me/nothing":
        del stand_in.repositories[name]
    if name == "me/large":
        stand_in.sizes["rule.safetensors"] = 300_000_000
    with pytest.raises(error, match=message) as caught:
        load(name)
    assert "\n" not in str(caught.value)
    assert not any(request.startswith("GET") for request in stand_in.requests if "large" in request)


def test_what_cannot_be_pushed_is_said_in_one_line(stand_in, rule, monkeypatch):
    with pytest.raises(ValueError, match="must be of the form 'USER/REPOSITORY', got 'rule'"):
        push_to_hub(rule, "rule")
    with pytest.raises(ValueError, match=r"JSON compliant"):
        push_to_hub(rule, "me/rule", {"loss": float("nan")})
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match=r"refuses to upload the rule \(401: Invalid.*set HF_TOKEN") as caught:
        push_to_hub(rule, "me/rule")
    assert "\n" not in str(caught.value)
    assert stand_in.repositories == {}


def test_a_folder_of_the_name_changes_nothing_and_a_path_is_a_file(stand_in, rule, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me/rule").mkdir(parents=True)
    push_to_hub(rule, "me/rule")
    assert_same(load("me/rule"), rule)
    requests = len(stand_in.requests)
    with pytest.raises(WeightsError, match="there is no such file"):
        load("me/rule.safetensors")
    with pytest.raises(WeightsError, match="is a checkpoint, which holds a rule and its training"):
        load("me/rule.ckpt")
    assert len(stand_in.requests) == requests


def test_without_the_client_the_extra_is_named(monkeypatch, rule):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (lambda: load("me/rule"), lambda: card("me/rule"), lambda: push_to_hub(rule, "me/rule")):
        with pytest.raises(MissingPackageError, match=r"pip install 'l2l-lightning\[hub\]'") as caught:
            call()
        assert isinstance(caught.value, L2LError)
    assert hub.cached_rules() == []


@pytest.mark.slow
def test_the_clients_own_variables_hold(stand_in, rule, tmp_path):
    push_to_hub(rule, "me/rule")
    environment = {**os.environ, "HF_ENDPOINT": stand_in.url, "HF_HOME": str(tmp_path / "home")}
    program = "from l2l_lightning import load; print(load('me/rule').spec.hidden_size)"
    for more in ({}, {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:1"}):
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=environment | more,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stdout == "3\n", done.stderr
