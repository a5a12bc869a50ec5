"""The rule that needs no tuning: its formula, what it does not depend on, and how it is trained."""

import copy
import math

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from meta_training import fit
from torch import nn
from unrolled import looped

from l2l_lightning import (
    LearnedOptimizer,
    MetaLearner,
    ModuleTask,
    Optimizees,
    Rollout,
    pretrained,
    run_rule,
)
from l2l_lightning.rollout.perturbed import PerturbedRollout
from l2l_lightning.rules import CoordinatewiseLSTM, Grouped, Layout, ParameterInfo, Time, ZeroShot
from l2l_lightning.rules.nominal import FACTS, NominalFeatures
from l2l_lightning.rules.orthogonal import newton_schulz, orthogonalised

T = 12
pytestmark = pytest.mark.filterwarnings("ignore:step .* is beyond total_steps")


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))


def sample(generator):
    x = torch.randn(16, 6, generator=generator)
    return x, x[:, :5].argmax(-1)


def points(generator):
    return torch.randn(16, 6, generator=generator), torch.zeros(16, 5)


def rule(orthogonal=True, horizon_free=False, decay_facts=2):
    """φ off its start, so that every constant has a part."""
    made = ZeroShot(orthogonal, horizon_free, decay_facts=decay_facts).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for phi in made.parameters():
            phi.add_(0.2 * torch.randn(phi.shape, generator=generator, dtype=phi.dtype))
    return made


def train(model, optimizer, scale=1.0, steps=T):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x, y = sample(generator)
        optimizer.zero_grad()
        (scale * nn.functional.cross_entropy(model(x.to(next(model.parameters()))), y)).backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


def moved(orthogonal=True, scale=1.0, groups=None):
    model = network().double()
    params = model.parameters() if groups is None else groups(model)
    return train(model, LearnedOptimizer(params, rule(orthogonal), total_steps=T), scale)


def by_hand(made, grads, starts):
    """θ_T of each tensor from θ_0 and gradients [T, …] of each: number by number, by the formulas."""
    w, mix, decay = made.log_step.tolist(), made.mixing.tolist(), made.decay.tolist()
    power, warm = math.exp(made.log_power), math.exp(made.log_warm_up)
    result = []
    for series, start in zip(grads, starts, strict=True):
        theta, shape = start.clone(), start.shape
        m, m2, v = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))
        matrix = len(shape) > 1
        wide = matrix and min(shape[0], math.prod(shape[1:])) >= 4
        for t, g in enumerate(series):
            horizon = max(2 * (t + 1), 100) if made.horizon_free else T
            snr = slow = 0.0
            if t:
                of_power = v.mean().item() / (1 - 0.98**t)
                snr, slow = (
                    math.log(min(max((s**2).mean().item() / (1 - b**t) ** 2 / of_power, 1e-3), 1) / 0.2)
                    for s, b in ((m, 0.9), (m2, 0.99))
                )
            m, m2, v = 0.9 * m + 0.1 * g, 0.99 * m2 + 0.01 * g, 0.98 * v + 0.02 * g**2
            mh, sh, vh = (a / (1 - b ** (t + 1)) for a, b in ((m, 0.9), (m2, 0.99), (v, 0.98)))
            x = 2 * t / horizon - 1
            d = (0.9 * mh + 0.1 * g + (mix[0] + mix[1] * x) * g + (mix[2] + mix[3] * x) * sh) / vh.sqrt()
            facts = [
                1.0,
                math.log(horizon / 300),
                math.log(math.prod(shape[1:]) / 64) if matrix else 0.0,
                math.log(shape[0] / 24) if matrix else 0.0,
                0.0 if matrix else 1.0,
                0.0 if matrix else math.log(math.prod(shape) / 24),
                math.log(len(starts) / 4),
                *(snr, slow, x * snr),
            ]
            size = math.exp(sum(a * b for a, b in zip(w, facts, strict=True)))
            size *= min(1, t / horizon / warm + 0.01) * (1 - t / horizon) ** power
            if made.orthogonal and wide:
                # Newton and Schulz's polynomial, on the singular values alone.
                u, s, vt = torch.linalg.svd(d.reshape(shape[0], -1), full_matrices=False)
                s = s / s.norm()
                for _ in range(5):
                    s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
                new = (u * s) @ vt
                d = (new * (d.square().mean() / new.square().mean()).sqrt()).reshape(shape)
            gain = math.sqrt(math.prod(shape[1:]) * theta.square().mean().item())
            of_decay = (1.0, snr, math.log(min(max(gain, 0.1), 10)), math.log(horizon / 300))
            shrink = math.exp(sum(a * b for a, b in zip(decay, of_decay, strict=False)))
            theta = theta - size * d - wide * min(size * shrink, 0.1) * theta
        result.append(theta)
    return result


