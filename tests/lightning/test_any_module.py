"""What a module may do, each against a loop written by hand with torch's own modules and optimizers."""

import contextlib
import io
import random as stream
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from any_modules import (
    MODULES,
    Counts,
    Features,
    Named,
    Tied,
    constants,
    evaluated,
    frozen_first,
    hand_written,
    normalised,
    of_any_length,
    of_any_size,
    pairs,
    vectors,
)
from lightning.pytorch.callbacks import Callback
from meta_training import fit, make_small
from test_cuda_graphs import TapeRecorder
from torch import nn
from torch.nn import functional as F

from l2l_lightning import ModuleTask, Optimizees, Rollout, UpdateRule
from l2l_lightning.comparison.baselines import BASELINES, run_baseline
from l2l_lightning.errors import CaptureError, CheckpointError
from l2l_lightning.rollout.buffers import Workspace
from l2l_lightning.rollout.optimizees import check_evaluable
from l2l_lightning.rollout.perturbed import PerturbedRollout
from l2l_lightning.training.callbacks import PhiAveraging
from l2l_lightning.training.latest_checkpoint import LatestCheckpoint
from l2l_lightning.training.resharding import reshard

ONE_BY_ONE = "ignore:.*one after the other"
pytestmark = pytest.mark.filterwarnings(ONE_BY_ONE)


class Descent(UpdateRule):
    """u = -φ g."""

    state_shape = (0,)

    def __init__(self, rate=0.125):
        super().__init__()
        self.start = rate
        self.rate = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator=None):
        self.rate.fill_(self.start)

    def step(self, inputs, state):
        return -self.rate * inputs, state


def sgd(rate=0.125):
    return lambda parameters: torch.optim.SGD(parameters, rate)


def make(name, indices=range(3), dtype=torch.float64):
    build, sample, loss_fn, *_ = MODULES[name]
    return Optimizees(ModuleTask(build, loss_fn, sample=sample), None, 0, "train", indices, dtype=dtype)


def assert_left_as(optimizees, networks):
    """θ and what is each optimizee's own are the networks'."""
    for k, network in enumerate(networks):
        trained = [p for p in network.parameters() if p.requires_grad]
        theta = nn.utils.parameters_to_vector(trained).detach()
        torch.testing.assert_close(optimizees.theta[k], theta, rtol=1e-9, atol=1e-12)
        theirs = constants(network)
        for name, value in optimizees.buffers.items():
            torch.testing.assert_close(value[k], theirs[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_trained_as_by_hand(name):
    """Four steps with momentum, three optimizees; then a held-out loss, in eval mode where it differs."""
    build, sample, loss_fn, random, own = MODULES[name]
    optimizees = make(name)
    losses = run_baseline(BASELINES["momentum"], 0.05, optimizees, 4)
    assert set(optimizees.buffers) == own
    before = {name: value.clone() for name, value in optimizees.buffers.items()}
    held_out = optimizees.held_out_losses(None)
    assert all(torch.equal(value, before[name]) for name, value in optimizees.buffers.items())
    networks, generators = [], []
    for k in range(3):
        network, expected, generator = hand_written(
            *(build, sample, loss_fn, random, k, [4]),
            lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9),
        )
        torch.testing.assert_close(losses[:, k], expected, rtol=1e-9, atol=1e-12)
        networks.append(network)
        generators.append(generator)
    assert_left_as(optimizees, networks)
    for loss, network, generator in zip(held_out, networks, generators, strict=True):
        expected = evaluated(network.eval(), sample, loss_fn, random, generator)
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-9, atol=1e-12)


WINDOWED = ["dropout and BatchNorm", "spectral norm", "buffers of all kinds", "any size", "any length"]


@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize("name", WINDOWED)
def test_a_window_updates_buffers_once_a_step(name, second_order):
    """The evaluation that a window ends with leaves them to the next one's first."""
    build, sample, loss_fn, random, _ = MODULES[name]
    rollout = Rollout(Descent().double(), make(name))
    losses = [rollout.window(T, second_order=second_order).losses for T in (2, 3)]
    networks = []
    for k in range(3):
        network, expected, _ = hand_written(build, sample, loss_fn, random, k, [2, 3], sgd(), extra=True)
        torch.testing.assert_close(torch.cat(losses)[:, k], expected, rtol=1e-9, atol=1e-12)
        networks.append(network)
    assert_left_as(rollout.optimizees, networks)


