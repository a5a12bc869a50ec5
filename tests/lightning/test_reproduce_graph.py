"""What autograd holds of an unrolled window, counted, drawn and measured, beside what the rollout holds."""

import csv
import io
import json
import os
import signal
import struct
from collections import Counter
from itertools import pairwise

import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest
import torch
from learned_momentum import LearnedMomentum
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.graph_pb2 import GraphDef
from tensorboardX.record_writer import masked_crc32c

from l2l_lightning.comparison.plots import HIGHLIGHT, png
from l2l_lightning.data import load_images
from l2l_lightning.reproduce import graph as graph_module
from l2l_lightning.reproduce.autograd_graph import (
    BACKWARD,
    LEARNED,
    LEAVES,
    META_LOSS,
    PARTS,
    autograd_graph,
    unrolled_window,
    window_graph,
)
from l2l_lightning.reproduce.graph import graph_experiment
from l2l_lightning.reproduce.graph_drawing import (
    HELD_COLOURS,
    PART_COLOURS,
    Measurement,
    layered_layout,
    step_figure,
    window_figure,
)
from l2l_lightning.reproduce.graph_events import write_events
from l2l_lightning.reproduce.memory import (
    MODES,
    Measured,
    MetaStep,
    NotMeasuredError,
    available_bytes,
    held_bytes,
    measure,
)
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
    "quadratic": (lstm, quadratic),
    "two quadratics": (lambda: lstm(preprocessing="identity", num_layers=1), lambda: quadratic([0, 1])),
    "MLP": (lstm, mlp),
    "vmapped function": (lstm, function),
    "another rule": (LearnedMomentum, quadratic),
}


@pytest.fixture(params=CASES)
def case(request):
    make_rule, make_optimizees = CASES[request.param]
    return make_rule(), make_optimizees


def leaf(*values):
    return torch.tensor(values, requires_grad=True)


def test_a_product_counted_by_hand():
    a, b = leaf(1.0, 2.0, 3.0), leaf(4.0, 5.0, 6.0)
    graph = autograd_graph((a * b).sum())
    assert [op.kind for op in graph.operations] == ["AccumulateGrad", "AccumulateGrad", "Mul", "Sum"]
    assert graph.edges == ((0, 2), (1, 2), (2, 3))
    assert [op.shapes for op in graph.operations] == [((3,),), ((3,),), ((3,),), ((),)]
    assert [op.saved for op in graph.operations] == [(), (), ((3,), (3,)), ()]
    assert [op.saved_bytes for op in graph.operations] == [0, 0, 2 * 3 * FLOAT, 0]
    assert graph.saved_bytes == 24
    assert graph.by_part() == {}


def test_a_storage_that_is_saved_again_counts_once():
    a = leaf(1.0, 2.0, 3.0)
    square = a * a
    graph = autograd_graph((square * square[:2].sum()).sum())
    # a by the first product; its square, and the sum, by the second.
    assert graph.saved_bytes == (3 + 3 + 1) * FLOAT
    assert Counter(graph.edges)[0, 1] == 2


def test_a_function_of_ones_own_is_read_too():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x.exp())
            return 2 * x

        @staticmethod
        def backward(ctx, d):
            return 2 * d

    graph = autograd_graph(Twice.apply(leaf(1.0, 2.0)))
    assert [(op.kind, op.saved_bytes) for op in graph.operations] == [("AccumulateGrad", 0), ("Twice", 8)]


def test_what_carries_no_graph_is_empty():
    graph = autograd_graph(torch.ones(2))
    assert (graph.operations, graph.edges, graph.saved_bytes) == ((), (), 0)


def test_the_unrolled_window_is_the_rollouts(case):
    rule, optimizees = case
    parameters = list(rule.parameters())
    for second_order in (False, True):
        unrolled = unrolled_window(rule, optimizees(), 3, second_order)
        window = Rollout(rule, optimizees()).window(3, second_order=second_order)
        torch.testing.assert_close(unrolled, window.meta_loss)
        ours, theirs = (torch.autograd.grad(loss, parameters) for loss in (window.meta_loss, unrolled))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def count_by_recursion(node, seen):
    seen.append(node)
    edges = 0
    for source, _ in node.next_functions:
        if source is not None:
            edges += 1 + (0 if source in seen else count_by_recursion(source, seen))
    return edges