@pytest.mark.parametrize("horizon_free", [True, False])
@pytest.mark.parametrize("orthogonal", [True, False])
@pytest.mark.parametrize("decay_facts", [2, 4])
def test_it_is_the_formula(decay_facts, orthogonal, horizon_free):
    shapes = [(6, 5), (7,), (4, 2, 3), (3, 8)]
    generator = torch.Generator().manual_seed(2)
    starts = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    grads = [torch.randn(T, *shape, generator=generator, dtype=torch.float64) for shape in shapes]
    params = [nn.Parameter(start.clone()) for start in starts]
    made = rule(orthogonal, horizon_free, decay_facts)
    optimizer = LearnedOptimizer(params, made, total_steps=None if horizon_free else T)
    for t in range(T):
        for parameter, series in zip(params, grads, strict=True):
            parameter.grad = series[t].clone()
        optimizer.step()
    for parameter, expected in zip(params, by_hand(made, grads, starts), strict=True):
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-8, atol=1e-12)


def test_the_losss_scale_makes_no_difference():
    expected = moved()
    for scale in (1e-6, 1e6):
        for ours, theirs in zip(moved(scale=scale), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_groups_make_no_difference():
    def two(model):
        return [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters())}]

    for ours, theirs in zip(moved(groups=two), moved(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_a_parameter_that_joins_later_counts_for_all():
    """Unfrozen, or added in a group: the others' steps are those of a run that is loaded at that moment."""
    for join in ("unfreeze", "add"):
        torch.manual_seed(0)
        model, extra = network(), nn.Parameter(torch.zeros(3))
        model[2].bias.requires_grad_(join == "add")
        groups = [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters())}]
        optimizer = LearnedOptimizer(groups, ZeroShot(), total_steps=T)
        train(model, optimizer, steps=3)
        if join == "add":
            optimizer.add_param_group({"params": [extra]})
        else:
            model[2].bias.requires_grad_()
        twin, twins = copy.deepcopy((model, extra))
        groups = [{"params": list(twin[0].parameters())}, {"params": list(twin[2].parameters())}]
        loaded = LearnedOptimizer(groups + [{"params": [twins]}] * (join == "add"), ZeroShot(), total_steps=T)
        loaded.load_state_dict(optimizer.state_dict())
        for ours, theirs in zip(train(model, optimizer), train(twin, loaded), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("orthogonal", [True, False])
def test_the_order_of_rows_and_columns_makes_no_difference(orthogonal):
    made = rule(orthogonal)
    generator = torch.Generator().manual_seed(3)
    grads = torch.randn(T, 6, 5, generator=generator, dtype=torch.float64)
    rows, columns = torch.randperm(6, generator=generator), torch.randperm(5, generator=generator)
    thetas = []
    for series in (grads, grads[:, rows][:, :, columns]):
        parameter = nn.Parameter(torch.zeros(6, 5, dtype=torch.float64))
        optimizer = LearnedOptimizer([parameter], made, total_steps=T)
        for g in series:
            parameter.grad = g.clone()
            optimizer.step()
        thetas.append(parameter.detach())
    torch.testing.assert_close(thetas[1], thetas[0][rows][:, columns], rtol=1e-9, atol=1e-13)


def test_what_never_had_a_gradient_stays():
    """Whole tensors, and coordinates of one of which others move."""
    touched, untouched = nn.Parameter(torch.ones(5, 6)), nn.Parameter(torch.ones(7, 4))
    optimizer = LearnedOptimizer([touched, untouched], ZeroShot(orthogonal=True), total_steps=T)
    for _ in range(T):
        touched.grad = torch.zeros_like(touched)
        touched.grad[:2] = torch.randn(2, 6)
        untouched.grad = torch.zeros_like(untouched)
        optimizer.step()
    assert torch.equal(untouched.detach(), torch.ones(7, 4))
    assert torch.equal(touched.detach()[2:], torch.ones(3, 6))
    assert (touched.detach()[:2] != 1).all()


def test_matrices_are_orthogonalised_and_keep_their_size():
    layout = Layout(
        (ParameterInfo("a", (6, 4)), ParameterInfo("b", (9,)), ParameterInfo("c", (3, 8))), copies=2
    )
    update = torch.randn(2, 24 + 9 + 24, generator=torch.Generator().manual_seed(0)).double()
    new = orthogonalised(update.flatten(), layout).view_as(update)
    assert torch.equal(new[:, 24:], update[:, 24:])  # a vector, and a matrix with a side of three
    for k in range(2):
        before, after = update[k, :24].view(6, 4), new[k, :24].view(6, 4)
        torch.testing.assert_close(after.square().mean(), before.square().mean())
        values = torch.linalg.svdvals(after)
        assert values.max() / values.min() < 1.8 < torch.linalg.cond(before)
    assert not newton_schulz(torch.zeros(4, 5)).any()


@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e18])
def test_parameters_of_any_shape_and_dtype_are_moved(scale):
    """Scalars, rows, empty and transposed ones, convolutions, bfloat16; one lacks a gradient; t passes T."""
    torch.manual_seed(0)
    shapes = [(), (0,), (0, 3), (1, 7), (4, 4, 3, 3), (5, 5), (6, 8)]
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    params[4] = nn.Parameter(params[4].detach().contiguous(memory_format=torch.channels_last))
    params[5] = nn.Parameter(params[5].detach().bfloat16())
    params[6] = nn.Parameter(params[6].detach().t())
    before = [parameter.detach().clone() for parameter in params]
    optimizer = LearnedOptimizer(params, ZeroShot(), total_steps=5)
    for t in range(7):
        for parameter in params:
            parameter.grad = scale * torch.randn_like(parameter)
        if t == 2:
            params[3].grad = None
        optimizer.step()
    for parameter, start in zip(params, before, strict=True):
        assert parameter.isfinite().all()
        moved = (parameter.detach() != start).float().mean() if parameter.numel() else 1
        assert moved > (0.8 if parameter.dtype == torch.bfloat16 else 0.999)  # rounding leads some back


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_gradients_whose_squares_are_no_numbers_move_nothing(scale):
    parameter = nn.Parameter(torch.ones(5, 4))
    optimizer = LearnedOptimizer([parameter], ZeroShot(), total_steps=5)
    for _ in range(3):
        parameter.grad = scale * torch.randn(5, 4)
        optimizer.step()
    assert torch.equal(parameter.detach(), torch.ones(5, 4))


