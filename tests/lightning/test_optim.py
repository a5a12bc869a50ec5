"""LearnedOptimizer: its numbers against the float64 definition, and what a training loop may ask of it."""

import copy
import itertools
import logging

import pytest
import torch
from l2l_kernels import reference
from learned_momentum import LearnedMomentum
from torch import nn

from l2l_lightning import (
    CoordinatewiseLSTM,
    LearnedOptimizer,
    load,
    pretrained,
)
from l2l_lightning.optim import learned_optimizer
from l2l_lightning.optim.pack import STATE
from l2l_lightning.pretrained import WeightsError

SHAPES = [(3, 4), (), (0,), (7,), (2, 3, 2, 2), (5, 0, 2), (1,)]


def make_rule(seed=0, **arguments):
    torch.manual_seed(seed)
    return CoordinatewiseLSTM(**{"hidden_size": 5, "head_init_scale": 1.0} | arguments)


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
    """Every parameter by itself, in float64, by the definition: (parameters, states)."""
    rule = copy.deepcopy(rule).double()
    phi, thetas, states = rule.phi(), [], []
    for i, parameter in enumerate(parameters):
        theta = parameter.detach().double().reshape(-1)
        state = theta.new_zeros(*rule.state_shape, theta.numel())
        for step in gradients:
            if step[i] is None:
                continue
            gradient = (-1 if maximize else 1) * rule.gradient_scale * step[i].double().reshape(-1)
            update, state = reference.step(torch.zeros_like(theta), gradient, state, phi, rule.spec)
            theta = (1 - lr * weight_decay) * theta + lr * update
        thetas.append(theta.reshape(parameter.shape).detach())
        states.append(state.reshape(*rule.state_shape, *parameter.shape).detach())
    return thetas, states


def assert_close(actual, theirs, atol=2e-5):
    for a, b in zip(actual, theirs, strict=True):
        torch.testing.assert_close(a.detach().double(), b, rtol=0, atol=atol)


def states_of(optimizer, parameters):
    return [optimizer.state[parameter][STATE] for parameter in parameters]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lr": 0.25},
        {"lr": torch.tensor(0.25)},
        {"weight_decay": 0.3},
        {"lr": 0.5, "weight_decay": 0.1, "maximize": True},
    ],
    ids=str,
)
def test_a_step_is_the_float64_definition(options):
    parameters, gradients, rule = make_parameters(), make_gradients(), make_rule()
    thetas, states = expected(parameters, gradients, rule, **options)
    optimizer = LearnedOptimizer(parameters, rule, **options)
    run(optimizer, parameters, gradients)
    assert_close(parameters, thetas)
    assert_close(states_of(optimizer, parameters), states)


def test_the_packages_rules_are_the_float64_definition():
    for name in pretrained.names():
        parameters, gradients = make_parameters(), make_gradients()
        thetas, states = expected(parameters, gradients, load(name))
        optimizer = LearnedOptimizer(parameters, rule=name)
        run(optimizer, parameters, gradients)
        assert_close(parameters, thetas)
        assert_close(states_of(optimizer, parameters), states)


def test_a_rule_that_has_nothing_fused():
    parameters, gradients, rule = make_parameters(), make_gradients(), LearnedMomentum()
    optimizer = LearnedOptimizer(parameters, rule, lr=0.5)
    thetas, means = [p.detach().double() for p in parameters], [0.0] * len(parameters)
    rate, decay = rule.log_rate.exp().item(), rule.decay.sigmoid().item()
    for step in gradients:
        means = [decay * m + g.double() for m, g in zip(means, step, strict=True)]
        thetas = [t - 0.5 * rate * m.tanh() for t, m in zip(thetas, means, strict=True)]
    run(optimizer, parameters, gradients)
    assert_close(parameters, thetas)


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


