"""Recorded windows against plain ones, bit for bit: with a stand-in on the CPU, and on a GPU."""

import contextlib
import copy
import pickle
import warnings

import pytest
import torch
from learned_momentum import LearnedMomentum
from problems import generator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from l2l_lightning.data import load_images
from l2l_lightning.rollout.cuda_graphs import CaptureError, GraphCache, Recorder
from l2l_lightning.rollout.optimizees import Optimizees
from l2l_lightning.rollout.rollout import Rollout, Workspace, run_rule
from l2l_lightning.rules import CoordinatewiseLSTM, RNNprop
from l2l_lightning.tasks import MNISTMLP, FunctionTask, Mixture, ModuleTask, NoisyScaledSquare, Quadratic


def alias(value):
    """Another tensor on the same memory: like a graph, it does not follow `tensor.data = …`."""
    return value.detach() if isinstance(value, torch.Tensor) else value


class Tape(TorchDispatchMode):
    """Every operation with its operands' and results' memory, to be repeated there."""

    def __init__(self):
        super().__init__()
        self.operations, self.replays = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        result = function(*args, **kwargs)
        self.operations.append((function, *tree_map(alias, (args, kwargs, result))))
        return result

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for function, args, kwargs, recorded in self.operations:
            schema = function._schema
            if schema.is_mutable:
                function(*args, **kwargs)
            elif not any(r.alias_info for r in schema.returns):  # a view shows what its base has become
                result = function(*args, **kwargs)
                for old, new in zip(tree_leaves(recorded), tree_leaves(result), strict=True):
                    if isinstance(old, torch.Tensor):  # an operator may leave out a result
                        old.copy_(new)


class TapeRecorder(Recorder):
    """Stands in for CUDA graphs on the CPU: repeats operations on fixed memory, and no Python runs again."""

    def __init__(self):
        super().__init__()
        self.tapes = []

    def why_not(self, device):
        return None

    def record(self, function, device):
        function()  # a warm-up, which changes the static arguments
        tape = Tape()
        try:
            with tape:
                function()
        except RuntimeError as error:
            raise CaptureError(str(error)) from error
        self.tapes.append(tape)
        return tape

    @property
    def recordings(self):
        return len(self.tapes)

    @property
    def replays(self):
        return sum(tape.replays for tape in self.tapes)


def linear():
    """Its running statistics are updated at every step, in a recording on its own memory."""
    return torch.nn.Sequential(torch.nn.Linear(784, 10), torch.nn.BatchNorm1d(10))


TASKS = {
    "quadratic": lambda: Quadratic(dim=5),
    "noise": lambda: NoisyScaledSquare(dim=4),
    "function": lambda: FunctionTask(lambda theta: (theta[0] * theta[1] - 1) ** 2 + theta[2] ** 4, dim=3),
    "MLP": lambda: MNISTMLP([4], batch_size=6),
    "module": lambda: ModuleTask(linear, batch_size=6),
}
RULES = {
    "LSTM": lambda: CoordinatewiseLSTM(hidden_size=5),
    "reference": lambda: CoordinatewiseLSTM(hidden_size=3, num_layers=1, backend="reference"),
    "momentum": LearnedMomentum,
    "RNNprop": lambda: RNNprop(hidden_size=3),
}


@pytest.fixture(scope="module")
def images():
    return load_images("mnist").train


