"""LearnedOptimizer: its numbers against the float64 definition, and what a training loop may ask of it."""

import copy
import itertools
import logging

import pytest
import torch
from learned_momentum import LearnedMomentum
from mixed_features import MixedLSTM, TensorwiseMomentum
from torch import nn

from l2l_lightning import CoordinatewiseLSTM, LearnedOptimizer, load, pretrained
from l2l_lightning.optim import learned_optimizer
from l2l_lightning.optim.pack import STATE, STATISTICS
from l2l_lightning.pretrained import WeightsError
from l2l_lightning.rules import Grouped, Layout, ParameterInfo, Time, ZeroShot

pytestmark = pytest.mark.filterwarnings("ignore:weight_decay=")  # so large that it shows

SHAPES = [(3, 4), (), (0,), (7,), (2, 3, 2, 2), (5, 0, 2), (1,)]
TOTAL = 20
"""T, which one of the rules reads."""


def make_rule(seed=0, **arguments):
    torch.manual_seed(seed)
    return CoordinatewiseLSTM(**{"hidden_size": 5, "head_init_scale": 1.0} | arguments)


RULES = {
    "LSTM": make_rule,
    "fused, with features": MixedLSTM,
    "of time and tensors": TensorwiseMomentum,
    "nothing fused": LearnedMomentum,
    # Orthogonalised, the rounding of small singular values grows: see test_zero_shot.py, in float64.
    "zero-shot": lambda: ZeroShot(orthogonal=False),
}


def rule_of(name):
    torch.manual_seed(0)
    return RULES[name]() if name in RULES else load(name)


LSTMS = ["LSTM", "fused, with features"]


@pytest.fixture(params=[*LSTMS, "zero-shot-free"])
def rule(request):
    of_steps = ZeroShot(orthogonal=False, horizon_free=True)
    return of_steps if request.param == "zero-shot-free" else rule_of(request.param)


def make_parameters(shapes=SHAPES, seed=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def make_gradients(shapes=SHAPES, steps=5, seed=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    decades = [10.0**e for e in (-5, -1, 0, 1)]
    return [
        [(torch.randn(s, generator=generator) * decades[(t + i) % 4]).to(dtype) for i, s in enumerate(shapes)]
        for t in range(steps)
    ]


def run(optimizer, parameters, gradients):
    """One step for each list of gradients; None leaves a parameter without one."""
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
        optimizer.step()


def expected(parameters, gradients, rule, lr=1.0, weight_decay=0.0, maximize=False):
    """Every parameter by itself, in float64, by the definition: (parameters, their states and statistics)."""
    rule = copy.deepcopy(rule).double().requires_grad_(False)
    thetas, carried = [], []
    for i, parameter in enumerate(parameters):
        theta = parameter.detach().double().reshape(-1)
        state, statistics = rule.init_state(theta.numel()), rule.init_statistics(theta.numel())
        layout = Layout((ParameterInfo("", tuple(parameter.shape)),), num_tensors=len(parameters))
        for t, step in enumerate(gradients):
            if step[i] is None:
                continue
            gradient = (-1 if maximize else 1) * step[i].double().reshape(-1)
            inputs = rule.read(gradient, statistics, Time(theta.new_tensor(t), TOTAL), layout)
            update, state = rule.step(inputs, state)
            update = rule.finish(update, inputs, theta, layout)
            theta = (1 - lr * weight_decay) * theta + lr * update
        thetas.append(theta.reshape(parameter.shape))
        both = {STATE: state} if rule.features is None else {STATE: state, STATISTICS: statistics}
        carried.append({key: x.reshape(*x.shape[:-1], *parameter.shape) for key, x in both.items()})
    return thetas, carried


def assert_close(actual, theirs, atol=2e-5):
    for a, b in zip(actual, theirs, strict=True):
        torch.testing.assert_close(a.detach().double(), b, rtol=0, atol=atol)


def assert_carried(optimizer, parameters, carried):
    """Every parameter's entries are the definition's; a statistic is as large as squares of gradients are."""
    for parameter, entries in zip(parameters, carried, strict=True):
        found = optimizer.state.get(parameter, {})
        assert not found or found.keys() == entries.keys()
        for key, value in found.items():
            torch.testing.assert_close(value.double(), entries[key], rtol=1e-4, atol=2e-5)


def flat(parameters):
    return torch.cat([p.detach().reshape(-1) for p in parameters])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(
            ("LSTM", options)
            for options in ({}, {"lr": 0.0}, {"lr": torch.tensor(0.25)}, {"weight_decay": 0.3})
        ),
        *((name, {"lr": 0.5, "weight_decay": 0.1, "maximize": True}) for name in RULES),
        *((name, {}) for name in pretrained.names() if name.startswith("lstm")),
    ],
    ids=str,
)
def test_a_step_is_the_float64_definition(name, options):
    parameters, gradients, rule = make_parameters(), make_gradients(), rule_of(name)
    before = flat(parameters)
    thetas, carried = expected(parameters, gradients, rule, **options)
    optimizer = LearnedOptimizer(parameters, rule, total_steps=TOTAL, **options)
    run(optimizer, parameters, gradients)
    assert_close(parameters, thetas)
    assert_carried(optimizer, parameters, carried)
    assert torch.equal(flat(parameters), before) is (options == {"lr": 0.0})
    assert optimizer.param_groups[0]["step"] == len(gradients)