@pytest.mark.parametrize("orthogonal", [True, False])
def test_in_a_loop_of_ones_own_it_is_the_rollouts(orthogonal):
    """In float64, as Newton and Schulz's iteration enlarges the rounding of small singular values."""
    made, task = rule(orthogonal), ModuleTask(network, sample=sample)
    ran, other = (Optimizees(task, None, 0, "test", [0], dtype=torch.float64) for _ in range(2))
    losses, theta = looped(network().double(), other, made, T)
    torch.testing.assert_close(losses, run_rule(made, ran, T)[:, 0], rtol=1e-9, atol=0)
    torch.testing.assert_close(theta, ran.theta[0], rtol=1e-9, atol=1e-12)


class Plain(ZeroShot):
    """Has no fused step: the definition is taken."""


def pair(dtype, orthogonal, compact=False, decay_facts=4, **options):
    """LearnedOptimizers with and without the fused step, on tensors of many shapes, and their parameters."""
    shapes = [(6, 5), (7,), (), (0,), (6, 5), (4, 2, 3), (3, 8), (5, 6)]
    generator = torch.Generator().manual_seed(4)
    starts = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    optimizers = []
    for kind in (ZeroShot, Plain):
        made = kind(orthogonal, compact=compact, decay_facts=decay_facts)
        made.load_state_dict(rule(decay_facts=decay_facts).state_dict())
        params = [nn.Parameter(start.clone().to(dtype)) for start in starts]
        params[-1] = nn.Parameter(params[-1].detach().t())  # not contiguous
        if dtype == torch.float64:
            made = made.double()
        optimizers.append(LearnedOptimizer(params, made, total_steps=T, **options))
    return optimizers


