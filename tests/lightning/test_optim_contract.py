"""What PyTorch's own optimizer tests ask of every optimizer, asked of LearnedOptimizer."""

import copy
import io
import itertools
import pickle
import re

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from l2l_lightning import CoordinatewiseLSTM, LearnedOptimizer
from l2l_lightning.optim.learned_optimizer import STATE, STATISTICS
from l2l_lightning.rules import RNNprop

RNNPROP = RNNprop(hidden_size=4)
RNNPROP.reset_parameters(torch.Generator().manual_seed(0))
OPTIONS = [
    {},
    {"lr": 0.1},
    {"lr": torch.tensor(0.1)},
    {"weight_decay": 0.1},
    {"maximize": True, "weight_decay": 0.1},
    {"rule": "lstm-quadratic"},
    {"state_dtype": torch.bfloat16},
]


def make(arguments=None, dtype=torch.float32, named=False, seed=0):
    """A model whose loss on its input it can decrease, and its optimizer."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).to(dtype)
    parameters = model.named_parameters() if named else model.parameters()
    return model, LearnedOptimizer(parameters, **{"rule": "lstm-mnist"} | (arguments or {}))


def train(model, optimizer, steps, sign=1):
    x = torch.linspace(-1, 1, 12).view(3, 4).to(next(model.parameters()).dtype)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = sign * (model(x) - 1).float().square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_same(a, b):
    for ours, theirs in zip(a[0].parameters(), b[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert a[1].state[ours].keys() == b[1].state[theirs].keys()
        assert all(map(torch.equal, a[1].state[ours].values(), b[1].state[theirs].values()))


def test_it_goes_in_the_right_direction():
    for arguments in OPTIONS:
        sign = -1 if arguments.get("maximize") else 1
        losses = train(*make(arguments), 40, sign)
        assert sign * (losses[0] - losses[-1]) > 0.1, arguments


def test_maximising_is_minimising_the_negative():
    up, down = make({"maximize": True}), make()
    train(*up, 5)
    train(*down, 5, sign=-1)
    assert_same(up, down)


@pytest.mark.parametrize(
    ("arguments", "dtype"),
    [
        ({}, torch.bfloat16),
        ({"lr": torch.tensor(0.1)}, torch.float32),
        ({"maximize": True, "weight_decay": 0.1}, torch.float32),
        ({"rule": "lstm-quadratic"}, torch.float32),
        ({"state_dtype": torch.bfloat16}, torch.bfloat16),
        ({"rule": RNNPROP, "state_dtype": torch.bfloat16}, torch.bfloat16),
    ],
    ids=str,
)
def test_a_saved_state_resumes_bit_identically(arguments, dtype, tmp_path):
    straight, half = make(arguments, dtype), make(arguments, dtype)
    train(*straight, 6)
    train(*half, 3)
    torch.save({"model": half[0].state_dict(), "optimizer": half[1].state_dict()}, tmp_path / "half.pt")
    saved = torch.load(tmp_path / "half.pt", weights_only=True)
    resumed = make(arguments, dtype, seed=1)
    resumed[0].load_state_dict(saved["model"])
    identities = [id(p) for group in resumed[1].param_groups for p in group["params"]]
    resumed[1].load_state_dict(saved["optimizer"])
    assert [id(p) for group in resumed[1].param_groups for p in group["params"]] == identities
    assert_same(resumed, half)
    train(*resumed, 3)
    assert_same(resumed, straight)


def plain(value):
    if isinstance(value, dict):
        return all(plain(key) and plain(entry) for key, entry in value.items())
    if isinstance(value, list):
        return all(map(plain, value))
    return value is None or isinstance(value, torch.Tensor | int | float | bool | str)


@pytest.mark.parametrize("arguments", [{}, {"lr": torch.tensor(0.1)}, OPTIONS[-1]], ids=str)
def test_a_state_dict_is_plain_and_its_own_copy(arguments):
    pair = make(arguments)
    assert pair[1].state_dict()["state"] == {}
    train(*pair, 2)
    state_dict = pair[1].state_dict()
    assert plain(state_dict)
    assert list(state_dict["state"]) == [0, 1, 2, 3]
    assert state_dict["state"][0][STATE].shape == (2, 2, 20, 6, 4)
    taken = copy.deepcopy(state_dict)
    twin = make(arguments, seed=1)
    twin[1].load_state_dict(state_dict)
    train(*pair, 1)
    for key, entries in twin[1].state_dict()["state"].items():
        assert torch.equal(entries[STATE], taken["state"][key][STATE])


def test_a_state_dict_from_before_the_first_step_starts_anew():
    early, late = make(), make()
    saved = copy.deepcopy(early[1].state_dict())
    train(*late, 2)
    late[1].load_state_dict(saved)
    assert not late[1].state
    late[0].load_state_dict(early[0].state_dict())
    train(*early, 2)
    train(*late, 2)
    assert_same(early, late)


def test_options_are_loaded_with_the_state():
    pair, other = make({"lr": 0.3, "weight_decay": 0.1}), make()
    train(*pair, 1)
    other[1].load_state_dict(pair[1].state_dict())
    assert (other[1].param_groups[0]["lr"], other[1].param_groups[0]["weight_decay"]) == (0.3, 0.1)
    other[1].add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": 1.0})
    train(*other, 1)


def other_state_dict(change):
    """The state dict of another optimizer, and what loading it must say."""
    model, optimizer = make(named=True)
    train(model, optimizer, 1)
    parameters = list(model.named_parameters())
    if change == "another rule":
        other = LearnedOptimizer(parameters, "lstm-mnist-relu")
        return other, "of rule lstm-mnist-relu@.*the optimizer's is lstm-mnist@"
    if change == "another optimizer":
        return torch.optim.Adam(parameters), "not a LearnedOptimizer's"
    if change == "another state dtype":
        other = LearnedOptimizer(parameters, "lstm-mnist", state_dtype=torch.bfloat16)
        return other, r"torch\.bfloat16.*torch\.float32.*construct it with state_dtype=torch\.bfloat16"
    if change == "names in another order":
        other = LearnedOptimizer(parameters[::-1], "lstm-mnist")
        return other, "another order: '0.weight' is number 3 of its group 0, and number 0 of group 0"
    if change == "shapes in another order":
        other = LearnedOptimizer([p for _, p in parameters[::-1]], "lstm-mnist")
        return other, r"'0.weight' has shape \[6, 4\].*the state dict's is \[2, 2, 20, 2\].*another order"
    if change == "fewer parameters":
        other = LearnedOptimizer(parameters[:3], "lstm-mnist")
        return other, "doesn't match the size of optimizer's group"
    groups = [{"params": parameters[:2]}, {"params": parameters[2:]}]
    return LearnedOptimizer(groups, "lstm-mnist"), "different number of parameter groups"


@pytest.mark.parametrize(
    "change",
    [
        *("another rule", "another optimizer", "another state dtype", "names in another order"),
        *("shapes in another order", "fewer parameters", "more groups"),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused(change):
    model, optimizer = make(named=True)
    train(model, optimizer, 2)
    other, message = other_state_dict(change)
    for group in other.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    other.step()
    before = copy.deepcopy((model, optimizer))
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        optimizer.load_state_dict(other.state_dict())
    assert_same((model, optimizer), before)
    train(model, optimizer, 1)
    train(*before, 1)
    assert_same((model, optimizer), before)


def test_statistics_are_float32_beside_a_rounded_state_and_are_checked():
    """A quarter of RNNprop's 3 · 4 bytes would be lost in bfloat16, and with them what a long mean adds."""
    model, optimizer = make({"rule": RNNPROP, "state_dtype": torch.bfloat16}, torch.bfloat16)
    train(model, optimizer, 3)
    saved = optimizer.state_dict()
    entries = saved["state"][0]
    assert (entries[STATE].dtype, entries[STATE].shape) == (torch.bfloat16, (2, 2, 4, 6, 4))
    assert (entries[STATISTICS].dtype, entries[STATISTICS].shape) == (torch.float32, (3, 6, 4))
    torch.testing.assert_close(entries[STATISTICS][2], torch.full((6, 4), 1 - 0.95**3))
    for wrong, message in (
        ({STATE: entries[STATE]}, "not 'statistics'"),
        (entries | {STATISTICS: entries[STATISTICS][:2]}, r"a state of \[3, 6, 4\]"),
        (
            entries | {STATISTICS: entries[STATISTICS].bfloat16()},
            "torch.bfloat16, the optimizer's are torch.float32",
        ),
        (entries | {STATISTICS: entries[STATISTICS] * torch.nan}, "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict({**saved, "state": saved["state"] | {0: wrong}})
    optimizer.load_state_dict(saved)


def test_a_gradient_that_is_missing_leaves_statistics_alone():
    model, optimizer = make({"rule": RNNPROP})
    train(model, optimizer, 2)
    before = copy.deepcopy(optimizer.state[model[0].weight])
    model[0].weight.grad = None
    optimizer.step()
    after = optimizer.state[model[0].weight]
    assert all(torch.equal(before[key], after[key]) for key in (STATE, STATISTICS))
    assert optimizer.state[model[0].bias][STATISTICS][2, 0].item() == pytest.approx(1 - 0.95**3)


def test_a_state_of_other_entries_is_refused():
    model, optimizer = make()
    train(model, optimizer, 1)
    saved = optimizer.state_dict()
    saved["state"][2] = {"exp_avg": torch.zeros(2, 6)}
    with pytest.raises(ValueError, match=r"parameter 2 of its group: the state dict has \['exp_avg'\]"):
        optimizer.load_state_dict(saved)


def test_names_of_a_compiled_model_and_of_a_renamed_layer_are_no_other_order():
    model, optimizer = make(named=True)
    train(model, optimizer, 2)
    compiled = [(f"_orig_mod.{name}", p) for name, p in model.named_parameters()]
    renamed = [(name.replace("2.", "head."), p) for name, p in model.named_parameters()]
    for names in (compiled, renamed):
        twin = LearnedOptimizer(names, "lstm-mnist")
        twin.load_state_dict(optimizer.state_dict())
        assert_same((model, optimizer), (model, twin))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_go_on_by_themselves(how):
    for arguments in (*OPTIONS, {"rule": RNNPROP, "state_dtype": torch.bfloat16}):
        assert_a_copy_goes_on(make(arguments), how)


def assert_a_copy_goes_on(pair, how):
    train(*pair, 2)
    if how == "deepcopy":
        twin = copy.deepcopy(pair)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(pair))
    else:
        buffer = io.BytesIO()
        torch.save(pair, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert_same(pair, twin)
    assert repr(twin[1]) == repr(pair[1])
    before = copy.deepcopy(pair)
    train(*twin, 2)
    assert_same(pair, before)
    train(*pair, 2)
    assert_same(pair, twin)


def test_a_pickle_is_no_larger_than_the_states():
    parameters = [nn.Parameter(torch.ones(100)) for _ in range(50)]
    optimizer = LearnedOptimizer(parameters, "lstm-mnist")
    for parameter in parameters:
        parameter.grad = torch.ones(100)
    optimizer.step()
    assert len(pickle.dumps(optimizer)) < 1.1 * optimizer.state_bytes


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.5),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 4, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 1.0, total_steps=8, cycle_momentum=False),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.1, 1.0, 2, cycle_momentum=False),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=10.0),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ExponentialLR(o, 0.5), lr_scheduler.ConstantLR(o, 0.5, 2)]
    ),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.5)], [2]
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.1, anneal_epochs=3),
}


