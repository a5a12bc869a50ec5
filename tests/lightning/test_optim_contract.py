"""What PyTorch's own optimizer tests ask of every optimizer, asked of LearnedOptimizer."""

import copy
import io
import pickle
import re

import pytest
import torch
from mixed_features import TensorwiseMomentum
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from l2l_lightning import CoordinatewiseLSTM, LearnedOptimizer
from l2l_lightning.optim.pack import STATE, STATISTICS
from l2l_lightning.rules import Grouped, RNNprop, ZeroShot

RNNPROP = RNNprop(hidden_size=4)
RNNPROP.reset_parameters(torch.Generator().manual_seed(0))
GROUPED = Grouped({"weight": RNNPROP, "bias": TensorwiseMomentum()})
OPTIONS = [
    {},
    {"lr": torch.tensor(0.1)},
    {"maximize": True, "weight_decay": 0.1},
    {"rule": "lstm-quadratic"},
    {"state_dtype": torch.bfloat16},
    {"rule": RNNPROP, "state_dtype": torch.bfloat16},
    {"rule": GROUPED, "total_steps": 100},
    {"rule": None, "total_steps": 100},
    {"rule": None},
    {"rule": ZeroShot(), "total_steps": 100, "weight_decay": 0.1},
    {"rule": ZeroShot(compact=True), "total_steps": 100},
    {"rule": Grouped({"weight": ZeroShot(False, True), "bias": RNNPROP}), "maximize": True},
]