def walk(optimizers, scale=1.0):
    """T steps of both on the same gradients, of which two are None now and then."""
    generator = torch.Generator().manual_seed(5)
    both = [optimizer.param_groups[0]["params"] for optimizer in optimizers]
    for t in range(T):
        for index, params in enumerate(zip(*both, strict=True)):
            grad = scale * torch.randn(params[0].shape, generator=generator, dtype=torch.float64)
            for parameter in params:
                parameter.grad = None if index in (2, 4) and t % 3 == 1 else grad.to(parameter.dtype)
        for optimizer in optimizers:
            optimizer.step()
    return both


@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 2**-7)]
)
@pytest.mark.parametrize("orthogonal", [True, False])
@pytest.mark.parametrize("options", [{}, {"lr": 0.5, "weight_decay": 0.1, "maximize": True}], ids=str)
def test_the_fused_step_is_the_definition(dtype, rtol, orthogonal, options):
    """With another decay, rate and direction, missing gradients, and a matrix that is not contiguous.

    Newton and Schulz's iteration enlarges the rounding of small singular values.
    """
    optimizers = pair(dtype, orthogonal, **options)
    for ours, theirs in zip(*walk(optimizers), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol / 10)
        for name in ("statistics", "rule_state"):
            mine, other = (o.state[p][name] for o, p in zip(optimizers, (ours, theirs), strict=True))
            torch.testing.assert_close(mine, other, rtol=min(rtol, 1e-5), atol=1e-7)