@pytest.fixture
def launches(monkeypatch):
    """Coordinates of every fused launch."""
    counts, fused = [], CoordinatewiseLSTM.stepper

    def stepper(self):
        step = fused(self)

        def counted(theta, *arguments):
            counts.append(len(theta))
            step(theta, *arguments)

        return counted

    monkeypatch.setattr(CoordinatewiseLSTM, "stepper", stepper)
    return counts


def test_a_group_is_one_launch(launches):
    parameters = make_parameters()
    groups = [{"params": parameters[:3]}, {"params": parameters[3:], "lr": 0.1}]
    run(LearnedOptimizer(groups, make_rule()), parameters, make_gradients(steps=2))
    assert launches == [13, 32, 13, 32]


@pytest.mark.parametrize("name", RULES)
def test_a_parameter_without_a_gradient_keeps_its_value_and_its_state(name, launches):
    """Its state comes with its first gradient; and where there is none at all, nothing is launched."""
    parameters, gradients, rule = make_parameters(), make_gradients(steps=8), rule_of(name)
    present = [0b1110101, 0b1010101, 0, 0b0101010, 0b1111111, 0b1, 0b1111110, 0b1111111]
    gradients = [
        [g if mask >> i & 1 else None for i, g in enumerate(step)]
        for mask, step in zip(present, gradients, strict=True)
    ]
    thetas, carried = expected(parameters, gradients, rule, weight_decay=0.1)
    optimizer = LearnedOptimizer(parameters, rule, weight_decay=0.1, total_steps=TOTAL)
    assert not optimizer.state
    run(optimizer, parameters, gradients[:3])
    assert [p in optimizer.state for p in parameters] == [i not in (1, 3) for i in range(7)]
    run(optimizer, parameters, gradients[3:])
    assert_close(parameters, thetas)
    assert_carried(optimizer, parameters, carried)
    assert len(launches) == (7 if name == "LSTM" else 0)


@pytest.mark.parametrize("name", LSTMS)
def test_a_gradient_of_zero_is_a_gradient(name):
    rule = rule_of(name)
    (parameter,) = make_parameters([(6,)])
    before = flat([parameter])
    optimizer = LearnedOptimizer([parameter], rule)
    parameter.sum().backward()
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    assert not torch.equal(parameter, before)


def test_frozen_parameters_take_no_memory_and_may_thaw():
    model, rule = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), make_rule()
    model[0].requires_grad_(False)
    optimizer = LearnedOptimizer(model.parameters(), rule)
    assert optimizer.state_bytes == 4 * 20 * 8
    frozen = copy.deepcopy(model[0].state_dict())
    for thawed in (False, True):
        model[0].requires_grad_(thawed)
        optimizer.zero_grad()
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        assert torch.equal(model[0].weight, frozen["weight"]) is not thawed
    assert len(optimizer.state) == 4
    assert optimizer.state_bytes == 4 * 20 * (8 + 15)