def test_a_parameter_without_a_gradient_keeps_its_value_and_its_state(launches):
    parameters, gradients, rule = make_parameters(), make_gradients(steps=8), make_rule()
    present = [0b1111111, 0b1010101, 0, 0b0101010, 0b1111111, 0b1, 0b1111110, 0b1111111]
    gradients = [
        [g if mask >> i & 1 else None for i, g in enumerate(step)]
        for mask, step in zip(present, gradients, strict=True)
    ]
    thetas, states = expected(parameters, gradients, rule, weight_decay=0.1)
    optimizer = LearnedOptimizer(parameters, rule, weight_decay=0.1)
    run(optimizer, parameters, gradients)
    assert_close(parameters, thetas)
    assert_close(states_of(optimizer, parameters), states)
    assert len(launches) == 7  # one where there is any gradient


def test_states_come_with_the_first_gradient():
    parameters, gradients, rule = make_parameters(), make_gradients(), make_rule()
    for step in gradients[:2]:
        step[1] = step[3] = None
    gradients[2][3] = None
    thetas, states = expected(parameters, gradients, rule)
    optimizer = LearnedOptimizer(parameters, rule)
    assert not optimizer.state
    run(optimizer, parameters, gradients[:2])
    assert [p in optimizer.state for p in parameters] == [i not in (1, 3) for i in range(7)]
    run(optimizer, parameters, gradients[2:])
    assert_close(parameters, thetas)
    assert_close(states_of(optimizer, parameters), states)


def test_a_gradient_of_zero_is_a_gradient():
    (parameter,), rule = make_parameters([(6,)]), make_rule()
    before = parameter.detach().clone()
    optimizer = LearnedOptimizer([parameter], rule)
    parameter.sum().backward()
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    assert not torch.equal(parameter, before)
    after, state = parameter.detach().clone(), optimizer.state[parameter][STATE].clone()
    optimizer.zero_grad(set_to_none=True)
    optimizer.step()
    assert torch.equal(parameter, after)
    assert torch.equal(optimizer.state[parameter][STATE], state)


def test_a_rate_of_zero_advances_the_state():
    parameters, gradients, rule = make_parameters(), make_gradients(), make_rule()
    thetas, states = expected(parameters, gradients, rule, lr=0.0)
    optimizer = LearnedOptimizer(parameters, rule, lr=0.0)
    run(optimizer, parameters, gradients)
    assert_close(parameters, thetas, atol=0)
    assert_close(states_of(optimizer, parameters), states)


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


def test_groups_have_rules_and_options_of_their_own():
    parameters, gradients = make_parameters(), make_gradients()
    first, second = make_rule(0), make_rule(1, hidden_size=3, num_layers=1, gradient_scale=2.0)
    groups = [
        {"params": parameters[:3]},
        {"params": parameters[3:5], "rule": second, "lr": 0.5},
        {"params": parameters[5:], "weight_decay": 0.2, "maximize": True},
    ]
    optimizer = LearnedOptimizer(groups, rule=first, lr=2.0)
    options = [
        {"rule": first, "lr": 2.0},
        {"rule": second, "lr": 0.5},
        {"rule": first, "lr": 2.0, "weight_decay": 0.2, "maximize": True},
    ]
    wanted = [
        theta
        for a, b, option in zip((0, 3, 5), (3, 5, 7), options, strict=True)
        for theta in expected(parameters[a:b], [step[a:b] for step in gradients], **option)[0]
    ]
    run(optimizer, parameters, gradients)
    assert_close(parameters, wanted)
    assert optimizer.state[parameters[3]][STATE].shape == (1, 2, 3, 7)


def test_a_group_may_be_added_while_training():
    parameters, gradients, rule, other = make_parameters(), make_gradients(), make_rule(), make_rule(1)
    thetas, _ = expected(parameters[:4], [step[:4] for step in gradients], rule)
    more, _ = expected(parameters[4:], [step[4:] for step in gradients[2:]], other)
    optimizer = LearnedOptimizer(parameters[:4], rule)
    run(optimizer, parameters[:4], [step[:4] for step in gradients[:2]])
    optimizer.add_param_group({"params": parameters[4:], "rule": other})
    run(optimizer, parameters, gradients[2:])
    assert_close(parameters, thetas + more)