@pytest.mark.parametrize("name", WINDOWED)
def test_the_meta_gradient_is_of_the_losses_of_the_window(name):
    """d/dφ Σ_t f_t = Σ_t ∇f_t · dθ_t/dφ, whose gradients are constants, of one evaluation after the other."""
    rollout, twin = Rollout(Descent().double(), make(name)), make(name)
    rollout.window(3).meta_loss.backward()
    expected, moved = 0.0, torch.zeros_like(twin.theta)  # dθ_t/dφ = -Σ_{s<t} g_s
    for _ in range(4):
        _, grad = twin.losses_and_grads()
        expected += (grad * moved).sum() / 3
        moved -= grad
        twin.theta -= 0.125 * grad
    torch.testing.assert_close(rollout.rule.rate.grad, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["dropout and BatchNorm", "any size"])
def test_a_pair_of_perturbed_rollouts_differs_in_its_rates_alone(name):
    """Each member has buffers of its own, and meets the same minibatches and random numbers."""
    build, sample, loss_fn, random, _ = MODULES[name]
    pair, rates = make(name, [0, 0, 1, 1]), [0.05, 0.2] * 2
    rollout = PerturbedRollout(Descent().double(), pair)
    losses = rollout.window({"rate": torch.tensor(rates, dtype=torch.float64)}, 4)
    networks = []
    for k, rate in enumerate(rates):
        network, expected, _ = hand_written(build, sample, loss_fn, random, k // 2, [4], sgd(rate))
        torch.testing.assert_close(losses[:, k], expected, rtol=1e-9, atol=1e-12)
        networks.append(network)
    assert_left_as(pair, networks)
    assert not torch.equal(pair.theta[0], pair.theta[1])


RESUMED = [
    "BatchNorm",
    "dropout and BatchNorm",
    "spectral norm",
    "a teacher",
    "dropout of any size",
    "frozen",
]


def saved(rollout):
    """Its state from a file, as a checkpoint has it."""
    file = io.BytesIO()
    torch.save(rollout.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("name", RESUMED)
def test_a_rollout_resumes_bit_for_bit(name):
    """From a file, in optimizees of other indices, and shared out among other processes."""
    rollout = Rollout(Descent(), make(name, range(4), torch.float32))
    rollout.window(3)
    state = saved(rollout)
    rest = rollout.window(2).losses
    resumed = Rollout(Descent(), make(name, range(7, 11), torch.float32))
    for _ in range(2):  # going on leaves a loaded state what it is
        resumed.load_state_dict(state)
        assert torch.equal(resumed.window(2).losses, rest)
        assert torch.equal(resumed.optimizees.theta, rollout.optimizees.theta)
        generators = saved(resumed)["optimizees"]["generators"]
        for ours, theirs in zip(generators, rollout.optimizees.generators, strict=True):
            assert torch.equal(ours, theirs.get_state())
        for key, value in rollout.optimizees.buffers.items():
            assert torch.equal(resumed.optimizees.buffers[key], value)
    halves = []
    for rank in range(2):
        half = Rollout(Descent(), make(name, range(2), torch.float32))
        half.load_state_dict(reshard([state], rank, 2))
        halves.append(saved(half))
    whole = reshard(halves, 0, 1)["optimizees"]
    assert whole.keys() == state["optimizees"].keys()
    for key, value in state["optimizees"].get("buffers", {}).items():
        assert torch.equal(whole["buffers"][key], value)


def global_streams():
    of_numpy = np.random.get_state()[1].tolist()  # noqa: NPY002
    return torch.get_rng_state().tolist(), stream.getstate(), of_numpy


@pytest.mark.parametrize(
    "name", ["dropout", "VAE", "dropout of any size", "other streams", "dropout in a GRU"]
)
def test_random_numbers_are_each_optimizees_own(name):
    """Bit for bit the same whoever shares the batch; and the global streams are left where they were."""
    made = [make(name, chosen) for chosen in ([0, 1, 2], [2, 0], [1])]
    before = global_streams()
    together, *others = (run_baseline(BASELINES["sgd"], 0.1, optimizees, 3) for optimizees in made)
    assert global_streams() == before
    assert torch.equal(together[:, [2, 0, 1]], torch.cat(others, 1))
    assert not torch.equal(together[:, 0], together[:, 1])


def test_what_a_state_lacks_is_refused():
    state = make("BatchNorm").state_dict()
    for other in (state | {"buffers": {}}, {key: value for key, value in state.items() if key != "buffers"}):
        with pytest.raises(ValueError, match="other shapes"):
            make("BatchNorm").load_state_dict(other)


# What is said, and how often


SLOWER = {
    "LSTM": r"vmap.*one after the other, which takes longer",
    "dropout": r"vmap .each draws random numbers of its own.*one after the other",
    "dropout in a GRU": r"vmap .each draws random numbers of its own.*one after the other",
    "any length": r"minibatches of different shapes.*one after the other",
    "any size": r"minibatches of different shapes.*one after the other",
}


@pytest.mark.parametrize("name", [*SLOWER, "BatchNorm", "frozen", "keywords"])
def test_one_line_says_that_optimizees_run_one_after_the_other(name):
    expected = contextlib.nullcontext([])
    if name in SLOWER:
        expected = pytest.warns(UserWarning, match=SLOWER[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error" if name not in SLOWER else "always")
        with expected as told:
            optimizees = make(name)
            for _ in range(4):
                optimizees.losses_and_grads()
            optimizees.held_out_losses(None)
    assert len(told) == (name in SLOWER)


def test_minibatches_of_one_shape_at_a_step_run_side_by_side():
    """A last smaller batch, which all optimizees meet at the same step: no loop, and no warning."""
    sizes = iter([6] + 3 * ([6] * 3 + [4] * 3))  # the first is tried by the task

    def sample(generator):
        x = torch.randn(next(sizes), 3, generator=generator)
        return x, x.sum(-1, keepdim=True)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task = ModuleTask(lambda: nn.Linear(3, 1), F.mse_loss, sample=sample)
        optimizees = Optimizees(task, None, 0, "train", range(3))
        losses = Rollout(Descent(), optimizees).window(5).losses
    assert losses.shape == (6, 3)
    assert losses.isfinite().all()


def test_one_optimizee_of_variable_lengths_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task = ModuleTask(lambda: nn.Linear(3, 1), F.mse_loss, sample=of_any_size)
        Rollout(Descent(), Optimizees(task, None, 0, "train", [0])).window(5)


@pytest.mark.parametrize(
    ("name", "reason"), [("any size", "differ in shape"), ("dropout", "random numbers|not permitted")]
)
def test_what_cannot_be_recorded_says_so_and_runs(name, reason):
    optimizees, plain = make(name), make(name)
    rollout = Rollout(Descent().double(), optimizees, Workspace(TapeRecorder()), None)
    with pytest.warns(UserWarning, match=f"cannot be recorded as a CUDA graph .*({reason})"):
        losses = rollout.window(3).losses
    assert torch.equal(losses, Rollout(Descent().double(), plain, cuda_graphs=False).window(3).losses)
    with pytest.raises(CaptureError, match=reason):
        Rollout(Descent().double(), make(name), Workspace(TapeRecorder()), True).window(3)


class StopError(Exception):
    """What kills a run."""


class StopsInTheSecondRollout(Callback):
    def on_train_batch_start(self, trainer, model, batch, batch_idx):
        if trainer.global_step == 4:  # the checkpoint is of one window less
            raise StopError


def test_a_run_that_is_interrupted_goes_on_with_its_buffers_and_random_numbers(tmp_path):
    """In the middle of a rollout: φ in the end is the uninterrupted run's, bit for bit."""

    def task():
        build, sample, loss_fn, *_ = MODULES["dropout and BatchNorm"]
        return ModuleTask(build, loss_fn, sample=sample)

    settings = {"num_rollouts": 4, "limit_val_batches": 0}
    whole, resumed = make_small(task()), make_small(task())
    fit(whole, tmp_path, PhiAveraging(0.5), **settings)
    latest = LatestCheckpoint(1, dirpath=str(tmp_path / "run/checkpoints"))
    callbacks = PhiAveraging(0.5), latest, StopsInTheSecondRollout()
    with pytest.raises(StopError):
        fit(make_small(task()), tmp_path, *callbacks, enable_checkpointing=True, **settings)
    fit(resumed, tmp_path, PhiAveraging(0.5), ckpt_path=latest.path, **settings)
    for ours, theirs in zip(resumed.rule.parameters(), whole.rule.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    content = torch.load(latest.path, weights_only=True)
    assert content["rollouts"][0]["optimizees"]["buffers"].pop("1.0.running_mean").shape == (2, 4)
    torch.save(content, tmp_path / "lacking.ckpt")
    with pytest.raises(CheckpointError, match=r"optimizees\.buffers lacks 1\.0\.running_mean"):
        fit(make_small(task()), tmp_path, PhiAveraging(0.5), ckpt_path=tmp_path / "lacking.ckpt", **settings)


def test_autocast_rounds_the_network_and_not_its_running_statistics():
    seen = []
    for enabled in (False, True):
        optimizees = make("dropout and BatchNorm", dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses = Rollout(Descent(), optimizees).window(3).losses
        assert {value.dtype for value in optimizees.buffers.values()} == {torch.float32, torch.int64}
        seen.append((losses, *optimizees.buffers.values()))
    for exact, rounded in zip(*seen, strict=True):
        torch.testing.assert_close(rounded, exact, rtol=2**-5, atol=2**-6)
    assert not torch.equal(seen[0][0], seen[1][0])


# What is θ, and what is not


def test_theta_is_what_requires_a_gradient_and_a_tied_tensor_is_there_once():
    def names(module):
        return [(t.name, t.shape) for t in ModuleTask(module, F.mse_loss, sample=vectors).tensors]

    assert names(frozen_first) == [("2.weight", (1, 5)), ("2.bias", (1,))]
    assert [name for name, _ in names(Tied)] == [
        *("first.weight", "first.bias", "second.bias", "head.weight", "head.bias")
    ]
    with pytest.raises(ValueError, match="no parameters to optimise, which require a gradient"):
        ModuleTask(lambda: nn.Linear(3, 1).requires_grad_(False), F.mse_loss, sample=vectors)


def test_a_given_modules_frozen_part_and_buffers_stay_as_they_are_given():
    """Of a network that was trained before, the head alone is drawn anew."""
    given = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    given[0].requires_grad_(False)
    given[1].running_mean.fill_(0.7)
    weight = given[0].weight.clone()
    task = ModuleTask(given, F.mse_loss, sample=vectors)
    assert task.num_coordinates == 8 + 5
    optimizees = Optimizees(task, None, 0, "train", range(2), dtype=torch.float64)
    assert set(optimizees.buffers) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert optimizees.buffers["1.running_mean"].eq(torch.tensor(0.7).double()).all()
    assert not torch.equal(optimizees.theta[0], optimizees.theta[1])
    twin = Optimizees(task, None, 0, "train", range(2), dtype=torch.float64)
    losses, _ = optimizees.losses_and_grads()
    batches = zip(twin.theta, *twin.next_batches().batch, strict=True)
    for k, (theta, x, y) in enumerate(batches):
        network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
        network.load_state_dict(given.state_dict())
        trained = [*network[1].parameters(), *network[2].parameters()]
        nn.utils.vector_to_parameters(theta, trained)
        torch.testing.assert_close(losses[k], F.mse_loss(network(x), y).detach(), rtol=1e-9, atol=1e-12)
    assert torch.equal(given[0].weight, weight)
    assert given[1].num_batches_tracked == 0
    assert given[1].running_mean.eq(0.7).all()


def test_what_all_builds_have_alike_is_shared():
    """A frozen network that every build loads is no optimizee's own, and costs its memory once."""
    loaded = nn.Linear(3, 4).state_dict()

    def build():
        network = normalised(nn.Identity())
        network[0].load_state_dict(loaded)
        network[0].requires_grad_(False)
        return network

    optimizees = Optimizees(ModuleTask(build, F.mse_loss, sample=vectors), None, 0, "train", range(2))
    assert not optimizees.buffers
    assert optimizees.losses_and_grads()[0].isfinite().all()


def test_init_std_draws_theta_alone():
    task = ModuleTask(Features, F.mse_loss, sample=vectors, init_std=0.5)
    optimizees = Optimizees(task, None, 0, "train", range(2))
    for k in range(2):
        generator = torch.Generator().manual_seed(0)
        generator.set_state(Optimizees(task, None, 0, "train", [k]).generators[0].get_state())
        assert torch.equal(generator.get_state(), optimizees.generators[k].get_state())
    assert not torch.equal(*optimizees.buffers["directions"])


def test_a_module_that_is_as_before_draws_what_it_drew():
    """θ0's seed and minibatches, and nothing else."""
    optimizees = make("LSTM", [5])
    generator = torch.Generator().manual_seed(optimizees.generators[0].initial_seed())
    torch.randint(2**62, (), generator=generator)
    assert torch.equal(generator.get_state(), optimizees.generators[0].get_state())
    optimizees.draw(2)
    for _ in range(2):
        MODULES["LSTM"][1](generator)
    assert torch.equal(generator.get_state(), optimizees.generators[0].get_state())


# Inputs


class Pair(nn.Linear):
    """Takes a pair as one argument, as Sequential does."""

    def forward(self, pair):
        return super().forward(pair[0]) + pair[1].sum(-1, keepdim=True)


def test_a_tuple_is_one_argument_of_a_module_that_takes_no_more():
    task = ModuleTask(lambda: Pair(3, 1), F.mse_loss, sample=pairs)
    assert Optimizees(task, None, 0, "train", [0]).losses_and_grads()[0].isfinite().all()


class Passing(nn.Linear):
    """Updates its buffer from the third call on."""

    def __init__(self):
        super().__init__(3, 1)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x):
        Passing.calls += 1
        if Passing.calls > 2:
            self.scale.mul_(0.9)
        return super().forward(x) * self.scale


class Lazily(nn.Linear):
    def forward(self, x):
        if not hasattr(self, "mean"):
            self.register_buffer("mean", x.mean(0))
        return super().forward(x - self.mean)


class Grows(Counts):
    def forward(self, x):
        self.mean = torch.cat([self.mean, x.mean(0)])
        return nn.Linear.forward(self, x)


def three_parts(generator):
    return (*vectors(generator), 1)


def three_inputs(generator):
    (x, y), z = pairs(generator)
    return (x, y, z), z


def packed(generator):
    x, y = of_any_length(generator)
    return nn.utils.rnn.pack_sequence(list(x)), y


class Packed(nn.Linear):
    def forward(self, packed):
        return super().forward(packed.data)[:4]


def of_two_kinds(generator):
    x, y = vectors(generator)
    return (x, y) if torch.rand((), generator=generator) < 0.5 else ((x, y), y)


@pytest.mark.parametrize(
    ("module", "sample", "message"),
    [
        (Named, vectors, "missing a required argument: 'y'|missing 1 required positional argument: 'y'"),
        (
            Named,
            lambda g: ((*pairs(g)[0], 0 * g.initial_seed()), pairs(g)[1]),
            r"takes \(x, y, \*, scale=None\) .*3 inputs",
        ),
        (
            lambda: nn.Linear(3, 1),
            three_parts,
            r"must be \(inputs, targets\), got 3 parts.*\(\(x, y\), targets\)",
        ),
        (lambda: nn.Linear(3, 1), lambda g: vectors(g)[0], r"must be \(inputs, targets\), got Tensor"),
        (lambda: Packed(3, 1), packed, "holds NoneType: packed sequences"),
        (lambda: Pair(3, 1), of_two_kinds, "two minibatches of .* differ in structure"),
        (Passing, vectors, "updates scale, which its first call left alone"),
        (lambda: Lazily(3, 1), vectors, "makes mean at its first call: register buffers"),
        (Grows, vectors, "changes the shape of mean"),
        (lambda: normalised(nn.SyncBatchNorm(4)), vectors, r"1 \(SyncBatchNorm\) would mix the optimizees"),
        (lambda: nn.LazyBatchNorm1d(affine=False), vectors, "running_mean has no shape before"),
    ],
)
def test_what_cannot_be_run_is_named(module, sample, message):
    def run():
        optimizees = Optimizees(ModuleTask(module, F.mse_loss, sample=sample), None, 0, "train", range(4))
        run_baseline(BASELINES["sgd"], 0.1, optimizees, 4)

    Passing.calls = 0
    with pytest.raises((ValueError, TypeError), match=message):
        run()


def test_a_task_is_tried_before_a_run():
    check_evaluable(ModuleTask(lambda: normalised(nn.Dropout(0.3)), F.mse_loss, sample=vectors), None, 0)


def test_the_documentation_runs():
    text = (Path(__file__).parents[2] / "docs/modules.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 4
    scope = {}
    with torch.random.fork_rng():
        for block in blocks:
            exec(block, scope)
    assert scope["losses"].shape == (3, 1)