@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float64, 1e-5), (torch.float32, 2**-6), (torch.bfloat16, 2**-5)]
)
@pytest.mark.parametrize("orthogonal", [True, False])
def test_the_fused_step_is_the_definition_with_compact_statistics_too(dtype, rtol, orthogonal):
    """To half of their words' bits: where two ways to add fall on two sides of a tie, they round apart."""
    for ours, theirs in zip(*walk(pair(dtype, orthogonal, compact=True)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol)


def optimizer_of(state_dtype, made=None):
    model = network()
    given = rule().float() if made is None else made
    return model, LearnedOptimizer(model.parameters(), given, total_steps=2 * T, state_dtype=state_dtype)


def test_compact_statistics_take_two_thirds_and_lead_nearly_to_the_same_place():
    (model, plain), (other, compact) = optimizer_of(None), optimizer_of(torch.bfloat16)
    numel = sum(parameter.numel() for parameter in model.parameters())
    assert (plain.state_bytes, compact.state_bytes) == (12 * numel, 8 * numel)
    starts = [parameter.detach().clone() for parameter in model.parameters()]
    for ours, theirs, start in zip(train(model, plain), train(other, compact), starts, strict=True):
        assert 0 < (ours - theirs).norm() < 0.02 * (ours - start).norm()
    held = [entries["statistics"] for entries in compact.state.values()]
    assert sum(whole.numel() * whole.element_size() for whole in held) == 8 * numel


def test_compact_statistics_are_resumed_bit_for_bit(tmp_path):
    """Of a mean that is zero beside one that is not, too, which is no normal number as a word."""
    (model, first), (other, second) = optimizer_of(torch.bfloat16), optimizer_of(torch.bfloat16)
    train(model, first)
    words = next(iter(first.state.values()))["statistics"]
    words.view(torch.int32)[0, 0] = 0x00003F80  # m = 0, m2 = 1
    torch.save([model.state_dict(), first.state_dict()], tmp_path / "run.pt")
    saved = torch.load(tmp_path / "run.pt")
    other.load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    assert next(iter(second.state.values()))["statistics"].view(torch.int32)[0, 0, 0] == 0x3F80
    for ours, theirs in zip(train(model, first), train(other, second), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="rule"):
        optimizer_of(None)[1].load_state_dict(saved[1])


def test_the_compact_rule_is_the_rule_by_its_name_and_in_groups():
    assert rule().compacted().config() == rule().config() | {"compact": True}
    assert rule().config() == {"orthogonal": True, "horizon_free": False}  # as in earlier state dicts
    assert rule(decay_facts=4).compacted().config() == rule(decay_facts=4).config() | {"compact": True}
    grouped = Grouped({"weight": rule(), "bias": CoordinatewiseLSTM(1, 3)}).compacted()
    assert [getattr(member, "compact", None) for member in grouped.members] == [True, None]
    model = network()
    optimizer = LearnedOptimizer(model.parameters(), total_steps=T, state_dtype=torch.bfloat16)
    assert optimizer.state_bytes == 8 * sum(parameter.numel() for parameter in model.parameters())
    assert Plain().compacted().compact is False  # which may read the statistics


def test_compact_statistics_have_no_second_order():
    task = ModuleTask(network, sample=sample)
    optimizees = Optimizees(task, None, 0, "train", range(2), dtype=torch.float64)
    rollout = Rollout(rule().compacted(), optimizees, total_steps=T)
    with pytest.raises(ValueError, match="second_order needs compact=False"):
        rollout.window(3, second_order=True)
    assert run_rule(rule().compacted(), optimizees, T).isfinite().all()


def test_in_float64_on_the_reference_backend_it_agrees_to_rounding(monkeypatch):
    monkeypatch.setenv("L2L_KERNELS_BACKEND", "reference")
    for ours, theirs in zip(*walk(pair(torch.float64, False)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_it_is_the_definition_at_the_ends_of_float32(scale):
    for ours, theirs in zip(*walk(pair(torch.float32, False), scale), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_statistics_that_others_wrote_into_are_summed_anew():
    """A user who sets them back, or torch.distributed.checkpoint, which loads in place."""
    first, second = (pair(torch.float32, False)[0] for _ in range(2))
    walk([first, second])
    for optimizer in (first, second):
        for entries in optimizer.state.values():
            entries["statistics"].mul_(0.5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))  # makes a new pack
    for ours, theirs in zip(*walk([first, second]), strict=True):
        assert torch.equal(ours, theirs)


def test_a_sharded_tensors_facts_are_those_of_the_whole():
    """Two processes with equal halves: each has the other's sums added to its own, in one message for all."""
    messages = []

    def add_up(sums):
        messages.append(tuple(sums.shape))
        return 2 * sums

    made, halves = rule(orthogonal=False), [torch.ones(3, 5).double(), torch.ones(2, 1).double()]
    wholes = [torch.cat([half, half]) for half in halves]
    shapes = [tuple(whole.shape) for whole in wholes]
    here = tuple(
        ParameterInfo("", shape, local_shape=tuple(half.shape), sum_over_shards=add_up)
        for shape, half in zip(shapes, halves, strict=True)
    )
    whole_step = made.tensor_step(
        Layout(tuple(ParameterInfo("", s) for s in shapes)), torch.zeros(3, 34).double()
    )
    half_step = made.tensor_step(Layout(here), torch.zeros(3, 17).double())
    generator = torch.Generator().manual_seed(0)
    for t in range(T):
        grads = [torch.randn(half.shape, generator=generator, dtype=torch.float64) for half in halves]
        half_step([0, 1], halves, grads, t, T, 1.0, 0.0, False)
        whole_step([0, 1], wholes, [torch.cat([g, g]) for g in grads], t, T, 1.0, 0.0, False)
    assert messages == [(2, 3)] * T
    for half, whole in zip(halves, wholes, strict=True):
        torch.testing.assert_close(torch.cat([half, half]), whole, rtol=1e-12, atol=1e-14)


def test_newton_and_schulzs_iteration_works_in_bfloat16():
    """As on a GPU: singular values come near 1 all the same."""
    matrices = torch.randn(3, 40, 24, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(newton_schulz(matrices.bfloat16()).float())
    assert 0.6 < values.min() <= values.max() < 1.3


def test_it_learns_without_a_rate():
    """At its start already: a network's loss falls as far as the best of Adam's rates takes it, or nearly."""

    def final(make):
        model = network()
        train(model, make(model), steps=200)
        x, y = sample(torch.Generator().manual_seed(9))
        return nn.functional.cross_entropy(model(x), y).item()

    ours = final(lambda model: LearnedOptimizer(model.parameters(), ZeroShot(), total_steps=200))
    rates = (0.001, 0.003, 0.01, 0.03, 0.1)
    adam = min(final(lambda model, lr=lr: torch.optim.Adam(model.parameters(), lr)) for lr in rates)
    assert ours < 1.2 * adam


def test_it_is_trained_by_evolution_and_not_by_windows(tmp_path):
    task = ModuleTask(network, sample=sample)
    with pytest.raises(ValueError, match="train it with estimator='evolution', or second_order=True"):
        Rollout(ZeroShot(), Optimizees(task, None, 0, "train", [0]), total_steps=T).window(3)
    model = MetaLearner(
        task, ZeroShot(), horizon=5, num_tasks=2, num_validation_optimizees=2, estimator="evolution"
    )
    before = [phi.detach().clone() for phi in model.rule.parameters()]
    fit(model, tmp_path)
    windows = MetaLearner(task, ZeroShot(), horizon=5, unroll=5)
    with pytest.raises(MisconfigurationException, match="train it with --model"):
        fit(windows, tmp_path)
    assert all(not torch.equal(a, b) for a, b in zip(before, model.rule.parameters(), strict=True))


def test_without_a_horizon_it_says_what_it_needs():
    with pytest.raises(ValueError, match="needs to know total_steps"):
        LearnedOptimizer(network().parameters(), ZeroShot())
    features, layout = NominalFeatures(), Layout((ParameterInfo("", (2,)),))
    x = features(torch.zeros(2), torch.zeros(3, 2), Time(torch.zeros(()), 10), layout)
    assert x.shape == (5 + len(FACTS), 2)
    assert x.isfinite().all()


@pytest.mark.parametrize("orthogonal", [True, False])
@pytest.mark.parametrize("decay_facts", [2, 4])
def test_a_file_of_it_is_read(tmp_path, decay_facts, orthogonal):
    made = ZeroShot(orthogonal, decay_facts=decay_facts)
    pretrained.save(made, tmp_path / "rule.safetensors")
    loaded = pretrained.load(tmp_path / "rule.safetensors")
    assert (type(loaded), loaded.config()) == (ZeroShot, made.config())


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0,), (), (1, 9), (8, 4, 3, 3)])
@pytest.mark.parametrize("scale", [1.0, 1e30])
def test_every_shape_and_every_gradient_leaves_finite_numbers(shape, scale):
    """A square that overflows moves nothing, as Adam's does."""
    params = [nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(5, 6))]
    optimizer = LearnedOptimizer(params, ZeroShot(), total_steps=T)
    for _ in range(T + 2):
        for parameter in params:
            parameter.grad = scale * torch.ones_like(parameter)
        optimizer.step()
    for parameter in params:
        assert parameter.isfinite().all()
        assert not parameter.numel() or bool(parameter.any()) == (scale == 1)