def test_groups_have_rules_and_options_of_their_own_and_may_be_added_while_training():
    parameters, gradients = make_parameters(), make_gradients()
    small = {"seed": 1, "hidden_size": 3, "num_layers": 1}
    options = [
        {"rule": make_rule(), "lr": 2.0},
        {"rule": make_rule(**small), "lr": 0.5},
        {"rule": MixedLSTM(), "lr": 2.0, "weight_decay": 0.2, "maximize": True},
    ]
    parts = [slice(0, 3), slice(3, 5), slice(5, 7)]
    first, second, third = (
        {"params": parameters[part]} | option for part, option in zip(parts, options, strict=True)
    )
    seen = [[step[part] for step in gradients] for part in parts]
    seen[1] = [[2 * gradient for gradient in step] for step in seen[1]]  # which the rule does itself below
    wanted = [
        theta
        for part, option, steps in zip(parts, options, (seen[0], seen[1], seen[2][2:]), strict=True)
        for theta in expected(parameters[part], steps, **option)[0]
    ]
    second["rule"] = make_rule(**small, gradient_scale=2.0)
    default = first.pop("rule")
    del first["lr"], third["lr"]
    optimizer = LearnedOptimizer([first, second], default, lr=2.0)
    run(optimizer, parameters[:5], [step[:5] for step in gradients[:2]])
    optimizer.add_param_group(third)
    run(optimizer, parameters, gradients[2:])
    assert_close(parameters, wanted)
    assert optimizer.state[parameters[3]][STATE].shape == (1, 2, 3, 7)


def test_one_rule_may_be_named_by_name_by_path_or_be_given(tmp_path):
    path = tmp_path / "mine.safetensors"
    pretrained.save(load("lstm-mnist"), path)
    results = []
    for rule in ("lstm-mnist", path, str(path), load("lstm-mnist")):
        parameters = make_parameters()
        optimizer = LearnedOptimizer(parameters, rule)
        run(optimizer, parameters, make_gradients())
        results.append(flat(parameters))
        saved = optimizer.state_dict()
    assert all(torch.equal(result, results[0]) for result in results)
    LearnedOptimizer(make_parameters(), "lstm-mnist").load_state_dict(saved)


def test_what_happens_to_the_rule_afterwards_changes_nothing(rule):
    parameters, gradients = make_parameters(), make_gradients()
    thetas, _ = expected(parameters, gradients, rule)
    optimizer = LearnedOptimizer(parameters, rule)
    run(optimizer, parameters, gradients[:2])
    rule.reset_parameters()
    rule.double()
    run(optimizer, parameters, gradients[2:])
    assert_close(parameters, thetas)
    assert all(parameter.requires_grad for parameter in rule.parameters())


def test_strides_are_kept_and_change_nothing(rule):
    (image,) = make_parameters([(2, 3, 4, 5)])
    layouts = {
        "channels last": image.detach().to(memory_format=torch.channels_last),
        "transposed": image.detach().permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0),
        "a slice": torch.zeros(2, 3, 4, 10)[..., ::2].copy_(image.detach()),
    }
    gradients = make_gradients([image.shape])
    thetas, carried = expected([image], gradients, rule)
    for layout, data in layouts.items():
        parameter = nn.Parameter(data)
        strides, address = parameter.stride(), parameter.data_ptr()
        assert not parameter.is_contiguous(), layout
        optimizer = LearnedOptimizer([parameter], rule)
        run(optimizer, [parameter], gradients)
        assert_close([parameter], thetas)
        assert_carried(optimizer, [parameter], carried)
        assert (parameter.stride(), parameter.data_ptr()) == (strides, address)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_parameters_of_another_dtype_are_rounded_once_an_update(dtype, rule):
    gradients, parameters = make_gradients(dtype=dtype), make_parameters(dtype=dtype)
    exact = [nn.Parameter(parameter.detach().float()) for parameter in parameters]
    optimizer, theirs = (LearnedOptimizer(ps, rule, lr=0.5, weight_decay=0.1) for ps in (parameters, exact))
    for step in gradients:
        run(optimizer, parameters, [step])
        run(theirs, exact, [[g.float() for g in step]])
        for parameter, twin in zip(parameters, exact, strict=True):
            assert parameter.dtype == dtype
            if dtype == torch.float64:
                torch.testing.assert_close(parameter, twin.double(), rtol=0, atol=1e-6)
            else:
                assert torch.equal(parameter, twin.to(dtype))
                twin.data.copy_(parameter)
    assert all(x.dtype == torch.float32 for p in parameters for x in optimizer.state[p].values())


