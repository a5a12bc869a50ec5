"""What autograd holds of an unrolled window, counted and measured, beside what the rollout holds."""

import json
import signal
import struct
from collections import Counter
from unittest.mock import Mock

import pytest
import torch
from learned_momentum import LearnedMomentum
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.graph_pb2 import GraphDef

from l2l_lightning.data import load_images
from l2l_lightning.reproduce import autograd_graph as graphs
from l2l_lightning.reproduce import graph_experiment
from l2l_lightning.reproduce import meta_step_memory as memory
from l2l_lightning.reproduce.autograd_graph import autograd_graph, unrolled_window, window_graph
from l2l_lightning.reproduce.meta_step_memory import MetaStep, held_bytes, measure
from l2l_lightning.reproduce.result_store import ResultStore
from l2l_lightning.reproduce.settings import Settings
from l2l_lightning.reproduce.tensorboard_graph import write_events
from l2l_lightning.rollout.optimizees import Optimizees
from l2l_lightning.rollout.rollout import Rollout
from l2l_lightning.rules import CoordinatewiseLSTM
from l2l_lightning.tasks import MNISTMLP, FunctionTask, Quadratic

FLOAT = 4


def lstm(**arguments):
    torch.manual_seed(0)
    return CoordinatewiseLSTM(**{"hidden_size": 4, **arguments})


def quadratic(indices=(0,)):
    return Optimizees(Quadratic(dim=3), None, 0, "train", indices)


def mlp():
    return Optimizees(MNISTMLP([2], batch_size=3), load_images("mnist").train, 0, "train", [0])


def function():
    task = FunctionTask(lambda theta: (theta[0] * theta[1] - 1) ** 2, dim=2)
    return Optimizees(task, None, 0, "train", [0])


CASES = {
    "two quadratics": (lambda: lstm(preprocessing="identity", num_layers=1), lambda: quadratic([0, 1])),
    "MLP": (lstm, mlp),
    "vmapped function": (lstm, function),
    "another rule": (LearnedMomentum, quadratic),
}


@pytest.fixture(params=CASES)
def case(request):
    make_rule, make_optimizees = CASES[request.param]
    return make_rule(), make_optimizees


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.exp())
        return 2 * x

    @staticmethod
    def backward(ctx, d):
        return 2 * d


def test_graphs_counted_by_hand():
    a, b = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    graph = autograd_graph((a * b).sum())
    assert [op.kind for op in graph.operations] == ["AccumulateGrad", "AccumulateGrad", "Mul", "Sum"]
    assert graph.edges == ((0, 2), (1, 2), (2, 3))
    assert [op.shapes for op in graph.operations] == [((3,),), ((3,),), ((3,),), ((),)]
    assert [op.saved_bytes for op in graph.operations] == [0, 0, 2 * 3 * FLOAT, 0]
    # A storage counts once: a by the first product; its square, and the sum, by the second.
    square = a * a
    graph = autograd_graph((square * square[:2].sum()).sum())
    assert graph.saved_bytes == (3 + 3 + 1) * FLOAT
    assert Counter(graph.edges)[0, 1] == 2
    own = autograd_graph(Twice.apply(a))
    assert [(op.kind, op.saved_bytes) for op in own.operations] == [
        ("AccumulateGrad", 0),
        ("Twice", 3 * FLOAT),
    ]
    empty = autograd_graph(torch.ones(2))
    assert (empty.operations, empty.edges, empty.saved_bytes) == ((), (), 0)


def test_the_unrolled_window_is_the_rollouts(case):
    rule, make_optimizees = case
    parameters = list(rule.parameters())
    for second_order in (False, True):
        optimizees = make_optimizees()
        before = optimizees.theta.clone()
        unrolled = unrolled_window(rule, optimizees, 3, second_order)
        window = Rollout(rule, make_optimizees()).window(3, second_order=second_order)
        torch.testing.assert_close(unrolled, window.meta_loss)
        ours, theirs = (torch.autograd.grad(loss, parameters) for loss in (window.meta_loss, unrolled))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
        assert torch.equal(optimizees.theta, before)


def test_saved_bytes_are_what_autograd_is_seen_to_save(case):
    rule, make_optimizees = case
    for second_order in (False, True):
        saved = []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda x: (saved.append(x), x)[1],  # noqa: B023 - called before the next round
            lambda x: x,
        )
        with hooks:
            meta_loss = unrolled_window(rule, make_optimizees(), 3, second_order)
        graph = autograd_graph(meta_loss)
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in saved}
        # Of the last step's state, and of the first loss's sum, nothing reaches the meta-loss.
        assert 0.6 * sum(storages.values()) < graph.saved_bytes <= sum(storages.values()) + 1024


@pytest.mark.parametrize("second_order", [False, True])
def test_every_operation_of_a_window_has_its_place(case, second_order):
    rule, make_optimizees = case
    graph = window_graph(rule, make_optimizees(), 4, second_order)
    assert graph == window_graph(rule, make_optimizees(), 4, second_order)
    assert all(source < target for source, target in graph.edges)
    parts = graph.by_part()
    assert set(parts) | {graphs.BACKWARD} == set(graphs.PARTS)
    assert second_order or graphs.BACKWARD not in parts
    counted = len(graph.operations), graph.saved_bytes
    assert tuple(map(sum, zip(*parts.values(), strict=True))) == counted
    names = {op.place.name for op in graph.operations if op.place.part == graphs.LEAVES}
    assert names == {"θ0", *dict(rule.named_parameters())}
    learned = Counter(op.place.step for op in graph.operations if op.place.part == graphs.LEARNED)
    assert set(learned) == {0, 1, 2, 3}
    # The first step's state is a constant, and nothing reads the last one's.
    assert learned[1] == learned[2]


