"""Kept and recomputed states against full histories and the unrolled graph: the same numbers, less memory."""

import itertools

import pytest
import torch
from exactness import assert_identical
from meta_training import fit, make_rule
from problems import Rosenbrock, gradient
from problems import make_rule_of as make
from test_cuda_graphs import TapeRecorder
from unrolled import assert_same_carried, assert_windows_are_unrolled

from l2l_lightning import MetaLearner
from l2l_lightning.rollout import history
from l2l_lightning.rollout.buffers import Workspace
from l2l_lightning.rollout.optimizees import Optimizees
from l2l_lightning.rollout.rollout import Rollout
from l2l_lightning.tasks import FunctionTask, Quadratic

BFLOAT16 = {"history_dtype": "bfloat16"}


class Wide(Rosenbrock):
    """More coordinates than a chunk of the least size has."""

    num_coordinates = 1500

    def init(self, generator):
        return 0.3 * torch.randn(1500, generator=generator)

    def instance(self, generator):
        return torch.rand(1500, generator=generator)

    def batch(self, instance, images, generator):
        return instance, torch.randn(1500, generator=generator)


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 1024 coordinates, the fewest there are."""
    monkeypatch.setattr(history, "CHUNK_BYTES", 1)


def make_optimizees(task=None, dtype=torch.float64, indices=range(3)):
    return Optimizees(task or Rosenbrock(), None, 0, "train", indices, dtype=dtype)


EVERY = [
    ("LSTM", 1),
    ("LSTM", 3),
    ("three layers", 2),
    ("three layers", 100),
    ("momentum", 7),
    ("RNNprop", 3),
]


@pytest.mark.parametrize(("name", "every"), EVERY)
def test_the_meta_gradient_is_the_unrolled_graphs(name, every):
    """Every state kept, segments of one length and of two, one segment as long as the window and longer."""
    ours, theirs = make_optimizees(), make_optimizees()
    rollout, carried = assert_windows_are_unrolled(
        make(name), ours, theirs, (7, 1, 4), checkpoint_every=every
    )
    assert_same_carried(rollout, carried)
    torch.testing.assert_close(ours.theta, theirs.theta, rtol=1e-12, atol=1e-14)


CHUNKED = [("LSTM", 1), ("LSTM", 4), ("three layers", 5), ("momentum", 4), ("momentum", 30), ("RNNprop", 4)]


@pytest.mark.parametrize(("name", "every"), CHUNKED)
@pytest.mark.usefixtures("small_chunks")
def test_a_chunked_meta_gradient_is_the_full_historys(name, every):
    """Five chunks of 4500 coordinates: the last has 404 of them, and several optimizees share one."""
    rule = make(name)
    full = Rollout(rule, make_optimizees(Wide()))
    chunked = Rollout(rule, make_optimizees(Wide()), checkpoint_every=every)
    for T in (5, 9):
        a, b = full.window(T), chunked.window(T)
        assert_identical(a.losses, b.losses)
        assert_identical(full.parts[0].state, chunked.parts[0].state)
        d_full, d_chunked = gradient(rule, a), gradient(rule, b)
        assert d_full.norm() > 0
        assert (d_chunked - d_full).norm() <= 1e-12 * d_full.norm()


@pytest.mark.parametrize("name", ["LSTM", "momentum", "RNNprop"])
@pytest.mark.parametrize("options", [BFLOAT16, {**BFLOAT16, "checkpoint_every": 3}])
def test_rounding_kept_states_does_not_touch_the_rollout(name, options):
    rule = make(name, torch.float32)
    full = Rollout(rule, make_optimizees(dtype=torch.float32))
    rounded = Rollout(rule, make_optimizees(dtype=torch.float32), **options)
    for T in (6, 2, 5):
        assert torch.equal(full.window(T).losses, rounded.window(T).losses)
        assert torch.equal(full.parts[0].state, rounded.parts[0].state)
        assert torch.equal(full.optimizees.theta, rounded.optimizees.theta)


UNIT_ROUNDOFF = 2.0**-8
"""Of bfloat16, which has 8 significant bits: rounding x errs by 2⁻⁸ |x| at most."""


@pytest.mark.parametrize(
    ("name", "every"), [("LSTM", None), ("LSTM", 3), ("three layers", 1), ("momentum", 9), ("momentum", 3)]
)
def test_the_error_of_rounded_states_is_within_what_the_roundoff_allows(name, every):
    """|Δ d_φ| ≤ u Σ |∂d_φ/∂s| |s| over all states that are rounded, to first order in u, for every parameter.

    The sensitivities are central differences of the backward itself, in float64.
    """
    rule, T = make(name), 9
    exact = Rollout(rule, make_optimizees(indices=[0]))
    rounded = Rollout(rule, make_optimizees(indices=[0]), checkpoint_every=every, **BFLOAT16)
    for rollout in (exact, rounded):
        rollout.window(3)  # s_0 of a rollout is zero, which rounds to itself
    kept = history.KeptStates(rule, exact.parts[0].state, T, exact.workspace, every, torch.float64)
    exact._history = lambda *_: kept
    d_exact, d_rounded = (gradient(rule, rollout.window(T)) for rollout in (exact, rounded))
    grads = exact.workspace.empty("grads", (T + 1, 4), exact.optimizees.theta)

    def perturbed(i, change):
        value = states[i].item()
        states[i] = value + change
        d_phi = torch.cat([d.reshape(-1) for d in kept.gradient(grads, grads[:-1], [1.0] * (T + 1))])
        states[i] = value
        return d_phi

    states, bound = kept.stored.view(-1), torch.zeros_like(d_exact)
    assert torch.equal(perturbed(0, 0.0), d_exact)
    for i in states.nonzero().flatten().tolist():
        h = 1e-6 * states[i].abs().item()
        derivative = (perturbed(i, h) - perturbed(i, -h)) / (2 * h)
        bound += UNIT_ROUNDOFF * states[i].abs() * derivative.abs()
    error = (d_rounded - d_exact).abs()
    assert error.max() > 0
    # What is of second order in u, relative to the largest derivative.
    assert (error <= bound + UNIT_ROUNDOFF**2 * d_exact.abs().max()).all()
    assert error.norm() <= UNIT_ROUNDOFF * d_exact.norm()


KINDS = [{}, {"checkpoint_every": 3}, {"checkpoint_every": 2}, BFLOAT16, {**BFLOAT16, "checkpoint_every": 2}]


@pytest.mark.parametrize("name", ["LSTM", "three layers", "momentum", "RNNprop"])
def test_recorded_windows_equal_plain_ones(name):
    """Histories of every kind in one workspace, each recorded once; later its buffers have grown."""
    rule, recorder, task = make(name, torch.float32), TapeRecorder(), Rosenbrock()
    workspace, recordings = Workspace(recorder), []
    for _ in range(2):
        for options, indices in itertools.product(KINDS, (range(2), range(2, 4))):
            recorded, plain = (
                Rollout(rule, make_optimizees(task, torch.float32, indices), *arguments, **options)
                for arguments in ((workspace, True), (None, False))
            )
            for _ in range(2):
                a, b = recorded.window(5), plain.window(5)
                assert torch.equal(a.losses, b.losses)
                assert torch.equal(gradient(rule, a), gradient(rule, b))
                assert torch.equal(recorded.parts[0].state, plain.parts[0].state)
        recordings.append(recorder.recordings)
    assert recordings[0] == len(KINDS)
    assert recordings[1] <= 2 * len(KINDS)


BUFFERS = [(10, 100, "float32"), (40, 100, "bfloat16"), (40, 10, "float32"), (40, 10, "bfloat16")]


@pytest.mark.parametrize(("T", "every", "dtype"), [*BUFFERS, (40, None, "float32"), (40, None, "bfloat16")])
@pytest.mark.usefixtures("small_chunks")
def test_buffers_hold_the_kept_states_the_gradients_and_one_chunk(T, every, dtype):
    rule, n = make("LSTM", torch.float32), 10_000
    task = FunctionTask(lambda theta: theta.square().sum(), dim=n)
    optimizees = make_optimizees(task, torch.float32, [0])
    rollout = Rollout(rule, optimizees, checkpoint_every=every, history_dtype=dtype)
    rollout.window(T)
    held = sum(b.numel() * b.element_size() for b in rollout.workspace._buffers.values())
    size, state = {"float32": 4, "bfloat16": 2}[dtype], 20  # two layers of 5 units
    kept = T + 1 if every is None else -(-T // every)
    gradients = 4 * n * (T + 1)
    if (every, dtype) == (None, "float32"):
        assert held == 4 * n * state * kept + gradients + 4 * n * T
    else:
        segment = min(every or T, T) + 1
        assert held == size * n * state * kept + gradients + 4 * 1024 * (state * segment + T + 1)


def make_model(**options):
    rollouts = {"horizon": 6, "unroll": 4, "num_tasks": 2, "num_validation_optimizees": 2}
    return MetaLearner(Quadratic(dim=3), make_rule(), **rollouts, **options)


def test_a_meta_training_gives_the_same_rule_and_its_checkpoint_names_the_options(tmp_path):
    models = [make_model(), make_model(checkpoint_every=3)]
    for model in models:
        trainer = fit(model, tmp_path, num_rollouts=3)
    for a, b in zip(*(model.rule.parameters() for model in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    trainer.save_checkpoint(tmp_path / "whole.ckpt")
    again = MetaLearner.from_checkpoint(tmp_path / "whole.ckpt")
    assert again.settings() == models[1].settings()
    assert (again.checkpoint_every, again.history_dtype) == (3, "float32")


IMPOSSIBLE = {
    "checkpoint_every must be at least 1, got 0": {"checkpoint_every": 0},
    "history_dtype must be one of .*, got 'float16'": {"history_dtype": "float16"},
}


@pytest.mark.parametrize("message", IMPOSSIBLE)
def test_impossible_options_are_named(message):
    for build in (make_model, lambda **options: Rollout(make("LSTM"), make_optimizees(), **options)):
        with pytest.raises(ValueError, match=message):
            build(**IMPOSSIBLE[message])


@pytest.mark.parametrize("options", [{"checkpoint_every": 2}, BFLOAT16, {"cuda_graphs": True}])
def test_an_unrolled_graph_has_no_history_and_cannot_be_recorded(options):
    message = "second_order.*" + (
        "cuda_graphs" if "cuda_graphs" in options else "checkpoint_every and history_dtype"
    )
    with pytest.raises(ValueError, match=message):
        make_model(second_order=True, **options)
    with pytest.raises(ValueError, match=message):
        Rollout(make("LSTM"), make_optimizees(), **options).window(2, second_order=True)


@pytest.mark.parametrize("T", [1, 2, 7])
def test_suffix_sums_by_a_scan_are_those_of_the_loop(T):
    """What a GPU does in a few launches; Σ_{r>t} w_r g_r in float64, written out."""
    generator = torch.Generator().manual_seed(T)
    grads = torch.randn(T + 1, 5, dtype=torch.float64, generator=generator)
    scale = torch.randn(T + 1, dtype=torch.float64, generator=generator).tolist()
    expected = [sum(scale[r] * grads[r] for r in range(t + 1, T + 1)) for t in range(T)]
    for function in (history.suffix_sums, history.scanned_suffix_sums):
        out = torch.full((T, 5), torch.nan, dtype=torch.float64)
        function(grads, scale, out)
        torch.testing.assert_close(out, torch.stack(expected), rtol=1e-12, atol=1e-12)