def test_every_scheduler_of_pytorch_is_tried():
    classes = {
        name
        for name in lr_scheduler.__all__
        if isinstance(getattr(lr_scheduler, name), type) and name != "LRScheduler"
    }
    assert classes <= SCHEDULERS.keys()


@pytest.mark.parametrize("as_tensor", [False, True])
def test_schedulers_scale_the_update(as_tensor):
    for name, make_scheduler in SCHEDULERS.items():
        assert_scales(make_scheduler, torch.tensor(1.0) if as_tensor else 1.0, name)


def assert_scales(make_scheduler, lr, name):
    parameter, twin = (nn.Parameter(torch.zeros(3)) for _ in range(2))
    # The rule sees gradients only, so that its updates are the same at every rate.
    optimizer, unscaled = (
        LearnedOptimizer([parameter], "lstm-mnist", lr=lr),
        LearnedOptimizer([twin], "lstm-mnist"),
    )
    scheduler, rates = make_scheduler(optimizer), set()
    for step in range(6):
        before = parameter.detach().clone(), twin.detach().clone()
        for p in (parameter, twin):
            p.grad = torch.full((3,), 0.1 * (step + 1))
        rate = float(optimizer.param_groups[0]["lr"])
        optimizer.step()
        unscaled.step()
        expected = rate * (twin - before[1])
        torch.testing.assert_close(parameter - before[0], expected, rtol=1e-4, atol=1e-6, msg=name)
        scheduler.step(*([float(step)] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
        rates.add(round(rate, 6))
    assert len(rates) > 1, name


def test_hooks_around_a_step_run_in_order():
    model, optimizer = make()
    seen = []
    handles = [
        optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append("before")),
        optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append("after")),
        register_optimizer_step_pre_hook(lambda o, args, kwargs: seen.append("before all")),
        register_optimizer_step_post_hook(lambda o, args, kwargs: seen.append("after all")),
    ]
    train(model, optimizer, 1)
    assert seen == ["before all", "before", "after", "after all"]
    for handle in handles:
        handle.remove()
    train(model, optimizer, 1)
    assert len(seen) == 4


