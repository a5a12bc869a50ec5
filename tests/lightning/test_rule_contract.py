"""What every update rule does, whoever wrote it: a line in RULES has it tested."""

import copy
import functools
import io
import json

import pytest
import torch
from learned_momentum import LearnedMomentum
from mixed_features import MixedLSTM, TensorwiseMomentum
from problems import Rosenbrock
from torch import nn
from unrolled import assert_same_carried, assert_windows_are_unrolled

from l2l_lightning import CoordinatewiseLSTM, LearnedOptimizer, Optimizees, Rollout, run_rule
from l2l_lightning.class_paths import class_config, from_class_config
from l2l_lightning.errors import RuleError
from l2l_lightning.rules import Features, Layout, ParameterInfo, RNNprop, Time, UpdateRule

RULES = {
    "LSTM": lambda: CoordinatewiseLSTM(hidden_size=5, p=4.0),
    "LSTM of one layer": lambda: CoordinatewiseLSTM(1, 3, "identity", forget_bias=0.0, output_scale=0.5),
    "LSTM of three layers": lambda: CoordinatewiseLSTM(3, 3, p=4.0, gradient_scale=10.0),
    "LSTM on the reference": lambda: CoordinatewiseLSTM(2, 4, backend="reference"),
    "RNNprop": lambda: RNNprop(hidden_size=5),
    "RNNprop on the reference": lambda: RNNprop(1, 3, beta=0.5, backend="reference"),
    "one's own": LearnedMomentum,
    "one's own, with features": MixedLSTM,
    "one's own, of time and tensors": TensorwiseMomentum,
}
N = 11


@pytest.fixture(params=RULES)
def rule(request):
    torch.manual_seed(0)
    return RULES[request.param]().double()


def optimizees(dtype=torch.float64, indices=range(3)):
    return Optimizees(Rosenbrock(), None, 0, "train", indices, dtype=dtype)


def layout(n):
    """Every coordinate is a tensor of its own."""
    return Layout((ParameterInfo("", (1,)),) * n or (ParameterInfo("", (0,)),), num_tensors=N)


def read(rule, grads):
    """What the rule reads of gradients [steps, n], step by step."""
    n = grads.shape[-1]
    statistics = rule.init_statistics(n, grads.dtype)
    times = [Time(grads.new_tensor(t), len(grads)) for t in range(len(grads))]
    return torch.stack(
        [rule.read(grad, statistics, time, layout(n)) for grad, time in zip(grads, times, strict=True)]
    )


def inputs(rule, n=N, steps=4, seed=0):
    """Of gradients [steps, n] over nine decades, one of them zero, and the states that they lead through."""
    return walk(rule, read(rule, gradients(rule, n, steps, seed)))