def test_one_rule_may_be_named_by_name_by_path_or_be_given(tmp_path):
    path = tmp_path / "mine.safetensors"
    pretrained.save(load("lstm-mnist"), path)
    results = []
    for rule in ("lstm-mnist", path, str(path), load("lstm-mnist")):
        parameters = make_parameters()
        optimizer = LearnedOptimizer(parameters, rule)
        run(optimizer, parameters, make_gradients())
        results.append(torch.cat([p.detach().reshape(-1) for p in parameters]))
        saved = optimizer.state_dict()
    assert all(torch.equal(result, results[0]) for result in results)
    LearnedOptimizer(make_parameters(), "lstm-mnist").load_state_dict(saved)


def test_what_happens_to_the_rule_afterwards_changes_nothing():
    parameters, gradients, rule = make_parameters(), make_gradients(), make_rule()
    thetas, _ = expected(parameters, gradients, rule)
    optimizer = LearnedOptimizer(parameters, rule)
    run(optimizer, parameters, gradients[:2])
    rule.reset_parameters()
    rule.double()
    run(optimizer, parameters, gradients[2:])
    assert_close(parameters, thetas)
    assert all(parameter.requires_grad for parameter in rule.parameters())


def test_strides_are_kept_and_change_nothing():
    (image,) = make_parameters([(2, 3, 4, 5)])
    layouts = {
        "channels last": image.detach().to(memory_format=torch.channels_last),
        "transposed": image.detach().permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0),
        "a slice": torch.zeros(2, 3, 4, 10)[..., ::2].copy_(image.detach()),
    }
    gradients, rule = make_gradients([image.shape]), make_rule()
    thetas, states = expected([image], gradients, rule)
    for layout, data in layouts.items():
        parameter = nn.Parameter(data)
        strides, address = parameter.stride(), parameter.data_ptr()
        assert not parameter.is_contiguous(), layout
        optimizer = LearnedOptimizer([parameter], rule)
        run(optimizer, [parameter], gradients)
        assert_close([parameter], thetas)
        assert_close(states_of(optimizer, [parameter]), states)
        assert (parameter.stride(), parameter.data_ptr()) == (strides, address)


@pytest.mark.parametrize(
    ("dtype", "weight_decay"),
    [(torch.bfloat16, 0.0), (torch.bfloat16, 0.1), (torch.float16, 0.1), (torch.float64, 0.1)],
)
def test_parameters_of_another_dtype_are_rounded_once_an_update(dtype, weight_decay):
    rule, gradients = make_rule(), make_gradients(dtype=dtype)
    parameters = make_parameters(dtype=dtype)
    exact = [nn.Parameter(parameter.detach().float()) for parameter in parameters]
    optimizer, theirs = (
        LearnedOptimizer(params, rule, lr=0.5, weight_decay=weight_decay) for params in (parameters, exact)
    )
    for step in gradients:
        run(optimizer, parameters, [step])
        run(theirs, exact, [[g.float() for g in step]])
        for parameter, twin in zip(parameters, exact, strict=True):
            assert parameter.dtype == dtype
            if dtype != torch.float64:
                assert torch.equal(parameter, twin.to(dtype))
                twin.data.copy_(parameter)
    assert_close(
        parameters, [twin.detach().double() for twin in exact], atol=0 if dtype.itemsize == 2 else 1e-6
    )
    assert all(state.dtype == torch.float32 for state in states_of(optimizer, parameters))


def test_a_state_in_bfloat16_is_rounded_once_a_step():
    parameters, gradients, rule = make_parameters(), make_gradients(), make_rule()
    flat = torch.cat([p.detach().reshape(-1) for p in parameters])
    state = torch.zeros(*rule.state_shape, len(flat), dtype=torch.bfloat16)
    for step in gradients:
        rule.step_(flat, torch.cat([g.reshape(-1) for g in step]), state, state)
    optimizer = LearnedOptimizer(parameters, rule, state_dtype=torch.bfloat16)
    run(optimizer, parameters, gradients)
    torch.testing.assert_close(
        torch.cat([p.detach().reshape(-1) for p in parameters]), flat, rtol=0, atol=1e-6
    )
    states = [
        state.flatten(len(rule.state_shape)) for state in states_of(optimizer, parameters) if state.ndim > 3
    ]
    assert all(state.dtype == torch.bfloat16 for state in states)


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