class Run:
    """A meta-training in miniature, recorded or not: Adam on windows of rollouts that share a workspace."""

    def __init__(self, make_rule, cuda_graphs, recorder=None, device="cpu", dtype=torch.float32):
        torch.manual_seed(0)
        self.rule = make_rule().to(device, dtype)
        self.adam = torch.optim.Adam(self.rule.parameters(), lr=0.01)
        self.workspace = Workspace(recorder)
        self.cuda_graphs = cuda_graphs
        self.device, self.dtype = device, dtype
        self.seen = []

    def optimizees(self, task, images, indices, stream="train"):
        images = images if task.dataset else None
        return Optimizees(task, images, 0, stream, indices, self.device, self.dtype)

    def rollout(self, task, images, indices, unrolls, weights=None):
        optimizees = self.optimizees(task, images, indices)
        rollout = Rollout(self.rule, optimizees, self.workspace, self.cuda_graphs)
        for T in unrolls:
            window = rollout.window(T, None if weights is None else weights[: T + 1])
            self.adam.zero_grad()
            window.meta_loss.backward()
            gradients = [p.grad.clone() for p in self.rule.parameters()]
            self.adam.step()
            self.seen += [window.meta_loss.detach(), window.losses, optimizees.theta.clone()]
            self.seen += [rollout.parts[0].state.clone(), rollout.parts[0].statistics.clone(), *gradients]
            self.seen += [value.clone() for value in optimizees.buffers.values()]

    def validate(self, task, images, K, horizon):
        optimizees = self.optimizees(task, images, range(K), "validation")
        losses = run_rule(self.rule, optimizees, horizon, self.workspace, self.cuda_graphs)
        self.seen += [losses, optimizees.theta, *optimizees.buffers.values()]


def same(ours, theirs):
    assert len(ours.seen) == len(theirs.seen) > 0
    for a, b in zip(ours.seen, theirs.seen, strict=True):
        assert torch.equal(a, b)


def both(make_rule, **arguments):
    recorder = TapeRecorder()
    return Run(make_rule, True, recorder, **arguments), Run(make_rule, False, **arguments), recorder


# Each task with one optimizee and with several, each rule with each dtype and number.
PAIRS = [("quadratic", "LSTM", 1, 32), ("quadratic", "reference", 4, 64), ("noise", "momentum", 1, 64)]
PAIRS += [("noise", "LSTM", 4, 32), ("function", "reference", 1, 32), ("function", "momentum", 4, 32)]
PAIRS += [("MLP", "LSTM", 1, 64), ("MLP", "reference", 4, 32), ("module", "momentum", 1, 32)]
PAIRS += [("module", "LSTM", 4, 64), ("noise", "RNNprop", 4, 32), ("MLP", "RNNprop", 1, 64)]


@pytest.mark.parametrize(("task", "rule", "K", "bits"), PAIRS)
def test_replayed_windows_equal_plain_ones(task, rule, K, bits, images):
    task = TASKS[task]()
    recorded, plain, recorder = both(RULES[rule], dtype=getattr(torch, f"float{bits}"))
    weights = torch.rand(4, generator=generator(1))
    for run in (recorded, plain):
        run.rollout(task, images, range(K), [3, 3, 3])
        run.rollout(task, images, range(K, 2 * K), [3, 3], weights)
    same(recorded, plain)
    # One recording serves every window and every rollout, whatever φ and the weights have become.
    assert (recorder.recordings, recorder.replays) == (1, 5)


def test_each_length_and_number_of_optimizees_is_recorded_once(images):
    task = MNISTMLP([4], batch_size=6)
    recorded, plain, recorder = both(RULES["LSTM"])
    for run in (recorded, plain):
        for first, unrolls in ((0, [2, 5, 2]), (2, [5, 2]), (4, [2])):
            run.rollout(task, images, range(first, first + 2), unrolls)
        run.rollout(task, images, range(3), [2])
    same(recorded, plain)
    # Two steps, five, then two again on the history that five had made grow, and two with three optimizees.
    assert recorder.recordings == 4