def read_graph(path):
    """The second record's graph; a record is its length, a checksum, the message, a checksum."""
    data, events = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        events.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    version, event = events
    assert version.file_version == "brain.Event:2"
    return GraphDef.FromString(event.graph_def).node


def test_the_event_file_holds_the_graph(tmp_path):
    graph = window_graph(lstm(), mlp(), 2, second_order=True)
    path = write_events(graph, tmp_path / "window")
    nodes = read_graph(path)
    assert [node.op for node in nodes] == [op.kind for op in graph.operations]
    assert [node.attr["saved_bytes"].i for node in nodes] == [op.saved_bytes for op in graph.operations]
    index = {node.name: i for i, node in enumerate(nodes)}
    assert len(index) == len(nodes)
    edges = sorted((index[name], i) for i, node in enumerate(nodes) for name in node.input)
    assert edges == list(graph.edges)
    attributes = [node.attr["_output_shapes"].list.shape for node in nodes]
    shapes = [tuple(tuple(dim.size for dim in shape.dim) for shape in outputs) for outputs in attributes]
    assert shapes == [op.shapes for op in graph.operations]
    assert {"theta_0", "phi/weight_0", "phi/head_bias"} <= index.keys()
    scopes = {name.rpartition("/")[0] for name in index}
    assert {"t_00/optimizee_forward", "t_01/learned_optimizer", "t_01/theta_update", "meta-loss"} <= scopes
    # What TensorFlow accepts as a name.
    assert all(name.isascii() and " " not in name for name in index)
    assert write_events(graph, tmp_path / "again").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("num_layers", [1, 2])
def test_held_bytes_are_the_buffers_of_a_window(num_layers):
    rollout = Rollout(lstm(num_layers=num_layers), mlp())
    rollout.window(5)
    buffers = rollout.workspace._buffers.values()
    held = held_bytes(rollout.rule, rollout.optimizees.theta.numel(), 5)
    assert sorted(buffer.nbytes for buffer in buffers) == sorted(held.values())


@pytest.mark.slow
@pytest.mark.parametrize("mode", memory.MODES)
def test_the_memory_of_a_meta_step_is_what_it_holds(mode):
    task, images = MNISTMLP([20], batch_size=8), load_images("mnist").validation
    short, long = (measure(MetaStep(task, lstm(), images, 0, mode, unroll)) for unroll in (2, 12))
    if mode == "ours":
        held = sum(held_bytes(lstm(), task.num_coordinates, 12).values())
        assert 0.9 * held < long["peak_bytes"] < held + 24 * 2**20
        # One known gradient for each of the six parameters.
        assert (long["operations"], long["edges"]) == (7, 6)
    else:
        growth = long["graph_bytes"] - short["graph_bytes"]
        assert growth > 20 * 2**20
        assert 0.8 * growth < long["peak_bytes"] - short["peak_bytes"] < 1.6 * growth
        graph = window_graph(lstm(), mlp(), 12, mode == "unrolled, second order")
        assert len(graph.operations) == long["operations"]


class Stopped:
    """Kills the process that unpickles it."""

    def __reduce__(self):
        return eval, (f"__import__('os').kill(__import__('os').getpid(), {int(signal.SIGKILL)})",)


def test_a_process_that_is_killed_is_an_error():
    with pytest.raises(RuntimeError, match="terminated abruptly"):
        measure(MetaStep(Quadratic(dim=2), Stopped(), None, 0, "ours", 2))


@pytest.fixture
def outcome_of(tmp_path, monkeypatch):
    """The experiment's outcome without processes: what they would give is the argument's."""

    def run(measure):
        monkeypatch.setattr(graph_experiment, "measure", measure)
        store = ResultStore(Settings(out=str(tmp_path), quick=True, from_pretrained=True))
        return graph_experiment.GRAPH.outcome(store, {}, tmp_path)

    return run


def test_the_experiment_writes_what_it_returns(tmp_path, outcome_of):
    counts = {"operations": 10, "edges": 20}
    outcome = outcome_of(lambda s: {**counts, "peak_bytes": 1000 * s.unroll, "graph_bytes": 500 * s.unroll})
    results = outcome.results
    json.dumps(results, allow_nan=False)
    for name, operations in (("inner_step", 111), ("window", 1935)):  # docs/reproduction.md's
        (file,) = (tmp_path / "graph" / name).iterdir()
        assert len(read_graph(file)) == results[name]["operations"] == operations
        assert f"{operations} operations" in str(outcome.findings)
    read = {tuple(where): value for *where, value, _ in outcome.rows}
    assert len(read) == 2 * (3 * 5 + 3)
    for m in results["measurements"]:
        where = m["mode"], m["unroll"]
        assert [read[*where, key] for key in counts] == [10, 20]
        assert read[*where, "peak"] == m["peak_bytes"] == 1000 * m["unroll"]
        blocks = [read.get((*where, key), 0) for key in ("states", "gradients", "cotangents")]
        assert read[*where, "held"] == (sum(blocks) if m["mode"] == "ours" else 500 * m["unroll"])


@pytest.mark.parametrize("error", [RuntimeError("killed"), MemoryError("killed")])
def test_what_was_not_measured_is_told_and_the_rest_goes_on(outcome_of, error):
    outcome = outcome_of(Mock(side_effect=error))
    reason = "its process ended: killed"
    assert all(m["not_measured"] == reason for m in outcome.results["measurements"])
    assert {value for _, _, quantity, value, _ in outcome.rows if quantity == "peak"} == {None}
    assert outcome.findings[-1].verdict == f"Not measured: {reason}."