@pytest.mark.parametrize("name", LSTMS)
def test_a_state_in_bfloat16_is_rounded_once_a_step_and_statistics_are_not(name):
    rule = rule_of(name)
    parameters, gradients = make_parameters(), make_gradients()
    theta, layout = flat(parameters), Layout(tuple(ParameterInfo("", p.shape) for p in parameters))
    state, statistics = rule.init_state(len(theta), torch.bfloat16), rule.init_statistics(len(theta))
    for step in gradients:
        inputs = rule.read(flat(step), statistics, Time(torch.zeros(()), None), layout)
        rule.step_(theta, inputs, state, state)
    optimizer = LearnedOptimizer(parameters, rule, state_dtype=torch.bfloat16)
    run(optimizer, parameters, gradients)
    torch.testing.assert_close(flat(parameters), theta, rtol=0, atol=1e-6)
    for parameter in parameters:
        assert optimizer.state[parameter][STATE].dtype == torch.bfloat16
        assert optimizer.state[parameter].get(STATISTICS, statistics).dtype == torch.float32


def test_memory_is_told_before_it_is_taken(caplog):
    with torch.device("meta"):
        model = nn.Linear(100_000, 100_000, bias=False)
    sizes = {
        dtype: LearnedOptimizer(model.parameters(), "lstm-mnist", state_dtype=dtype).state_bytes
        for dtype in (None, torch.float32, torch.bfloat16)
    }
    assert sizes == {None: 80 * 4 * 10**10, torch.float32: 80 * 4 * 10**10, torch.bfloat16: 80 * 2 * 10**10}
    parameters = make_parameters([(2**18,)])
    optimizer = LearnedOptimizer(parameters, "lstm-mnist")
    with caplog.at_level(logging.INFO, logger="l2l_lightning.optim.learned_optimizer"):
        run(optimizer, parameters, make_gradients([(2**18,)], steps=2))
    assert [record.message for record in caplog.records] == [
        "the rule's state of 262144 coordinates takes 80.0 MiB on cpu"
    ]
    assert optimizer.state_bytes == 80 * 2**20


def test_a_state_that_cannot_fit_is_refused_before_anything_changes(monkeypatch):
    parameters = make_parameters([(500,), (500,)])
    before = [parameter.detach().clone() for parameter in parameters]
    groups = [{"params": [parameter]} for parameter in parameters]
    optimizer = LearnedOptimizer(groups, "lstm-mnist")
    assert 2**28 < learned_optimizer._total_memory(torch.device("cpu")) < 2**60  # this machine's
    monkeypatch.setattr(learned_optimizer, "_total_memory", lambda device: 300 * 2**10)
    with pytest.raises(
        MemoryError, match=r"on cpu takes 0\.3 MiB, and there are 0\.3 MiB: state_dtype=torch\.bfloat16"
    ):
        run(optimizer, parameters, make_gradients([(500,), (500,)]))
    assert all(torch.equal(a, b) for a, b in zip(parameters, before, strict=True))


def test_a_device_that_is_full_says_what_would_help(monkeypatch):
    def init_state(self, n, dtype=None):
        raise torch.OutOfMemoryError("out of memory")

    parameters = make_parameters([(2**15,)])
    optimizer = LearnedOptimizer(parameters, "lstm-mnist")
    monkeypatch.setattr(CoordinatewiseLSTM, "init_state", init_state)
    with pytest.raises(torch.OutOfMemoryError) as raised:
        run(optimizer, parameters, make_gradients([(2**15,)]))
    (note,) = raised.value.__notes__
    assert "takes 10.0 MiB: state_dtype=torch.bfloat16" in note


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr must not be negative, got -1.0"),
        ({"lr": float("nan")}, ValueError, "lr must not be negative, got nan"),
        ({"lr": torch.ones(2)}, ValueError, r"lr must be one number, got a tensor of \[2\]"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay must not be negative, got -0.1"),
        ({"state_dtype": torch.float16}, ValueError, r"state_dtype must be one of .* got torch\.float16"),
        ({"rule": "lstm-nothing"}, WeightsError, "there is no rule 'lstm-nothing': choose one of lstm-mnist"),
        ({"rule": "gone.safetensors"}, WeightsError, "gone.safetensors cannot be read"),
        ({"rule": nn.Linear(1, 1)}, TypeError, "rule must be a name, a path or a Rule, got Linear"),
    ],
)
def test_arguments_that_cannot_be_meant(arguments, error, message):
    with pytest.raises(error, match=message):
        LearnedOptimizer(make_parameters(), **{"rule": "lstm-mnist"} | arguments)
    if "state_dtype" not in arguments:
        optimizer = LearnedOptimizer(make_parameters([(1,)]), "lstm-mnist")
        with pytest.raises(error, match=message):
            optimizer.add_param_group({"params": make_parameters(), **arguments})
        assert len(optimizer.param_groups) == 1