@pytest.mark.parametrize("count", [0, 3, "4", None])
def test_the_decay_follows_two_facts_or_four(count):
    with pytest.raises(ValueError, match="decay_facts must be 2 or 4, got"):
        ZeroShot(decay_facts=count)


@pytest.mark.parametrize("kind", ["fused", "definition", "population"])
@pytest.mark.parametrize("orthogonal", [True, False])
def test_a_step_takes_a_tenth_of_the_weights_at_most(orthogonal, kind):
    """However large they are, and whatever their decay: else they would change their signs, and grow."""
    made = (Plain if kind == "definition" else ZeroShot)(orthogonal, decay_facts=4).double()
    with torch.no_grad():
        made.decay.copy_(torch.tensor([5.0, 0.0, 4.0, 0.0]))
    if kind == "population":
        task = ModuleTask(lambda: nn.Linear(6, 5), nn.functional.mse_loss, sample=points, init_std=1e6)
        ones = Optimizees(task, None, 0, "test", range(2), dtype=torch.float64)
        before = ones.theta.clone()
        phis = {name: torch.stack([phi.detach()] * 2) for name, phi in made.named_parameters()}
        PerturbedRollout(made, ones, total_steps=T).window(phis, 1)
        pairs = [(before[:, :30], ones.theta[:, :30])]
    else:
        start = 1e6 * torch.randn(6, 5, dtype=torch.float64)
        parameter = nn.Parameter(start.clone())
        parameter.grad = torch.randn_like(start)
        LearnedOptimizer([parameter], made, total_steps=T).step()
        pairs = [(start, parameter.detach())]
    for start, end in pairs:
        torch.testing.assert_close(end, 0.9 * start, rtol=1e-3, atol=1)


def test_with_zeros_for_the_newer_facts_it_is_the_earlier_rule():
    """The same θ, bit for bit."""
    two, four = rule(), rule(decay_facts=4)
    state = two.state_dict()
    state["decay"] = torch.cat([state["decay"], torch.zeros(2, dtype=torch.float64)])
    four.load_state_dict(state)
    thetas = []
    for made in (two, four):
        model = network().double()
        thetas.append(train(model, LearnedOptimizer(model.parameters(), made, total_steps=T)))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*thetas, strict=True))