def test_every_operation_and_edge_of_the_rollouts_graph_is_there():
    rule, seen = lstm(), []
    meta_loss = Rollout(rule, quadratic()).window(2, second_order=True).meta_loss
    edges = count_by_recursion(meta_loss.grad_fn, seen)
    graph = autograd_graph(meta_loss)
    assert (len(graph.operations), len(graph.edges)) == (len(seen), edges)
    # The rollout weighs its losses: its meta-loss alone may be written in other operations.
    mine = window_graph(rule, quadratic(), 2, second_order=True)
    weighing = Counter(op.kind for op in graph.operations)
    weighing.subtract(op.kind for op in mine.operations if op.place.part != META_LOSS)
    assert sum(weighing.values()) < 6
    assert min(weighing.values()) >= 0


def test_saved_bytes_are_what_autograd_is_seen_to_save(case):
    rule, optimizees = case
    for second_order in (False, True):
        saved = []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda x: (saved.append(x), x)[1],  # noqa: B023 - called before the next round
            lambda x: x,
        )
        with hooks:
            meta_loss = unrolled_window(rule, optimizees(), 3, second_order)
        graph = autograd_graph(meta_loss)
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in saved}
        # Of the last step's state, and of the first loss's sum, nothing reaches the meta-loss.
        assert 0.6 * sum(storages.values()) < graph.saved_bytes <= sum(storages.values()) + 1024


def test_every_operation_of_a_window_has_its_place(case):
    rule, optimizees = case
    for second_order in (False, True):
        graph = window_graph(rule, optimizees(), 4, second_order)
        assert None not in {op.place for op in graph.operations}
        parts = set(graph.by_part())
        assert parts - {BACKWARD} == set(PARTS) - {BACKWARD}
        assert (BACKWARD in parts) <= second_order
        assert sum(count for count, _ in graph.by_part().values()) == len(graph.operations)
        assert sum(held for _, held in graph.by_part().values()) == graph.saved_bytes
        names = {op.place.name for op in graph.operations if op.place.part == LEAVES}
        assert names == {"θ0", *dict(rule.named_parameters())}
        learned = Counter(op.place.step for op in graph.operations if op.place.part == LEARNED)
        assert set(learned) == {0, 1, 2, 3}
        # The first step's state is a constant, and nothing reads the last one's.
        assert learned[1] == learned[2]


def test_the_second_order_keeps_the_optimizees_backward():
    first, second = (window_graph(lstm(), mlp(), 3, second_order) for second_order in (False, True))
    assert second.by_part()[BACKWARD][0] > 0
    assert len(second.operations) > len(first.operations)
    assert second.saved_bytes > first.saved_bytes


def test_the_same_window_gives_the_same_graph_in_the_order_of_computation(case):
    rule, optimizees = case
    one, other = (window_graph(rule, optimizees(), 3, second_order=True) for _ in range(2))
    assert one == other
    assert all(source < target for source, target in one.edges)


def test_unrolling_leaves_theta_as_it_is():
    optimizees = quadratic()
    before = optimizees.theta.clone()
    torch.autograd.backward(unrolled_window(lstm(), optimizees, 3, second_order=True))
    assert torch.equal(optimizees.theta, before)


def read_events(path):
    data, events = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        message = data[12 : 12 + length]
        checksums = struct.unpack("<I", data[8:12]) + struct.unpack("<I", data[12 + length : 16 + length])
        assert checksums == (masked_crc32c(data[:8]), masked_crc32c(message))
        events.append(Event.FromString(message))
        data = data[16 + length :]
    return events


def test_the_event_file_holds_the_graph(tmp_path):
    graph = window_graph(lstm(), mlp(), 2, second_order=True)
    path = write_events(graph, tmp_path / "window")
    version, event = read_events(path)
    assert version.file_version == "brain.Event:2"
    nodes = GraphDef.FromString(event.graph_def).node
    assert [node.op for node in nodes] == [op.kind for op in graph.operations]
    assert [node.attr["saved_bytes"].i for node in nodes] == [op.saved_bytes for op in graph.operations]
    index = {node.name: i for i, node in enumerate(nodes)}
    assert len(index) == len(nodes)
    edges = sorted((index[name], i) for i, node in enumerate(nodes) for name in node.input)
    assert edges == list(graph.edges)
    shapes = [
        tuple(tuple(dim.size for dim in shape.dim) for shape in node.attr["_output_shapes"].list.shape)
        for node in nodes
    ]
    assert shapes == [op.shapes for op in graph.operations]
    assert {"theta_0", "phi/weight_0", "phi/head_bias"} <= index.keys()
    scopes = {name.rpartition("/")[0] for name in index}
    assert {"t_00/optimizee_forward", "t_01/learned_optimizer", "t_01/theta_update", "meta-loss"} <= scopes
    # What TensorFlow accepts as a name.
    assert all(name.isascii() and " " not in name for name in index)
    assert write_events(graph, tmp_path / "again").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("num_layers", [1, 2])