def test_a_closure_is_evaluated_with_gradients_and_its_loss_returned():
    (parameter,) = make_parameters([(4,)])
    optimizer = LearnedOptimizer([parameter], make_rule())

    def closure():
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss

    before = parameter.detach().clone()
    assert optimizer.step(closure) == before.square().sum()
    assert not torch.equal(parameter, before)
    assert optimizer.step() is None


def test_tied_parameters_are_updated_once(launches):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.encode, self.decode = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.decode.weight = self.encode.weight

        def forward(self, x):
            return self.decode(self.encode(x))

    model, rule = Tied(), make_rule()
    gradient = torch.randn(3, 3)
    thetas, _ = expected([model.encode.weight], [[gradient]], rule)
    optimizer = LearnedOptimizer(model.parameters(), rule)
    run(optimizer, [model.encode.weight], [[gradient]])
    assert launches == [9]
    assert model.decode.weight is model.encode.weight
    assert_close([model.decode.weight], thetas)


def test_a_model_may_be_loaded_and_converted_between_steps(rule):
    model = nn.Linear(3, 2)
    optimizer = LearnedOptimizer(model.parameters(), rule)
    parameters, saved = list(model.parameters()), copy.deepcopy(model.state_dict())
    gradients = make_gradients([(2, 3), (2,)])
    _, carried = expected(parameters, gradients, rule)
    run(optimizer, parameters, gradients[:2])
    model.load_state_dict(saved)
    assert all(torch.equal(parameter, saved[name]) for name, parameter in model.named_parameters())
    model.double()
    run(optimizer, parameters, [[g.double() for g in step] for step in gradients[2:]])
    assert_carried(optimizer, parameters, carried)
    model.weight.data = model.weight.data.clone()  # as FSDP and offloading replace storage
    before = model.weight.detach().clone()
    run(optimizer, parameters, [[g.double() for g in gradients[0]]])
    assert not torch.equal(model.weight, before)