def test_a_hook_may_change_the_arguments_of_a_step():
    _, optimizer = make()
    optimizer.register_step_pre_hook(lambda o, args, kwargs: ((args[0], lambda: 7.0), {}))
    assert optimizer.step() == 7.0


def test_hooks_around_saving_and_loading():
    pair = make()
    train(*pair, 2)
    seen = []
    optimizer = pair[1]
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("saving"))
    optimizer.register_state_dict_post_hook(lambda o, state: state | {"note": "kept"})
    optimizer.register_load_state_dict_pre_hook(
        lambda o, state: seen.append(sorted(state)) or {**state, "state": {}}
    )
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(len(o.state)))
    saved = optimizer.state_dict()
    assert saved["note"] == "kept"
    optimizer.load_state_dict(saved)
    assert seen == ["saving", ["note", "param_groups", "state"], 0]
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 1


def test_a_hook_may_put_names_into_another_order():
    pair, (model, optimizer) = make(named=True), make(named=True)
    train(*pair, 2)
    other = LearnedOptimizer(list(pair[0].named_parameters())[::-1], "lstm-mnist")
    for index, key in enumerate(reversed(range(4))):
        other.state[other.param_groups[0]["params"][index]] = pair[1].state[list(pair[0].parameters())[key]]

    def reorder(optimizer, state_dict):
        (group,) = state_dict["param_groups"]
        places = dict(zip(group["param_names"], group["params"], strict=True))
        names = optimizer.param_groups[0]["param_names"]
        state = {i: state_dict["state"][places[name]] for i, name in enumerate(names)}
        return {"state": state, "param_groups": [group | {"param_names": names}]}

    optimizer.register_load_state_dict_pre_hook(reorder)
    optimizer.load_state_dict(other.state_dict())
    for ours, theirs in zip(model.parameters(), pair[0].parameters(), strict=True):
        assert torch.equal(optimizer.state[ours][STATE], pair[1].state[theirs][STATE])