def test_the_memory_of_this_machine_is_known():
    assert 2**28 < learned_optimizer._total_memory(torch.device("cpu")) < 2**60


def sparse_embedding():
    model = nn.Embedding(10, 3, sparse=True)
    model(torch.tensor([1, 2])).sum().backward()
    return model


def test_sparse_gradients_are_refused_before_anything_changes():
    dense, model = nn.Parameter(torch.ones(2)), sparse_embedding()
    dense.grad = torch.ones(2)
    optimizer = LearnedOptimizer([("dense", dense), ("table", model.weight)], make_rule())
    with pytest.raises(RuntimeError, match=r"'table' has a sparse gradient.*sparse=False"):
        optimizer.step()
    assert torch.equal(dense, torch.ones(2))


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


def test_complex_parameters_are_refused():
    parameter = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"parameter 1 of its group is complex.*view_as_real"):
        LearnedOptimizer([*make_parameters([(1,)]), parameter], make_rule())
    real = nn.Parameter(torch.view_as_real(parameter.detach()).clone())
    run(LearnedOptimizer([real], make_rule()), [real], [[torch.ones(2, 2)]])


def test_a_groups_rule_cannot_be_overwritten_in_silence():
    parameters = make_parameters()
    optimizer = LearnedOptimizer(parameters, "lstm-mnist")
    optimizer.param_groups[0]["rule"] = "lstm-mnist-relu"
    with pytest.raises(ValueError, match=r"rule was set to 'lstm-mnist-relu'.*add_param_group"):
        run(optimizer, parameters, make_gradients())


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


def test_accumulated_gradients_are_their_sum():
    rule, x = make_rule(), torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    results = []
    for parts in (1, 4):
        torch.manual_seed(0)
        model = nn.Linear(4, 2)
        optimizer = LearnedOptimizer(model.parameters(), rule)
        for _ in range(3):
            optimizer.zero_grad(set_to_none=False)
            for part in x.chunk(parts):
                (model(part).square().sum() / 8).backward()
            optimizer.step()
        results.append(model.weight.detach())
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)


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


def test_a_model_may_be_loaded_and_converted_between_steps():
    model, rule = nn.Linear(3, 2), make_rule()
    optimizer = LearnedOptimizer(model.parameters(), rule)
    saved = copy.deepcopy(model.state_dict())
    gradients = make_gradients([(2, 3), (2,)])
    _, states = expected(model.parameters(), gradients, rule)
    run(optimizer, list(model.parameters()), gradients[:2])
    model.load_state_dict(saved)
    thetas, _ = expected(model.parameters(), [], rule)
    assert_close(model.parameters(), thetas, atol=0)
    model.double()
    run(optimizer, list(model.parameters()), [[g.double() for g in step] for step in gradients[2:]])
    assert_close(states_of(optimizer, model.parameters()), states)
    with torch.no_grad():
        model.weight.data = model.weight.data.clone()  # as FSDP and offloading replace storage
    before = model.weight.detach().clone()
    run(optimizer, list(model.parameters()), [[g.double() for g in gradients[0]]])
    assert not torch.equal(model.weight, before)