def test_entries_that_are_put_in_place_are_used(rule):
    parameters, gradients = make_parameters(), make_gradients()
    thetas, _ = expected(parameters, gradients, rule)
    optimizer = LearnedOptimizer(parameters, rule)
    run(optimizer, parameters, make_gradients(seed=5))
    for parameter, theta in zip(parameters, make_parameters(), strict=True):
        parameter.data.copy_(theta)
        for value in optimizer.state[parameter].values():
            value.zero_()
    optimizer.param_groups[0]["step"] = 0
    run(optimizer, parameters, gradients[:2])
    for parameter in parameters[:3]:
        for key, value in optimizer.state[parameter].items():
            optimizer.state[parameter][key] = value.clone()
    run(optimizer, parameters, gradients[2:])
    assert_close(parameters, thetas)


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_mixed_precision_with_a_gradient_scaler(precision, rule):
    """A step whose gradients overflow is left out; the others are the definition's."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    parameters, seen, x = list(model.parameters()), [], torch.randn(16, 4)
    before = [p.detach().clone() for p in parameters]
    optimizer = LearnedOptimizer(parameters, rule)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=1000)
    for bad in (False, True, False):
        optimizer.zero_grad()
        with torch.autocast("cpu", precision):
            loss = model(x).float().square().mean()
        scaler.scale(loss * (float("inf") if bad else 1)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(parameters, 0.1)
        if not bad:
            seen.append([p.grad.clone() for p in parameters])
        scaler.step(optimizer)
        scaler.update()
    thetas, carried = expected(before, seen, rule)
    assert_close(parameters, thetas)
    assert_carried(optimizer, parameters, carried)
    assert scaler.get_scale() == 128.0


@pytest.mark.parametrize("what", ["model", "training step"])
def test_compiled_models_and_training_steps(what, rule):
    x, results = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
        optimizer = LearnedOptimizer(model.named_parameters(), rule)
        forward = torch.compile(model, backend="aot_eager") if compiled and what == "model" else model

        def train(forward=forward, optimizer=optimizer):
            optimizer.zero_grad()
            forward(x).square().mean().backward()
            optimizer.step()

        if compiled and what == "training step":
            train = torch.compile(train, backend="aot_eager")
        for _ in range(4):
            train()
        results.append([p.detach() for p in model.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_a_lightning_module_trains_and_resumes(tmp_path):
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.model = nn.Linear(4, 2)

        def training_step(self, batch, index):
            return self.model(batch).square().mean()

        def configure_optimizers(self):
            optimizer = LearnedOptimizer(self.parameters(), rule="lstm-mnist")
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]

        def train_dataloader(self):
            return torch.utils.data.DataLoader(torch.arange(24.0).view(6, 4) / 24, batch_size=2)

    def fit(epochs, **arguments):
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            gradient_clip_val=1.0,
        )
        module = Module()
        trainer.fit(module, **arguments)
        return trainer, module

    _, straight = fit(4)
    trainer, half = fit(2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed = fit(4, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert torch.equal(straight.model.weight, resumed.model.weight)
    assert not torch.equal(straight.model.weight, half.model.weight)


needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(*places, marks=needs_gpu)
        for places in ((["cuda"], ["cuda"]), (["cuda", "cpu"], ["cuda", "cpu"]), (["cpu"], ["cuda"]))
    ],
)
def test_on_a_gpu_on_both_devices_at_once_and_moved_to_one(before, after, rule):
    parameters, gradients = make_parameters(), make_gradients()
    thetas, _ = expected(parameters, gradients, rule)
    moved = [nn.Parameter(p.detach().clone()) for p in parameters]
    optimizer = LearnedOptimizer(moved, rule)
    for devices, steps in ((before, gradients[:2]), (after, gradients[2:])):
        places = [device for device, _ in zip(itertools.cycle(devices), moved, strict=False)]
        for parameter, place in zip(moved, places, strict=True):
            parameter.grad = None
            parameter.data = parameter.data.to(place)
        run(optimizer, moved, [[g.to(d) for g, d in zip(step, places, strict=True)] for step in steps])
    assert_close([p.cpu() for p in moved], thetas, atol=1e-4)


# All or nothing.


def replaced(data, grad=None):
    """Another tensor in a parameter's place, and another gradient."""

    def change(parameter, entries, group):
        parameter.grad = None
        if not data.is_floating_point():
            parameter.requires_grad_(False)
        parameter.data = data
        parameter.grad = torch.ones_like(data) if grad is None else grad

    return change


def option(name, value):
    return lambda parameter, entries, group: group.update({name: value})


def of_inference_mode():
    with torch.inference_mode():
        return torch.ones(3)


def without_its_state(parameter, entries, group):
    entries[STATE] = torch.zeros(2, 2, 20, 1)