def test_held_bytes_are_the_buffers_of_a_window(num_layers):
    H, T = 4, 5
    rule, optimizees = lstm(num_layers=num_layers), mlp()
    n = optimizees.theta.numel()
    held = held_bytes(rule, n, T)
    assert held == {
        "states": (T + 1) * num_layers * 2 * H * n * FLOAT,
        "gradients": (T + 1) * n * FLOAT,
        "cotangents": T * n * FLOAT,
    }
    rollout = Rollout(rule, optimizees)
    rollout.window(T)
    buffers = rollout.workspace._buffers.values()
    assert sorted(buffer.nbytes for buffer in buffers) == sorted(held.values())


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES[1:])
def test_the_memory_of_an_unrolled_meta_step_grows_with_its_window(mode):
    def run(unroll):
        task, images = MNISTMLP([20], batch_size=8), load_images("mnist").validation
        return measure(MetaStep(task, lstm(), images, 0, mode, unroll))

    short, long = run(2), run(12)
    growth = long.graph_bytes - short.graph_bytes
    assert growth > 20 * 2**20
    assert 0.8 * growth < long.peak_bytes - short.peak_bytes < 1.6 * growth
    second = mode == MODES[2]
    assert len(window_graph(lstm(), mlp(), 12, second).operations) == long.operations


@pytest.mark.slow
def test_ours_takes_little_more_than_it_holds():
    task, images = MNISTMLP([20], batch_size=8), load_images("mnist").validation
    found = measure(MetaStep(task, lstm(), images, 0, "ours", 12))
    held = sum(held_bytes(lstm(), task.num_coordinates, 12).values())
    assert 0.9 * held < found.peak_bytes < held + 24 * 2**20
    # One known gradient for each of the six parameters.
    assert (found.operations, found.edges) == (7, 6)


class Stopped:
    """Kills the process that unpickles it."""

    def __reduce__(self):
        return eval, (f"__import__('os').kill(__import__('os').getpid(), {int(signal.SIGKILL)})",)


@pytest.mark.parametrize(
    ("rule", "reason"), [(Stopped(), "killed by SIGKILL"), (LearnedMomentum(), "failed: ModuleNotFoundError")]
)
def test_a_process_that_ends_early_is_named(rule, reason):
    with pytest.raises(NotMeasuredError, match=reason):
        measure(MetaStep(Quadratic(dim=2), rule, None, 0, "ours", 2))


def test_the_available_memory_is_some():
    assert 2**20 < available_bytes() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def pixels_of(data):
    return matplotlib.image.imread(io.BytesIO(data))[..., :3]


def has_colour(pixels, colour):
    return bool((np.abs(pixels - matplotlib.colors.to_rgb(colour)).max(axis=-1) < 0.01).any())


def test_a_layout_goes_down_and_leaves_room():
    graph = window_graph(lstm(), mlp(), 1, second_order=True)
    widths = [0.5 + 0.1 * (i % 3) for i in range(len(graph.operations))]
    layout = layered_layout(graph, widths)
    assert {(path[0], path[-1]) for path in layout.paths} == set(graph.edges)
    for path in layout.paths:
        assert (np.diff(layout.row[path]) == 1).all()
    for row in range(layout.row.max() + 1):
        here = [i for i in range(len(widths)) if layout.row[i] == row]
        assert here or row
        for a, b in pairwise(sorted(here, key=lambda i: layout.x[i])):
            assert layout.x[b] - layout.x[a] >= (widths[a] + widths[b]) / 2 - 1e-9


def test_a_steps_picture_names_its_operations():
    graph = window_graph(lstm(), mlp(), 1, second_order=True)
    figure = step_figure(graph, "A step")
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert "weight_0 [16, 6]" in texts
    assert f"θ0 [1, {mlp().theta.numel():,}]" in texts
    assert texts.count("Stack") == 2
    assert not any(text.startswith("View") for text in texts)
    pixels = pixels_of(png(figure))
    assert min(pixels.shape[:2]) > 800
    assert all(has_colour(pixels, PART_COLOURS[part]) for part in graph.by_part())