def gradients(rule, n=N, steps=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    dtype = next(rule.parameters()).dtype
    grads = torch.randn(steps, n, generator=generator, dtype=dtype) * 10.0 ** torch.linspace(-7, 1, n).to(
        dtype
    )
    grads[:, n // 2] = 0
    return grads


def walk(rule, inputs):
    n, dtype = inputs.shape[-1], inputs.dtype
    theta = torch.zeros(n, dtype=dtype)
    history = torch.zeros(len(inputs) + 1, *rule.state_shape, n, dtype=dtype)
    for t, x in enumerate(inputs):
        rule.step_(theta, x, history[t], history[t + 1])
    return inputs, history, theta


def test_a_step_gives_an_update_and_a_state_for_every_coordinate(rule):
    for dtype in (torch.float64, torch.float32):
        rule.to(dtype)
        for n in (N, 1, 0):
            state = rule.init_state(n)
            assert (state.shape, state.dtype) == ((*rule.state_shape, n), dtype)
            assert not state.any()
            assert not state.requires_grad
            [x] = read(rule, torch.randn(1, n, dtype=dtype))
            assert x.shape == ((n,) if rule.features is None else (rule.features.width, n))
            update, updated = rule.step(x, state)
            assert (update.shape, update.dtype) == ((n,), dtype)
            assert (updated.shape, updated.dtype) == (state.shape, dtype)
            assert update.requires_grad
    assert rule.init_state(N, torch.bfloat16).dtype == torch.bfloat16


def test_the_in_place_step_is_the_step(rule):
    """One stepper for many steps, into a history and into the state itself: its θ is the sum of updates."""
    grads, history, theta = inputs(rule)
    expected, state = torch.zeros_like(theta), history[0]
    with torch.no_grad():
        step = rule.stepper()
        in_place, own = torch.zeros_like(theta), history[0].clone()
        for t, grad in enumerate(grads):
            update, state = rule.step(grad, state)
            expected += update
            torch.testing.assert_close(history[t + 1], state, rtol=1e-11, atol=1e-13)
            step(in_place, grad, own, own)
    torch.testing.assert_close(theta, expected, rtol=1e-11, atol=1e-13)
    assert torch.equal(in_place, theta)
    assert torch.equal(own, history[-1])


def test_features_are_read_apart_from_the_state(rule):
    """Their statistics are float32 at least, whatever a state is stored in, and updated in place."""
    if rule.features is None:
        assert rule.init_statistics(N).shape == (0, N)
        grad = torch.randn(N)
        assert rule.read(grad, rule.init_statistics(N), Time(torch.zeros(()), None), layout(N)) is grad
        return
    rows = rule.features.rows
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        statistics = rule.float().init_statistics(N, dtype)
        assert (statistics.shape, statistics.dtype) == ((rows, N), torch.promote_types(dtype, torch.float32))
        assert not statistics.any()
    before, time = statistics.clone(), Time(torch.zeros(()), 10)
    x = rule.read(torch.randn(N), statistics, time, layout(N))
    assert not torch.equal(statistics, before)
    assert not x.requires_grad


def test_coordinates_are_each_alone(rule):
    """In any pieces and any order: what a sharded parameter and the chunks of a history build on."""
    _, history, theta = inputs(rule)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    for pieces in ((1,) * N, (7, 4), (N,)):
        parts = [walk(rule, read(rule, gradients(rule)[:, part])) for part in order.split(pieces)]
        thetas, states = [theta for _, _, theta in parts], [history[-1] for _, history, _ in parts]
        torch.testing.assert_close(torch.cat(thetas), theta[order], rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(torch.cat(states, -1), history[-1][..., order], rtol=1e-12, atol=1e-15)


def test_a_coordinate_that_diverges_leaves_the_others_alone(rule):
    _, history, theta = inputs(rule)
    for bad in (torch.nan, torch.inf):
        spoiled = gradients(rule)
        spoiled[1, 3] = bad
        _, spoiled_history, moved = walk(rule, read(rule, spoiled))
        others = torch.arange(N) != 3
        assert torch.equal(moved[others], theta[others])
        assert torch.equal(spoiled_history[..., others], history[..., others])


def test_a_zero_gradient_has_a_finite_update_and_meta_gradient(rule):
    for dtype in (torch.float64, torch.float32):
        rule.to(dtype)
        grads, history, theta = walk(rule, read(rule, torch.zeros(3, N, dtype=dtype)))
        assert theta.isfinite().all()
        assert history.isfinite().all()
        d_phi, d_state = rule.segment_gradient(grads, history, torch.ones(3, N, dtype=dtype))
        assert all(d.isfinite().all() for d in [*d_phi, d_state])


def test_a_segments_gradient_is_autograds(rule):
    """Σ_t <d_updates_t, u_t> + <d_final_state, s_T> through the unrolled steps, and the base class's walk."""
    grads, history, _ = inputs(rule)
    generator = torch.Generator().manual_seed(1)
    d_updates = torch.randn(len(grads), N, generator=generator, dtype=torch.float64)
    d_final = torch.randn(history[0].shape, generator=generator, dtype=torch.float64)
    initial, parameters = history[0].clone().requires_grad_(), list(rule.parameters())
    for from_final_state in (None, d_final):
        state, objective = initial, 0.0
        for grad, d_update in zip(grads, d_updates, strict=True):
            update, state = rule.step(grad, state)
            objective = objective + (d_update * update).sum()
        if from_final_state is not None:
            objective = objective + (from_final_state * state).sum()
        expected = torch.autograd.grad(objective, [*parameters, initial], materialize_grads=True)
        for segment_gradient in (rule.segment_gradient, functools.partial(UpdateRule.segment_gradient, rule)):
            d_phi, d_state = segment_gradient(grads, history, d_updates, from_final_state)
            torch.testing.assert_close([*d_phi, d_state], list(expected), rtol=1e-10, atol=1e-12)
        if from_final_state is None:
            d_phi = rule.window_gradient(grads, history, d_updates)
            torch.testing.assert_close(d_phi, list(expected[:-1]), rtol=1e-10, atol=1e-12)


def test_the_meta_gradient_of_a_window_is_the_unrolled_graphs(rule):
    """To first and to second order, window after window."""
    for second_order in (False, True):
        ours, theirs = optimizees(), optimizees()
        rollout, carried = assert_windows_are_unrolled(
            rule, ours, theirs, (4, 1, 3), second_order, total_steps=9
        )
        assert_same_carried(rollout, carried)
        torch.testing.assert_close(ours.theta, theirs.theta, rtol=1e-12, atol=1e-14)


def test_a_configuration_and_a_state_dict_are_all_that_a_rule_is(rule):
    config = json.loads(json.dumps(class_config(rule)))
    buffer = io.BytesIO()
    with torch.no_grad():
        for parameter in rule.parameters():  # no rule's first φ
            parameter.add_(0.1)
    torch.save(rule.state_dict(), buffer)
    buffer.seek(0)
    again = from_class_config(config, UpdateRule).double()
    assert class_config(again) == class_config(rule)
    assert not torch.equal(inputs(again)[2], inputs(rule)[2])
    again.load_state_dict(torch.load(buffer, weights_only=True))
    assert all(map(torch.equal, inputs(again), inputs(rule)))


def test_phi_is_drawn_from_the_generator_alone(rule):
    drawn = []
    for seed, global_seed in ((3, 0), (3, 1)):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        rule.reset_parameters(torch.Generator().manual_seed(seed))
        assert torch.equal(torch.get_rng_state(), before)
        drawn.append([parameter.detach().clone() for parameter in rule.parameters()])
    assert all(map(torch.equal, *drawn))
    assert all(parameter.isfinite().all() for parameter in drawn[0])


def test_in_a_loop_of_ones_own_it_is_the_rollouts(rule):
    """LearnedOptimizer, `run_rule` and a Rollout's windows: one rule, one path of θ and one of losses."""
    rule.float()
    horizon = 9
    looped, ran, windows = (optimizees(torch.float32) for _ in range(3))
    thetas, losses = [nn.Parameter(theta.clone()) for theta in looped.theta], []
    # One each, as a rule may read how many tensors an optimizee has.
    optimizers = [LearnedOptimizer([theta], rule, total_steps=horizon) for theta in thetas]
    for _ in range(horizon):
        for optimizer in optimizers:
            optimizer.zero_grad()
        step = looped.task.losses(torch.stack(list(thetas)), looped.next_batches())
        step.sum().backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(step.detach())
    expected = run_rule(rule, ran, horizon)
    torch.testing.assert_close(torch.stack(losses), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.stack([t.detach() for t in thetas]), ran.theta, rtol=1e-5, atol=1e-5)
    # A window of T steps evaluates at T + 1 points.
    window = Rollout(rule, windows, total_steps=horizon).window(horizon - 1)
    torch.testing.assert_close(window.losses, expected, rtol=1e-6, atol=1e-6)


def test_a_rollout_goes_on_from_its_state_dict(rule):
    """What is carried is all in it; that of a rule without features is refused by one that reads some."""
    whole, resumed = (Rollout(rule, optimizees(), total_steps=9) for _ in range(2))
    whole.window(3)
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    for rollout in (whole, resumed):
        rule.zero_grad()
        assert rollout.window(2).meta_loss.isfinite()
    assert torch.equal(resumed.optimizees.theta, whole.optimizees.theta)
    assert torch.equal(resumed.parts[0].state, whole.parts[0].state)
    assert torch.equal(resumed.parts[0].statistics, whole.parts[0].statistics)
    older = {key: value for key, value in whole.state_dict().items() if key != "statistics"}
    if rule.features is None:
        resumed.load_state_dict(older)
    else:
        with pytest.raises(ValueError, match="it has the statistics"):
            resumed.load_state_dict(older)


class Constant(Features):
    """Reads gradients as they are; what is broken is said by the tests."""

    width = 1
    rows = 0

    def __call__(self, grad, statistics, time, layout):
        return grad[None]


class Scale(UpdateRule):
    """u_t = -exp(φ) g_t: a whole rule, of which the cases below break one part each."""

    state_shape = ()

    def __init__(self):
        super().__init__()
        self.log_rate = nn.Parameter(torch.zeros(()))

    def step(self, inputs, state):
        return -self.log_rate.exp() * inputs.view(-1), state

    def reset_parameters(self, generator=None):
        pass


def broken(**parts):
    return type("Broken", (Scale,), parts)


def features(**parts):
    return type("BrokenFeatures", (Constant,), parts)()


BROKEN = {
    "no state_shape": (broken(state_shape=None), "state_shape is a tuple of whole numbers"),
    "a state_shape of numbers": (broken(state_shape=3), "state_shape is a tuple of whole numbers"),
    "an update of another shape": (
        broken(step=lambda self, x, s: (self.log_rate * x.sum(), s)),
        r"the update is \[n\] in the inputs' dtype, here \[2\]",
    ),
    "an update of another dtype": (
        broken(step=lambda self, x, s: ((self.log_rate * x).half(), s)),
        r"the update is \[n\] in the inputs' dtype",
    ),
    "a state of another shape": (
        broken(step=lambda self, x, s: (self.log_rate * x, s[None])),
        r"the new state is \[\*state_shape, n\]",
    ),
    "one result": (
        broken(step=lambda self, x, s: self.log_rate * x),
        r"step returns the tensors \(update, new state\)",
    ),
    "other arguments": (broken(step=lambda self, x: x), r"step takes \(inputs, state\)"),
    "coordinates that are mixed": (
        broken(step=lambda self, x, s: (self.log_rate.exp() * (x - x.mean()), s)),
        "a step moves every coordinate by its own inputs and state alone",
    ),
    "an update without φ": (
        broken(step=lambda self, x, s: (-x, s)),
        "depends on φ, and is differentiable in it; neither has a gradient",
    ),
    "a graph that is cut": (
        broken(step=lambda self, x, s: ((self.log_rate * x).detach(), s)),
        "depends on φ, and is differentiable in it",
    ),
    "NaN at zero": (broken(step=lambda self, x, s: (self.log_rate + x / x.abs(), s)), "all is finite where"),
    "features without a width": (broken(features=features(width=None)), "features have a width"),
    "features of another width": (broken(features=features(width=2)), r"features are \[width, n\]"),
    "features of other arguments": (
        broken(features=features(__call__=lambda self, grad, statistics: grad[None])),
        r"features take \(grad, statistics, time, layout\)",
    ),
    "a step in place": (
        broken(step=lambda self, x, s: (self.log_rate * x, s.mul_(0.9))),
        "step leaves its arguments as they are; it writes into them",
    ),
    "a step of the inputs in place": (
        broken(step=lambda self, x, s: (self.log_rate * x.mul_(2), s)),
        "step leaves its arguments as they are; it writes into them",
    ),
    "a random step": (
        broken(step=lambda self, x, s: (self.log_rate * x * torch.rand_like(x), s)),
        "a step is the same whenever it is taken; it draws from the global random stream",
    ),
    "statistics that stay": (
        broken(features=features(rows=1)),
        "features bring their statistics up to date in place; nothing is written",
    ),
    "NaN features at zero": (
        broken(features=features(__call__=lambda self, grad, *_: grad[None] / grad)),
        "all is finite where",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_rule_that_breaks_the_contract_is_told_the_sentence_when_it_is_made(case):
    make, sentence = BROKEN[case]
    before = torch.get_rng_state()
    with pytest.raises(RuleError, match=f"Broken breaks the contract of update rules: .*{sentence}"):
        make()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_rule_that_keeps_the_contract_is_made_anywhere():
    """Trying it draws nothing, and needs neither numbers nor a graph."""
    before = torch.get_rng_state()
    assert isinstance(Scale(), UpdateRule)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.device("meta"):
        assert Scale().log_rate.is_meta
    with torch.inference_mode():
        assert Scale().log_rate.is_inference()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert Scale().log_rate.requires_grad


def test_what_has_no_parameters_is_no_rule():
    class Nothing(UpdateRule):
        state_shape = ()

        def step(self, inputs, state):
            return -inputs, state

        def reset_parameters(self, generator=None):
            pass

    with pytest.raises(RuleError, match="φ is a rule's parameters, and it has at least one; it has none"):
        Nothing()


CONSTANT = {
    "constant states": lambda self, x, s: (-self.log_rate.exp() * x, torch.zeros_like(s)),
    "a state's graph that is cut": lambda self, x, s: (-self.log_rate.exp() * x, s.detach() + x),
    "updates without φ": lambda self, x, s: (-0.1 * s, self.log_rate.exp() * (s + x)),
}


@pytest.mark.parametrize("case", CONSTANT)
@pytest.mark.parametrize("checkpoint_every", [None, 2])
def test_what_has_no_graph_has_no_part_in_the_meta_gradient(case, checkpoint_every):
    rule = broken(step=CONSTANT[case])().double()
    with torch.no_grad():
        rule.log_rate.fill_(-6.0)
    assert_windows_are_unrolled(rule, optimizees(), optimizees(), (3,), checkpoint_every=checkpoint_every)


def test_frozen_parameters_stay_and_the_others_train(rule):
    """φ may be frozen after a rule has been made: the others' derivatives are what they were."""
    derivatives = []
    for frozen in (False, True):
        parameters = list(rule.parameters())
        parameters[0].requires_grad_(not frozen)
        rule.zero_grad()
        Rollout(rule, optimizees(), total_steps=9).window(3).meta_loss.backward()
        derivatives.append([parameter.grad for parameter in parameters])
    assert derivatives[1][0] is None
    torch.testing.assert_close(derivatives[1][1:], derivatives[0][1:], rtol=1e-12, atol=0)


def test_steps_are_counted_in_float32_at_least():
    seen = []

    class Clock(Constant):
        def __call__(self, grad, statistics, time, layout):
            seen.append(time.step.item())
            return grad[None]

    rule = broken(features=Clock(), step=lambda self, x, s: (-0.01 * self.log_rate.exp() * x[0], s))()
    seen.clear()
    run_rule(rule, optimizees(torch.bfloat16), 300)
    assert seen == list(range(300))


def test_a_rule_whose_arguments_cannot_be_written_down_is_told_so():
    class Forgets(Scale):
        def __init__(self, rate=1.0):
            super().__init__()

    class Keeps(Scale):
        def config(self):
            return {"features": Constant()}

    for rule, message in (
        (Forgets(), "Forgets does not keep its arguments rate as attributes"),
        (Keeps(), r"Keeps\.config\(\) must be of plain values: .*Constant"),
    ):
        with pytest.raises(TypeError, match=message):
            LearnedOptimizer([nn.Parameter(torch.ones(1))], rule)