def test_a_state_that_is_put_in_place_is_used():
    parameters, gradients, rule = make_parameters(), make_gradients(), make_rule()
    thetas, _ = expected(parameters, gradients, rule)
    optimizer = LearnedOptimizer(parameters, rule)
    run(optimizer, parameters, make_gradients(seed=5))
    for parameter, theta in zip(parameters, make_parameters(), strict=True):
        parameter.data.copy_(theta)
        optimizer.state[parameter][STATE].zero_()
    run(optimizer, parameters, gradients[:2])
    for parameter in parameters[:3]:
        optimizer.state[parameter][STATE] = optimizer.state[parameter][STATE].clone()
    run(optimizer, parameters, gradients[2:])
    assert_close(parameters, thetas)


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_mixed_precision_with_a_gradient_scaler(precision):
    torch.manual_seed(0)
    model, rule = nn.Linear(4, 1), make_rule(gradient_scale=1.0)
    optimizer = LearnedOptimizer(model.parameters(), rule)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=1000)
    x = torch.randn(16, 4)
    for bad in (False, True, False):
        before = [p.detach().clone() for p in model.parameters()]
        states = [s.clone() for s in states_of(optimizer, model.parameters())] if optimizer.state else None
        optimizer.zero_grad()
        with torch.autocast("cpu", precision):
            loss = model(x).float().square().mean()
        scaler.scale(loss * (float("inf") if bad else 1)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        gradients = [p.grad.clone() for p in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        if bad:
            assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
            assert all(
                torch.equal(a, b)
                for a, b in zip(states_of(optimizer, model.parameters()), states, strict=True)
            )
        elif states is None:
            thetas, _ = expected(before, [gradients], rule)
            assert_close(model.parameters(), thetas)
        else:
            assert not torch.equal(model.weight, before[0])
    assert scaler.get_scale() == 128.0


@pytest.mark.parametrize("what", ["model", "training step"])
def test_compiled_models_and_training_steps(what):
    x, rule, results = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), make_rule(), []
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


@pytest.mark.parametrize("devices", [pytest.param(d, marks=needs_gpu) for d in (["cuda"], ["cuda", "cpu"])])
def test_on_a_gpu_and_on_both_devices_at_once(devices):
    parameters, gradients, rule = make_parameters(), make_gradients(), make_rule()
    thetas, _ = expected(parameters, gradients, rule)
    places = [device for device, _ in zip(itertools.cycle(devices), parameters, strict=False)]
    moved = [nn.Parameter(p.detach().to(d)) for p, d in zip(parameters, places, strict=True)]
    optimizer = LearnedOptimizer(moved, rule)
    run(optimizer, moved, [[g.to(d) for g, d in zip(step, places, strict=True)] for step in gradients])
    assert_close([p.cpu() for p in moved], thetas, atol=1e-4)


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=needs_gpu)])
def test_a_model_may_be_moved_to_a_gpu_with_its_state(dtype):
    parameters, gradients, rule = make_parameters(), make_gradients(), make_rule()
    thetas, _ = expected(parameters, gradients, rule)
    optimizer = LearnedOptimizer(parameters, rule)
    run(optimizer, parameters, gradients[:2])
    for parameter in parameters:
        parameter.grad = None
        parameter.data = parameter.data.cuda()
    run(optimizer, parameters, [[g.to("cuda", dtype) for g in step] for step in gradients[2:]])
    assert_close([p.cpu() for p in parameters], thetas, atol=1e-4)


# All or nothing.


def change(optimizer, parameter, what):
    """Makes a parameter, its gradient, state or group one that cannot be updated; what is then said."""
    group = optimizer.param_groups[-1]
    match what:
        case "another shape":
            parameter.data, parameter.grad = torch.ones(2), torch.ones(2)
            return RuntimeError, r"and its state \[.*, 3\]"
        case "one number":
            parameter.data, parameter.grad = torch.ones(1), torch.ones(1)
            return RuntimeError, r"has shape \[1\], and its state"
        case "an expanded parameter":
            parameter.data = torch.ones(1).expand(3)
            return RuntimeError, "is expanded"
        case "integers":
            parameter.grad = None
            parameter.requires_grad_(False).data = torch.ones(3, dtype=torch.int64)
            parameter.grad = torch.ones(3, dtype=torch.int64)
            return RuntimeError, r"has become torch\.int64"
        case "a sparse gradient":
            parameter.grad = torch.ones(3).to_sparse()
            return RuntimeError, "has a sparse gradient"
        case "a parameter of inference mode":
            with torch.inference_mode():
                parameter.data = torch.ones(3)
            return RuntimeError, "inference_mode"
        case "a lost state":
            optimizer.state[parameter]["rule_state"] = torch.zeros(2, 2, 20, 1)
            return RuntimeError, "and its state"
        case "a rate without a number":
            group["lr"] = "x"
            return TypeError, "lr must be a number, got 'x'"
        case "an infinite rate":
            group["lr"] = float("inf")
            return ValueError, "lr must be finite"
        case "a tensor of rates":
            group["lr"] = torch.ones(2)
            return ValueError, "lr must be one number"
        case "no decay":
            group["weight_decay"] = None
            return TypeError, "weight_decay must be a number, got None"
        case "a direction":
            group["maximize"] = "up"
            return TypeError, "maximize must be true or false"
        case "another rule":
            group["rule"] = "lstm-mnist"
            return ValueError, "a group's rule was set"