def make(arguments=None, dtype=torch.float32, seed=0):
    """A model whose loss on its input it can decrease, and its optimizer."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).to(dtype)
    return model, LearnedOptimizer(model.named_parameters(), **{"rule": "lstm-mnist"} | (arguments or {}))


def train(model, optimizer, steps):
    x = torch.linspace(-1, 1, 12).view(3, 4).to(next(model.parameters()).dtype)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - 1).float().square().mean().backward()
        optimizer.step()


def assert_same(a, b):
    for ours, theirs in zip(a[0].parameters(), b[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert a[1].state[ours].keys() == b[1].state[theirs].keys()
        assert all(map(torch.equal, a[1].state[ours].values(), b[1].state[theirs].values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arguments", OPTIONS, ids=str)
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
    train(*half, 1)  # whose state is another's no more
    train(*resumed, 3)
    assert_same(resumed, straight)


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
    pair, other = make({"lr": 0.3, "weight_decay": 0.1, "total_steps": 7}), make()
    train(*pair, 2)
    other[1].load_state_dict(pair[1].state_dict())
    assert (
        other[1].param_groups[0].items()
        >= {"lr": 0.3, "weight_decay": 0.1, "total_steps": 7, "step": 2}.items()
    )
    other[1].add_param_group({"params": [("new", nn.Parameter(torch.ones(2)))], "lr": 1.0})
    train(*other, 1)


@pytest.mark.parametrize("arguments", [{"total_steps": 9}, {"rule": RNNPROP}], ids=str)
def test_a_state_dict_of_the_version_before_is_read(arguments):
    """Its groups counted no steps, and T was not known to them."""
    pair, twin = make(arguments), make(arguments, seed=1)
    train(*pair, 2)
    saved = pair[1].state_dict()
    for key in ("step", "total_steps"):
        del saved["param_groups"][0][key]
    twin[1].load_state_dict(saved)
    twin[0].load_state_dict(pair[0].state_dict())
    for trained in (pair, twin):
        train(*trained, 2)
    assert_same(pair, twin)
    assert (twin[1].param_groups[0]["total_steps"], twin[1].param_groups[0]["step"]) == (
        arguments.get("total_steps"),
        2,
    )


def assert_refused(pair, state_dict, error, message):
    """It says why, has changed nothing, and the training goes on."""
    before = copy.deepcopy(pair)
    with pytest.raises(error, match=re.compile(message, re.DOTALL)):
        pair[1].load_state_dict(state_dict)
    assert_same(pair, before)
    assert pair[1].state_dict()["param_groups"] == before[1].state_dict()["param_groups"]
    for trained in (pair, before):
        train(*trained, 1)
    assert_same(pair, before)


OTHERS = {
    "another rule": (
        lambda named: LearnedOptimizer(named, "lstm-mnist"),
        "of rule lstm-mnist@.*the optimizer's is RNNprop@",
    ),
    "another optimizer": (torch.optim.Adam, "not a LearnedOptimizer's"),
    "another state dtype": (
        lambda named: LearnedOptimizer(named, RNNPROP, state_dtype=torch.bfloat16),
        r"torch\.bfloat16.*torch\.float32.*construct it with state_dtype=torch\.bfloat16",
    ),
    "names in another order": (
        lambda named: LearnedOptimizer(named[::-1], RNNPROP),
        "another order: '0.weight' is number 3 of its group 0, and number 0 of group 0",
    ),
    "shapes in another order": (
        lambda named: LearnedOptimizer([parameter for _, parameter in named[::-1]], RNNPROP),
        r"'0.weight' has shape \[6, 4\].*the state dict's is \[2, 2, 4, 2\].*another order",
    ),
    "fewer parameters": (
        lambda named: LearnedOptimizer(named[:3], RNNPROP),
        "doesn't match the size of optimizer's group",
    ),
    "more groups": (
        lambda named: LearnedOptimizer([{"params": named[:2]}, {"params": named[2:]}], RNNPROP),
        "different number of parameter groups",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_state_dict_of_another_optimizer_is_refused(case):
    pair = make({"rule": RNNPROP})
    train(*pair, 2)
    make_other, message = OTHERS[case]
    model, _ = make()
    other = make_other(list(model.named_parameters()))
    train(model, other, 1)
    assert_refused(pair, other.state_dict(), ValueError, message)


CHANGES = {
    "a rate": (lambda entries: {}, {"lr": "x"}, TypeError, "lr must be a number"),
    "a decay": (lambda entries: {}, {"weight_decay": float("nan")}, ValueError, "must not be negative"),
    "a direction": (lambda entries: {}, {"maximize": 3}, TypeError, "maximize must be true or false"),
    "an infinite state": (lambda e: {STATE: e[STATE] - torch.inf}, {}, ValueError, "not finite"),
    "an infinite statistic": (
        lambda e: {STATISTICS: e[STATISTICS] * torch.nan},
        {},
        ValueError,
        "a number that is not finite",
    ),
    "no statistics": (lambda e: {STATISTICS: None}, {}, ValueError, "not 'statistics'"),
    "fewer statistics": (
        lambda e: {STATISTICS: e[STATISTICS][:2]},
        {},
        ValueError,
        r"a state of \[3, 6, 4\]",
    ),
    "rounded statistics": (
        lambda e: {STATISTICS: e[STATISTICS].bfloat16()},
        {},
        ValueError,
        "torch.bfloat16, the optimizer's are torch.float32",
    ),
    "another optimizer's state": (
        lambda e: {STATE: None, "exp_avg": e[STATE]},
        {},
        ValueError,
        r"'0.weight': the state dict has \['exp_avg', 'statistics'\] for it",
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_state_dict_that_no_optimizer_could_have_is_refused(case):
    pair = make({"rule": RNNPROP})
    train(*pair, 2)
    saved = pair[1].state_dict()
    change, options, error, message = CHANGES[case]
    entries = saved["state"][0] | change(saved["state"][0])
    saved["state"] = saved["state"] | {0: {key: value for key, value in entries.items() if value is not None}}
    saved["param_groups"][0] |= options
    assert_refused(pair, saved, error, message)


def test_parameters_keep_their_names_when_a_state_dict_has_others():
    """A compiled model's and a renamed layer's are no other order, unless the rule chooses by them."""
    model, optimizer = make({"rule": GROUPED, "total_steps": 9})
    train(model, optimizer, 2)
    names = optimizer.param_groups[0]["param_names"]
    for new in ([f"_orig_mod.{name}" for name in names], [name.replace("2.", "head.") for name in names]):
        twin = LearnedOptimizer(zip(new, model.parameters(), strict=True), GROUPED, total_steps=9)
        twin.load_state_dict(optimizer.state_dict())
        assert_same((model, optimizer), (model, twin))
        assert twin.param_groups[0]["param_names"] == new
    new = [name.replace("2.bias", "2.weight_too") for name in names]
    twin = LearnedOptimizer(zip(new, model.parameters(), strict=True), GROUPED, total_steps=9)
    with pytest.raises(ValueError, match=r"'2\.bias' is '2\.weight_too' here, which another rule of Grouped"):
        twin.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("arguments", OPTIONS, ids=str)
def test_copies_go_on_by_themselves(arguments, how):
    pair = make(arguments)
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
    """What is checked, and loaded, is what the user's hooks have made of a state dict."""
    pair = make()
    train(*pair, 2)
    seen = []
    optimizer = pair[1]

    def mends(optimizer, state_dict):
        seen.append(sorted(state_dict))
        (group,) = state_dict["param_groups"]
        return {"state": {}, "param_groups": [group | {"lr": 0.5}]}

    optimizer.register_state_dict_pre_hook(lambda o: seen.append("saving"))
    optimizer.register_state_dict_post_hook(lambda o, state: state | {"note": "kept"})
    optimizer.register_load_state_dict_pre_hook(mends)
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(len(o.state)))
    saved = optimizer.state_dict()
    assert saved["note"] == "kept"
    saved["param_groups"][0]["lr"] = "no number"
    optimizer.load_state_dict(saved)
    assert seen == ["saving", ["note", "param_groups", "state"], 0]
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 1


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
        optimizer.add_param_group({"params": [("again", model[0].weight)]})
    with pytest.raises(TypeError, match="param_group must be a dict"):
        optimizer.add_param_group([nn.Parameter(torch.ones(1))])
    optimizer.add_param_group({"params": [("new", nn.Parameter(torch.ones(1)))]})
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


def test_nothing_to_do():
    parameter = nn.Parameter(torch.ones(2))
    LearnedOptimizer([parameter], "lstm-mnist").step()
    empty = LearnedOptimizer([{"params": []}, {"params": [nn.Parameter(torch.ones(0))]}], "lstm-mnist")
    empty.param_groups[1]["params"][0].grad = torch.ones(0)
    empty.step()
    assert torch.equal(parameter, torch.ones(2))
    assert empty.state_bytes == 0