def test_validations_run_through_replayed_stretches_and_a_fit_follows(images):
    """Under inference mode, as Lightning's trainer validates: nothing that outlives it is of that mode.

    Only a task that needs no autograd can be evaluated in it; others say so (test_bad_input.py).
    """
    recorded, plain, recorder = both(RULES["LSTM"])
    mlp, quadratic = MNISTMLP([4], batch_size=6), Quadratic(dim=3)
    for run in (recorded, plain):
        for task in (mlp, quadratic):
            for indices in (range(2), range(2, 4)):
                with torch.inference_mode(task is mlp):
                    run.validate(task, images, K=3, horizon=50)
                run.rollout(task, images, indices, [3, 3])
    same(recorded, plain)
    assert not any(p.grad.is_inference() for run in (recorded, plain) for p in run.rule.parameters())
    # For each task a window, stretches of 20 steps, and the last of 10; two validations and four windows.
    assert (recorder.recordings, recorder.replays) == (6, 2 * (2 * 3 + 4))


def test_parameters_that_move_are_found_again(images):
    recorded, plain, recorder = both(RULES["LSTM"])
    task = Quadratic(dim=4)
    for run in (recorded, plain):
        run.rollout(task, images, range(2), [3])
        kept = [p.data for p in run.rule.parameters()]
        for p in run.rule.parameters():
            p.data = p.data.clone()
        with torch.no_grad():
            for old in kept:
                old.fill_(torch.nan)  # whoever still reads there will show it
        run.rollout(task, images, range(2, 4), [3, 3])
        run.rule.load_state_dict({k: 1.5 * v for k, v in run.rule.state_dict().items()})
        run.rollout(task, images, range(4, 6), [3])
    same(recorded, plain)
    assert recorder.recordings == 2  # load_state_dict copies in place


def test_tasks_rules_and_images_do_not_share_a_recording(images):
    recorder, mlp = TapeRecorder(), MNISTMLP([4], batch_size=6)
    workspace = Workspace(recorder)
    tasks = [Quadratic(dim=4), NoisyScaledSquare(dim=4)]
    tasks += [FunctionTask(f, dim=4) for f in (lambda x: (x**4).sum(), lambda x: (x**6).sum())]
    rules = [CoordinatewiseLSTM(hidden_size=4, p=p) for p in (3.0, 9.0)]
    others = type(images)(images.pixels.flip(0).contiguous(), images.labels.flip(0), "reversed")
    kinds = [(rule, task, None) for rule in rules for task in tasks]
    for rule, task, split in [*kinds, (rules[0], mlp, images), (rules[0], mlp, others)]:
        recorded, plain = (
            Rollout(rule, Optimizees(task, split, 0, "train", [0]), *arguments).window(3).losses
            for arguments in ((workspace, True), (None, False))
        )
        assert torch.equal(recorded, plain)
    assert recorder.recordings == len(kinds) + 2


def test_a_recording_is_not_disturbed_by_what_runs_in_between(images):
    """Windows of two rollouts in turn: each carries its own θ and state through the same static copies."""
    task = MNISTMLP([4], batch_size=6)
    seen = []
    for arguments in ((Workspace(TapeRecorder()), True), (None, False)):
        torch.manual_seed(0)
        rule = CoordinatewiseLSTM(hidden_size=5)
        rollouts = [Rollout(rule, Optimizees(task, images, 0, "train", [i]), *arguments) for i in range(2)]
        seen.append([rollout.window(3).losses for rollout in (*rollouts, *rollouts, *rollouts)])
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


class DataDependent(Quadratic):
    """Its loss looks at a value, for which the host has to wait: no graph can do that."""

    def losses(self, thetas, batches):
        return super().losses(thetas, batches) * (2.0 if thetas.sum().item() > 0 else 1.0)


