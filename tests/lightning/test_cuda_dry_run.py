"""The CUDA path without a GPU: fake tensors, which have devices and no numbers, through all that a run does.

A tensor on the wrong device is an error. What makes the host wait for the device is counted, and must not
depend on the number of steps: the inner loop waits for nothing. The engine of autograd, which needs a device,
gives gradients of the right shapes and devices; what the host reads is 1, 0.5 or false.
"""

import contextlib
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from test_cuda_graphs import RULES, TASKS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from l2l_lightning import LearnedOptimizer
from l2l_lightning.comparison.baselines import BASELINES, run_baseline
from l2l_lightning.data import load_images
from l2l_lightning.rollout.optimizees import Optimizees
from l2l_lightning.rollout.perturbed import PerturbedRollout
from l2l_lightning.rollout.rollout import Rollout, run_rule
from l2l_lightning.rules import ZeroShot, nominal
from l2l_lightning.tasks import Quadratic, SmallProblem
from l2l_lightning.tasks.small import examples

aten = torch.ops.aten
IMAGES = load_images("mnist").train


class Waits(TorchDispatchMode):
    """Counts what the host waits for: numbers read, and copies to and from the device that are not async."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default):
            if args[0].device.type == "cuda":
                self.seen.append(str(function))
            read = args[0].dtype
            return False if read == torch.bool else 0.5 if read.is_floating_point else 1
        if function in (aten.nonzero.default, aten.masked_select.default) and args[0].device.type == "cuda":
            self.seen.append(str(function))
        result = function(*args, **kwargs)
        copied = {aten._to_copy.default: (args[:1], [result]), aten.copy_.default: (args[1:2], args[:1])}
        if function in copied and isinstance(copied[function][0][0], torch.Tensor):
            (source,), (target,) = copied[function]
            asynchronous = kwargs.get("non_blocking") or (
                function is aten.copy_.default and args[2:3] == (True,)
            )
            if {source.device.type, target.device.type} == {"cpu", "cuda"} and not asynchronous:
                self.seen.append(f"copy to {target.device.type}")
        return result


def engine(outputs, grad_outputs, retain, create, inputs, *rest, accumulate_grad, **others):
    return tuple(torch.empty_like(value) for value in inputs)


def moved(module, *arguments, **options):
    """As torch.nn.Module.to, which cannot put fake parameters in place of others."""
    for part in module.modules():
        for name, value in part._parameters.items():
            part._parameters[name] = torch.nn.Parameter(value.detach().to(*arguments, **options))
        for name, value in part._buffers.items():
            part._buffers[name] = value.to(*arguments, **options)
    return module


@contextlib.contextmanager
def on_cuda():
    """Factories make fake CUDA tensors; gives what the host has waited for."""
    patches = {
        "l2l_kernels.backends._own": lambda device: "reference",
        "torch.nn.Module.to": moved,
        "l2l_kernels.nominal._check": lambda *_: None,  # fake tensors all have one address
        "torch.Tensor.pin_memory": lambda tensor, *_: tensor,
        "torch.cuda.get_device_capability": lambda device=None: (9, 0),
        "torch.cuda.get_device_properties": lambda device=None: SimpleNamespace(total_memory=2**36),
        "torch.cuda.get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "torch.autograd._engine_run_backward": engine,
        "torch.autograd.graph._engine_run_backward": engine,
        "l2l_lightning.rules.base.check_contract": lambda rule: None,  # on the CPU, with numbers
        "l2l_lightning.optim.learned_optimizer.digest_of": lambda rule: type(rule).__name__,
    }
    waits = Waits()
    caches = (nominal.decays_of_means, nominal._columns, examples._pictures)  # they would keep fake tensors
    with contextlib.ExitStack() as stack:
        for cache in caches:
            cache.cache_clear()
            stack.callback(cache.cache_clear)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(waits)
        for name, stand_in in patches.items():
            stack.enter_context(mock.patch(name, stand_in))
        yield waits


def on_device(make):
    with torch.device("cuda"):
        return make()


def optimizees(task, K=2, stream="train"):
    images = None
    if task.dataset:
        images = IMAGES.to("cuda")
    return Optimizees(task, images, 0, stream, range(K), "cuda")


def waits_of(run):
    """What the host waits for in runs of 2 and of 6 steps, after a first one of each."""
    found = []
    for steps in (2, 6):
        with on_cuda() as waits:
            ready = run(steps)
            waits.seen.clear()
            results = ready()
            assert all(tensor.device.type == "cuda" for tensor in results)
            found.append(list(waits.seen))
    return found


KEPT = {"checkpoint_every": 2, "history_dtype": "bfloat16"}
WINDOWS = [(task, "LSTM", {}) for task in TASKS] + [("quadratic", rule, KEPT) for rule in RULES]
WINDOWS += [("MLP", "RNNprop", {}), ("module", "momentum", {})]


@pytest.mark.parametrize(("task", "rule", "history"), WINDOWS)
def test_a_window_waits_for_the_device_once(task, rule, history):
    def run(steps):
        rollout = Rollout(on_device(RULES[rule]), optimizees(TASKS[task]()), cuda_graphs=False, **history)
        rollout.window(steps)

        def again():
            window = rollout.window(steps)
            return window.meta_loss, window.losses, rollout.optimizees.theta

        return again

    short, long = waits_of(run)
    assert short == long
    assert len(short) <= 1


@pytest.mark.parametrize("task", TASKS)
def test_a_rollout_without_a_meta_gradient_never_waits(task):
    def run(steps):
        rule, ones = on_device(RULES["LSTM"]), optimizees(TASKS[task]())
        return lambda: [run_rule(rule, ones, steps), ones.theta]

    assert waits_of(run) == [[], []]


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_never_waits(name):
    def run(steps):
        ones = optimizees(Quadratic(dim=5))
        return lambda: [run_baseline(BASELINES[name], 0.1, ones, steps), ones.theta]

    short, long = waits_of(run)
    assert short == long


@pytest.mark.parametrize("rule", [ZeroShot, lambda: ZeroShot(decay_facts=4), RULES["LSTM"]])
def test_a_population_never_waits(rule):
    def run(steps):
        made = on_device(rule)
        phis = {name: torch.stack([value, value]) for name, value in made.named_parameters()}
        rollout = PerturbedRollout(made, optimizees(SmallProblem("image_perceptron")), 100)
        rollout.window(phis, steps)  # the examples go to the device
        return lambda: [rollout.window(phis, steps), rollout.optimizees.theta]

    short, long = waits_of(run)
    assert short == long


OPTIONS = [
    {},
    {"weight_decay": 1e-5, "lr": 0.5},
    {"maximize": True},
    {"state_dtype": torch.bfloat16},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("rule", ["zero-shot", "without orthogonalisation", "LSTM"])
def test_a_step_of_the_optimizer_never_waits(rule, options, dtype):
    rules = {
        "zero-shot": ZeroShot,
        "without orthogonalisation": lambda: ZeroShot(orthogonal=False, decay_facts=4),
    }

    def run(steps):
        layers = (
            torch.nn.Conv2d(3, 4, 3, device="cuda", dtype=dtype),
            torch.nn.Linear(7, 5, device="cuda", dtype=dtype),
        )
        parameters = [parameter for layer in layers for parameter in layer.parameters()]
        total = {} if rule == "LSTM" else {"total_steps": 100}
        made = on_device((rules | RULES)[rule])
        optimizer = LearnedOptimizer(parameters, made, **total, **options)

        def step(count):
            for _ in range(count):
                for parameter in parameters[1:]:  # the first has no gradient
                    parameter.grad = torch.ones_like(parameter)
                optimizer.step()
            return parameters

        step(1)
        return lambda: step(steps)

    assert waits_of(run) == [[], []]