CHANGES = [
    "another shape",
    "one number",
    "an expanded parameter",
    "integers",
    "a sparse gradient",
    "a parameter of inference mode",
    "a lost state",
    "a rate without a number",
    "an infinite rate",
    "a tensor of rates",
    "no decay",
    "a direction",
    "another rule",
]


@pytest.mark.parametrize("what", CHANGES)
def test_a_step_that_cannot_be_whole_changes_nothing(what):
    """The last group's last parameter is the one that cannot be updated."""
    parameters = [nn.Parameter(torch.ones(3)) for _ in range(3)]
    optimizer = LearnedOptimizer([{"params": parameters[:1]}, {"params": parameters[1:]}], "lstm-mnist")
    for parameter in parameters:
        parameter.grad = torch.full((3,), 0.1)
    optimizer.step()
    error, message = change(optimizer, parameters[-1], what)
    before = [p.detach().clone() for p in parameters]
    states = [optimizer.state[p]["rule_state"].clone() for p in parameters]
    with pytest.raises(error, match=message):
        optimizer.step()
    for parameter, value, state in zip(parameters, before, states, strict=True):
        assert torch.equal(parameter, value)
        assert torch.equal(optimizer.state[parameter]["rule_state"], state)


@pytest.mark.parametrize(
    "data",
    [
        torch.ones(2, dtype=torch.int32),
        torch.ones(2).to(torch.float8_e4m3fn),
        torch.ones(2, dtype=torch.complex64),
        torch.eye(2).to_sparse(),
    ],
    ids=lambda data: f"{data.dtype} {data.layout}",
)
def test_what_a_rule_cannot_update_is_refused_when_it_is_given(data):
    parameter = nn.Parameter(data, requires_grad=False)
    with pytest.raises(ValueError, match=r"parameter 0 of its group is "):
        LearnedOptimizer([parameter], "lstm-mnist")
    optimizer = LearnedOptimizer([nn.Parameter(torch.ones(1))], "lstm-mnist")
    with pytest.raises(ValueError, match=r"parameter 1 of its group is "):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1)), parameter]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("where", "value", "error", "message"),
    [
        ("lr", "x", TypeError, "lr must be a number"),
        ("weight_decay", float("nan"), ValueError, "weight_decay must not be negative"),
        ("maximize", 3, TypeError, "maximize must be true or false"),
        ("state", float("-inf"), ValueError, "a number that is not finite"),
    ],
)
def test_a_state_dict_that_no_optimizer_could_have_is_refused(where, value, error, message):
    parameter = nn.Parameter(torch.ones(3))
    optimizer = LearnedOptimizer([parameter], "lstm-mnist")
    parameter.grad = torch.ones(3)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    before = copy.deepcopy(saved)
    if where == "state":
        saved["state"][0]["rule_state"].view(-1)[-1] = value
    else:
        saved["param_groups"][0][where] = value
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(saved)
    now = optimizer.state_dict()
    assert now["param_groups"] == before["param_groups"]
    assert torch.equal(now["state"][0]["rule_state"], before["state"][0]["rule_state"])