def test_a_task_that_cannot_be_recorded_warns_once_and_runs(images):
    recorder = TapeRecorder()
    automatic, plain = (Run(RULES["LSTM"], *a) for a in ((None, recorder), (False,)))
    task = DataDependent(dim=3)
    with pytest.warns(UserWarning, match=r"DataDependent\(dim=3.*not permitted.*cuda_graphs") as caught:
        automatic.rollout(task, images, range(2), [3, 2])
    assert len(caught) == 1
    plain.rollout(task, images, range(2), [3, 2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for run in (automatic, plain):
            run.rollout(task, images, range(2, 4), [3])
            run.rollout(Quadratic(dim=3), images, range(2), [3, 3])
    same(automatic, plain)
    assert recorder.replays == 2


def test_a_task_that_cannot_be_recorded_is_an_error_if_it_was_asked_for(images):
    run = Run(RULES["LSTM"], True, TapeRecorder())
    with pytest.raises(CaptureError, match=r"DataDependent.*not permitted.*cuda_graphs"):
        run.rollout(DataDependent(dim=3), images, range(2), [3])
    # A mistake in a task is not taken for a failed recording.
    with pytest.raises(ValueError, match="must return a scalar"):
        run.rollout(FunctionTask(lambda theta: theta * theta, dim=2), images, [0], [2])


def test_the_number_of_graphs_is_bounded_and_the_least_recently_used_goes():
    recorder = TapeRecorder()
    cache = GraphCache(recorder, capacity=2)
    task, total = Quadratic(dim=1), torch.zeros(1)

    def run(key):
        cache.run(lambda total, x: total.add_(x), key, [total], [torch.ones(1)], task, None)

    for key in "abaca":
        run(key)
        assert len(cache) <= 2
    assert recorder.recordings == 3  # a stayed, as it was used between b and c
    run("b")
    assert recorder.recordings == 4
    assert total.item() == 6


def test_a_mixtures_members_are_recorded_once_each(images):
    """A graph for each member's windows and for its validation's stretches, however often they take turns."""
    recorder, tasks = (
        TapeRecorder(),
        [Quadratic(dim=dim) for dim in range(7, 0, -1)],
    )  # buffers that never grow
    run = Run(RULES["LSTM"], True)
    run.workspace = Workspace(recorder, num_tasks=len(tasks))
    for number in range(3):
        for task in tasks:
            run.rollout(task, images, range(number, number + 2), [2, 2])
            run.validate(task, images, 2, 20)
    assert recorder.recordings == 2 * len(tasks)
    from l2l_lightning.training.meta_learner import MetaLearner  # not needed by the GPU tests below

    model = MetaLearner(Mixture(tasks), CoordinatewiseLSTM(hidden_size=3))
    assert copy.deepcopy(model)._workspace.graphs.capacity >= 2 * len(tasks)


def test_autocast_has_recordings_of_its_own(images):
    recorded, plain, recorder = both(RULES["LSTM"])
    task = ModuleTask(linear, batch_size=6)
    for run in (recorded, plain):
        for enabled in (True, False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                run.rollout(task, images, range(2), [2])
    same(recorded, plain)
    losses = plain.seen[1 :: len(plain.seen) // 3]
    assert not torch.equal(losses[0], losses[1])
    assert recorder.recordings == 2


class NoMemory(TapeRecorder):
    def record(self, function, device):
        function()
        raise CaptureError("CUDA out of memory. Tried to allocate 2 GiB")


def test_what_a_recording_has_no_memory_for_runs_without_one(images):
    automatic, plain = Run(RULES["LSTM"], None, NoMemory()), Run(RULES["LSTM"], False)
    with pytest.warns(UserWarning, match="out of memory") as caught:
        automatic.rollout(Quadratic(dim=3), images, range(2), [3, 2])
    plain.rollout(Quadratic(dim=3), images, range(2), [3, 2])
    same(automatic, plain)
    assert len(caught) == 1


class FakeStream:
    """A stream of the device that is current when it is made."""

    current = None

    def __init__(self):
        self.device = FakeStream.current

    def wait_stream(self, other):
        pass


def test_every_device_has_a_stream_of_its_own(monkeypatch):
    """A stream of another device would make that one current, and record what launches nothing."""
    used = []

    @contextlib.contextmanager
    def on(device):
        before, FakeStream.current = FakeStream.current, device
        yield
        FakeStream.current = before

    stand_ins = {
        "device": on,
        "Stream": FakeStream,
        "current_stream": FakeStream,
        "stream": lambda stream: used.append((FakeStream.current, stream)) or contextlib.nullcontext(),
        "CUDAGraph": object,
        "graph": lambda graph, stream, capture_error_mode: contextlib.nullcontext(),
        "get_sync_debug_mode": lambda: 0,
        "set_sync_debug_mode": lambda mode: None,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    recorder, devices = Recorder(), [torch.device("cuda", index) for index in (0, 1, 0, 1)]
    for device in devices:
        recorder.record(lambda: None, device)
    assert [current for current, _ in used] == [stream.device for _, stream in used] == devices
    assert len({id(stream) for _, stream in used}) == 2


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_of_a_model_has_a_workspace_of_its_own(duplicate):
    """Averaging φ copies the whole model, and a graph cannot be copied."""
    from l2l_lightning.training.meta_learner import MetaLearner  # not needed by the GPU tests below

    model = MetaLearner(Quadratic(dim=3), CoordinatewiseLSTM())
    model._workspace.graphs.unpicklable = lambda: None
    twin = duplicate(model)
    assert twin._workspace is not model._workspace
    assert len(twin._workspace.graphs) == 0


def test_where_there_is_no_device_they_are_off_unless_asked_for():
    torch.manual_seed(0)
    rule, task = CoordinatewiseLSTM(hidden_size=4), Quadratic(dim=3)
    rollouts = [
        Rollout(rule, Optimizees(task, None, 0, "train", [0]), cuda_graphs=on) for on in (None, False)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        automatic, expected = (rollout.window(3).losses for rollout in rollouts)
    assert torch.equal(automatic, expected)
    with pytest.raises(CaptureError, match=r"cuda_graphs.*CUDA device.*cpu"):
        run_rule(rule, rollouts[0].optimizees, 3, cuda_graphs=True)


def on_a_gpu(table):
    marks = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
    return [pytest.param(name, marks=marks) for name in table]


class CountingRecorder(Recorder):
    recordings = 0

    def record(self, function, device):
        self.recordings += 1
        return super().record(function, device)


@pytest.mark.parametrize("task", on_a_gpu(TASKS))
def test_on_a_gpu_replayed_windows_equal_plain_ones(task, images):
    on_device = images.to("cuda")
    for K in (1, 4):
        recorder, kind = CountingRecorder(), TASKS[task]()
        recorded, plain = (Run(RULES["LSTM"], on, recorder, "cuda") for on in (True, False))
        for run in (recorded, plain):
            for first in range(3):
                run.rollout(kind, on_device, range(first * K, (first + 1) * K), [20, 5, 20])
            for _ in range(2):
                run.validate(kind, on_device, 3, 50)
        same(recorded, plain)
        assert recorder.recordings == 4


@pytest.mark.parametrize("rule", on_a_gpu(RULES))
def test_on_a_gpu_every_rule_can_be_recorded(rule, images):
    recorded, plain = (Run(RULES[rule], on, device="cuda") for on in (True, False))
    for run in (recorded, plain):
        run.rollout(Quadratic(dim=5), images, range(2), [4, 4, 4])
    same(recorded, plain)


@pytest.mark.parametrize("task", on_a_gpu(["one that waits for the device"]))
def test_on_a_gpu_a_task_that_cannot_be_recorded_runs_without(task, images):
    automatic, plain = (Run(RULES["LSTM"], on, device="cuda") for on in (None, False))
    with pytest.warns(UserWarning, match=r"DataDependent.*cuda_graphs"):
        automatic.rollout(DataDependent(dim=3), images, range(2), [3, 3])
    plain.rollout(DataDependent(dim=3), images, range(2), [3, 3])
    for run in (automatic, plain):  # what failed has left nothing behind
        run.rollout(Quadratic(dim=3), images, range(2), [3, 3])
    same(automatic, plain)