def test_a_step_has_a_name_in_profiles():
    model, optimizer = make()
    with torch.profiler.profile() as profile:
        train(model, optimizer, 1)
    names = {event.key for event in profile.key_averages()}
    assert "Optimizer.step#LearnedOptimizer.step" in names
    assert "Optimizer.zero_grad#LearnedOptimizer.zero_grad" in names


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        (nn.Parameter(torch.ones(1)), TypeError, "should be an iterable of Tensors"),
        ([], ValueError, "empty parameter list"),
        ([1], TypeError, "can only optimize Tensors"),
        ([torch.ones(1, requires_grad=True) * 2], ValueError, "non-leaf"),
        ([{"params": {nn.Parameter(torch.ones(1))}}], TypeError, "ordered collections"),
        ([("a", nn.Parameter(torch.ones(1))), nn.Parameter(torch.ones(1))], ValueError, "with/without names"),
    ],
)
def test_parameters_that_cannot_be_optimised(params, error, message):
    with pytest.raises(error, match=message):
        LearnedOptimizer(params, "lstm-mnist")


def test_groups_may_not_share_a_parameter():
    model, optimizer = make()
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": model[0].weight})
    with pytest.raises(TypeError, match="param_group must be a dict"):
        optimizer.add_param_group([nn.Parameter(torch.ones(1))])
    optimizer.add_param_group({"params": nn.Parameter(torch.ones(1))})
    assert len(optimizer.param_groups) == 2


def test_a_parameter_given_twice_is_updated_once():
    parameter, twin = (nn.Parameter(torch.ones(3)) for _ in range(2))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = LearnedOptimizer([parameter, parameter], "lstm-mnist")
    once = LearnedOptimizer([twin], "lstm-mnist")
    for _ in range(2):
        parameter.grad, twin.grad = torch.ones(3), torch.ones(3)
        optimizer.step()
        once.step()
    assert torch.equal(parameter, twin)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state_bytes == once.state_bytes


def test_a_group_given_by_its_dict_is_not_changed():
    group = {"params": [nn.Parameter(torch.ones(3))], "rule": CoordinatewiseLSTM(hidden_size=3)}
    for _ in range(2):
        LearnedOptimizer([group], "lstm-mnist")
    assert group.keys() == {"params", "rule"}
    assert isinstance(group["rule"], CoordinatewiseLSTM)


def test_groups_and_their_order_make_no_difference():
    results = []
    for sizes in ([4], [1, 3], [1, 1, 1, 1]):
        model, _ = make()
        parameters = iter(list(model.parameters()))
        groups = [{"params": list(itertools.islice(parameters, size))} for size in sizes]
        optimizer = LearnedOptimizer(groups, "lstm-mnist")
        train(model, optimizer, 4)
        results.append((model, optimizer))
    for other in results[1:]:
        for ours, theirs in zip(results[0][0].parameters(), other[0].parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_nothing_to_do():
    parameter = nn.Parameter(torch.ones(2))
    LearnedOptimizer([parameter], "lstm-mnist").step()
    empty = LearnedOptimizer([{"params": []}, {"params": [nn.Parameter(torch.ones(0))]}], "lstm-mnist")
    empty.param_groups[1]["params"][0].grad = torch.ones(0)
    empty.step()
    assert torch.equal(parameter, torch.ones(2))
    assert empty.state_bytes == 0