def test_a_windows_picture_has_the_graph_the_blocks_and_the_bars():
    graph = window_graph(lstm(), mlp(), 20, second_order=True)
    held = held_bytes(lstm(), mlp().theta.numel(), 20)
    measurements = [Measurement("ours", 10, 2**20, 2**21), Measurement("unrolled", 10, None, None)]
    figure = window_figure(graph, held, measurements, "A window")
    above, left, right = figure.axes
    assert above.get_title(loc="left").startswith(f"A window: {len(graph.operations):,} operations")
    assert len(above.collections[-1].get_offsets()) == len(graph.operations)
    assert [text.get_text() for text in left.texts][1].startswith("states, ")
    assert len(left.texts) == 1 + len(HELD_COLOURS)
    assert {text.get_text() for text in right.texts} == {"2", "not\nmeasured"}
    pixels = pixels_of(png(figure))
    assert has_colour(pixels, HIGHLIGHT)


@pytest.fixture
def measured_elsewhere(monkeypatch):
    """No processes: what they would give is made up, T by T."""
    monkeypatch.setattr(
        graph_module, "measure", lambda step: Measured(1000 * step.unroll, 10, 20, 500 * step.unroll)
    )


def test_the_experiment_writes_what_it_returns(tmp_path, measured_elsewhere):
    told, rule = [], lstm().requires_grad_(False)
    results = graph_experiment(
        tmp_path,
        task=MNISTMLP([2], batch_size=3),
        rule=rule,
        images=load_images("mnist").train,
        seed=0,
        windows=[2, 3],
        progress=told.append,
    )
    json.dumps(results, allow_nan=False)
    assert not any(parameter.requires_grad for parameter in rule.parameters())
    assert len(told) == 2 + 2 * len(MODES)
    for name, unroll in (("inner_step", 1), ("window", 20)):
        graph = window_graph(lstm(), mlp(), unroll, second_order=True)
        assert results[name]["operations"] == len(graph.operations)
        assert results[name]["edges"] == len(graph.edges)
        assert results[name]["saved_bytes"] == graph.saved_bytes
        (file,) = (tmp_path / "graph" / name).iterdir()
        assert len(GraphDef.FromString(read_events(file)[1].graph_def).node) == len(graph.operations)
        pixels = pixels_of((tmp_path / f"{name}.png").read_bytes())
        assert pixels.std() > 0.05
    with (tmp_path / "results.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    read = {
        (row["mode"], int(row["unroll"]), row["quantity"], row["unit"]): int(row["value"]) for row in rows
    }
    expected = {}
    for measurement in results["measurements"]:
        where = measurement["mode"], measurement["unroll"]
        for quantity in ("operations", "edges"):
            expected[*where, quantity, "1"] = measurement[quantity]
        for name in measurement:
            if name.endswith("_bytes"):
                expected[*where, name.removesuffix("_bytes"), "bytes"] = measurement[name]
    assert read == expected
    assert len(rows) == len(read) == 2 * (3 * 5 + 3)
    ours = next(m for m in results["measurements"] if (m["mode"], m["unroll"]) == ("ours", 3))
    assert ours["held_bytes"] == sum(held_bytes(lstm(), mlp().theta.numel(), 3).values())
    assert ours["peak_bytes"] == 3000


def test_what_would_not_fit_is_not_started(tmp_path, monkeypatch):
    monkeypatch.setattr(graph_module, "available_bytes", lambda: 2**10)
    monkeypatch.setattr(graph_module, "measure", lambda step: pytest.fail("must not be measured"))
    results = graph_experiment(
        tmp_path, task=Quadratic(dim=3), rule=lstm(), images=None, seed=0, windows=[100]
    )
    for measurement in results["measurements"]:
        assert measurement["peak_bytes"] is None
        assert "GiB are free" in measurement["not_measured"]
    rows = list(csv.DictReader((tmp_path / "results.csv").open(encoding="utf-8")))
    assert {row["value"] for row in rows if row["quantity"] == "peak"} == {""}


def test_a_failed_measurement_is_told_and_the_rest_goes_on(tmp_path, monkeypatch):
    def fails(step):
        raise NotMeasuredError("its process was killed by SIGKILL")

    monkeypatch.setattr(graph_module, "measure", fails)
    results = graph_experiment(tmp_path, task=Quadratic(dim=3), rule=lstm(), images=None, seed=0, windows=[2])
    assert [m["not_measured"] for m in results["measurements"]] == ["its process was killed by SIGKILL"] * 3
    assert (tmp_path / "window.png").stat().st_size > 10_000