CHANGES = {
    "another shape": (replaced(torch.ones(2)), RuntimeError, r"^'last' has .* and its state \[.*, 3\]"),
    "one number": (replaced(torch.ones(1)), RuntimeError, r"has shape \[1\], and its state"),
    "an expanded parameter": (
        replaced(torch.ones(1).expand(3), torch.ones(3)),
        RuntimeError,
        "is expanded: several of its coordinates are one",
    ),
    "integers": (replaced(torch.ones(3, dtype=torch.int64)), RuntimeError, r"has become torch\.int64"),
    "a sparse gradient": (
        replaced(torch.ones(3), torch.ones(3).to_sparse()),
        RuntimeError,
        "^'last' has a sparse gradient.*sparse=False",
    ),
    "of inference mode": (replaced(of_inference_mode(), torch.ones(3)), RuntimeError, "inference_mode"),
    "a lost state": (without_its_state, RuntimeError, "and its state"),
    "a rate without a number": (option("lr", "x"), TypeError, "lr must be a number, got 'x'"),
    "an infinite rate": (option("lr", float("inf")), ValueError, "lr must be finite"),
    "a tensor of rates": (option("lr", torch.ones(2)), ValueError, "lr must be one number"),
    "no decay": (option("weight_decay", None), TypeError, "weight_decay must be a number, got None"),
    "a direction": (option("maximize", "up"), TypeError, "maximize must be true or false"),
    "no number of steps": (option("total_steps", None), ValueError, "TensorAndTime needs total_steps"),
    "another rule": (
        option("rule", "lstm-mnist"),
        ValueError,
        "rule was set to 'lstm-mnist': .*add_param_group",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_step_that_cannot_be_whole_changes_nothing(what):
    """The last group's last parameter is the one that cannot be updated."""
    change, error, message = CHANGES[what]
    parameters = [nn.Parameter(torch.ones(3)) for _ in range(3)]
    named = list(zip(("first", "middle", "last"), parameters, strict=True))
    of_time = {"rule": TensorwiseMomentum(), "total_steps": 9} if what == "no number of steps" else {}
    optimizer = LearnedOptimizer([{"params": named[:1]}, {"params": named[1:]} | of_time], "lstm-mnist")
    run(optimizer, parameters, [[torch.full((3,), 0.1)] * 3])
    change(parameters[-1], optimizer.state[parameters[-1]], optimizer.param_groups[-1])
    before = copy.deepcopy([(p.data, optimizer.state[p]) for p in parameters])
    with pytest.raises(error, match=message):
        optimizer.step()
    for parameter, (value, entries) in zip(parameters, before, strict=True):
        assert torch.equal(parameter, value)
        for key, entry in entries.items():
            assert torch.equal(optimizer.state[parameter][key], entry)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.ones(2, dtype=torch.int32), "is torch.int32"),
        (torch.ones(2).to(torch.float8_e4m3fn), "is torch.float8_e4m3fn"),
        (torch.ones(2, dtype=torch.complex64), "is complex.*view_as_real"),
        (torch.eye(2).to_sparse(), "is sparse"),
    ],
)
def test_what_a_rule_cannot_update_is_refused_when_it_is_given(data, message):
    parameter = nn.Parameter(data, requires_grad=False)
    with pytest.raises(ValueError, match=f"parameter 0 of its group {message}"):
        LearnedOptimizer([parameter], "lstm-mnist")
    optimizer = LearnedOptimizer([nn.Parameter(torch.ones(1))], "lstm-mnist")
    with pytest.raises(ValueError, match=f"parameter 1 of its group {message}"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1)), parameter]})
    assert len(optimizer.param_groups) == 1


def test_a_group_that_is_refused_leaves_nothing_behind():
    """Neither a group, whatever the user's code raises, nor which member of its rule was to move what."""

    def fails(tensor):
        raise KeyError(tensor.name)

    optimizer = LearnedOptimizer([("first", nn.Parameter(torch.ones(1)))], make_rule())
    parameter, other = (nn.Parameter(torch.ones(2)) for _ in range(2))
    for rule, error in (
        (Grouped({"x": make_rule(), "a": make_rule()}), ValueError),
        (Grouped({"a": make_rule()}, by=fails), KeyError),
    ):
        with pytest.raises(error):
            optimizer.add_param_group({"params": [("a", parameter), ("b", other)], "rule": rule})
        assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [("a", parameter)], "rule": Grouped({"a": LearnedMomentum()})})
    assert isinstance(optimizer.rule_for(optimizer.param_groups[1], parameter), LearnedMomentum)


def test_a_first_step_in_inference_mode_is_followed_by_others(rule):
    parameters, gradients = make_parameters(), make_gradients()
    thetas, _ = expected(parameters, gradients, rule)
    optimizer = LearnedOptimizer(parameters, rule)
    with torch.inference_mode():
        run(optimizer, parameters, gradients[:1])
    run(optimizer, parameters, [[g.clone() for g in step] for step in gradients[1:]])
    assert_close(parameters, thetas)
