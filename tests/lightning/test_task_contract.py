"""What every task does, whatever it optimises: a line in TASKS has it tested."""

import functools
import itertools
import json
import math

import pytest
import torch
from problems import ConvNet, Recurrent, Rosenbrock, TinyNet, halves, quartic, regression
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map
from unrolled import assert_windows_are_unrolled

from l2l_lightning import CoordinatewiseLSTM
from l2l_lightning.class_paths import class_config, from_class_config
from l2l_lightning.data import load_images
from l2l_lightning.rollout.optimizees import Optimizees, derive_generator
from l2l_lightning.tasks import (
    MNISTMLP,
    FunctionTask,
    ImageConvNet,
    ImageMLP,
    Mixture,
    ModuleTask,
    NoisyScaledSquare,
    Quadratic,
    SimpleSquare,
    StyleTransfer,
    Task,
)

TASKS = {
    "quadratic": Quadratic(dim=4),
    "quadratic of DeepMind's code": Quadratic(dim=3, variant="deepmind", batch_size=5),
    "simple square": SimpleSquare(dim=3),
    "noisy scaled square": NoisyScaledSquare(dim=4),
    "MNIST MLP": MNISTMLP([2], batch_size=5, init_std=0.1),
    "deep MLP": ImageMLP("digits", [5, 4], "relu", batch_size=5, init_std=0.1),
    "linear classifier": ImageMLP("digits", [], batch_size=5, init_std=0.1),
    "strided MLP": ImageMLP("mnist", [6], "tanh", batch_size=5, init_std=0.1, stride=5),
    "convolutional network": ImageConvNet(
        "mnist", [2], [3], classes=[1, 7, 4], batch_size=5, init_std=0.1, shrink=4
    ),
    "function": FunctionTask(quartic, dim=3),
    "function with its θ0": FunctionTask("problems.quartic", dim=3, init=halves),
    "module": ModuleTask(TinyNet, F.mse_loss, sample=regression),
    "module on images": ModuleTask(ConvNet, batch_size=4, image_shape=[1, 28, 28], init_std=0.1),
    "recurrent module": ModuleTask(Recurrent, F.mse_loss, sample=regression),
    "mixture": Mixture([Quadratic(dim=2), NoisyScaledSquare(dim=3), Quadratic(dim=2)]),
    "one's own": Rosenbrock(),
    "style transfer": StyleTransfer(styles=["dots", "swirls"], size=8, least_share=0.5),
}

pytestmark = pytest.mark.filterwarnings("ignore:.*cannot run under torch.func.vmap")


@pytest.fixture(params=TASKS)
def task(request):
    return TASKS[request.param]


@functools.cache
def images_of(task):
    return load_images(task.dataset).train if task.dataset else None


def make(task, indices=(0, 1, 2), dtype=torch.float64):
    return Optimizees(task, images_of(task), 0, "train", indices, dtype=dtype)


def drawn(task, generator, evaluations=2):
    """θ0, instance and minibatches, in the order of the contract."""
    theta, instance = task.init(generator), task.instance(generator)
    return theta, instance, [task.batch(instance, images_of(task), generator) for _ in range(evaluations)]


def one_by_one(batches, count):
    return [tree_map(lambda leaf, k=k: leaf[k], batches) for k in range(count)]


def test_draws_are_the_generators_and_of_one_shape(task):
    """θ0 is a float32 vector on the CPU; batches keep their shapes, which lets a window's be stacked.

    Optimizees draw θ0, then the instance, then minibatches, each from a generator of its own.
    """
    for member in task.members:
        theta, instance, batches = drawn(member, torch.Generator().manual_seed(1), evaluations=3)
        torch.rand(1)  # moves the global stream, of which nothing may be drawn
        before = torch.get_rng_state()
        again = drawn(member, torch.Generator().manual_seed(1), evaluations=3)
        torch.testing.assert_close(again, (theta, instance, batches), rtol=0, atol=0)
        assert torch.equal(torch.get_rng_state(), before)
        assert (theta.shape, theta.dtype) == ((member.num_coordinates,), torch.float32)
        assert (theta.device.type, theta.requires_grad) == ("cpu", False)
        assert sum(math.prod(tensor.shape) for tensor in member.tensors) == member.num_coordinates
        batches += drawn(member, torch.Generator().manual_seed(2))[2]
        shapes = [[(leaf.shape, leaf.dtype, leaf.device) for leaf in tree_leaves(b)] for b in batches]
        assert all(shape == shapes[0] for shape in shapes)

        optimizees = make(member, indices=[4])
        theta, _, batches = drawn(member, derive_generator(0, "train", 4))
        torch.testing.assert_close(optimizees.theta[0], theta.double(), rtol=0, atol=0)
        for batch in batches:
            gathered = member.gather(tree_map(lambda leaf: leaf[None], batch), images_of(member))
            expected = tree_map(lambda x: x.double() if x.is_floating_point() else x, gathered)
            torch.testing.assert_close(optimizees.next_batches(), expected, rtol=0, atol=0)


def test_losses_side_by_side_are_each_ones_loss(task):
    """In float64, and in float32 to its rounding."""
    for member in task.members:
        optimizees = make(member)
        batches, theta = optimizees.next_batches(), optimizees.theta
        losses = member.losses(theta, batches)
        assert (losses.shape, losses.dtype) == ((3,), torch.float64)
        torch.testing.assert_close(losses, Task.losses(member, theta, batches))
        alone = [member.loss(row, batch) for row, batch in zip(theta, one_by_one(batches, 3), strict=True)]
        torch.testing.assert_close(losses, torch.stack(alone))
        rounded, exact = (make(member, dtype=d).losses_and_grads() for d in (torch.float32, torch.float64))
        for ours, theirs in zip(rounded, exact, strict=True):
            assert ours.dtype == torch.float32
            torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-4 * float(theirs.abs().max()))


def test_gradients_are_autograds_and_finite_differences(task):
    for member in task.members:
        optimizees, twin = make(member), make(member)
        with torch.no_grad():
            losses, grads = optimizees.losses_and_grads()
        assert not losses.requires_grad
        assert not grads.requires_grad
        assert not optimizees.theta.requires_grad
        for k, batch in enumerate(one_by_one(twin.next_batches(), 3)):
            theta = twin.theta[k].clone().requires_grad_()
            loss = member.loss(theta, batch)
            (grad,) = torch.autograd.grad(loss, theta)
            torch.testing.assert_close(losses[k], loss.detach(), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(grads[k], grad, rtol=1e-12, atol=1e-12)
            step = 1e-6
            for i in {int(grad.abs().argmax()), 0}:
                with torch.no_grad():
                    ahead, behind = theta.clone(), theta.clone()
                    ahead[i] += step
                    behind[i] -= step
                    slope = (member.loss(ahead, batch) - member.loss(behind, batch)) / (2 * step)
                scale = 1e-6 * float(loss.detach().abs() + grad.abs().max())
                torch.testing.assert_close(grads[k, i], slope, rtol=1e-6, atol=scale)


def test_an_optimizees_loss_and_gradient_depend_on_no_other(task):
    for member in task.members:
        optimizees, disturbed = make(member), make(member)
        disturbed.theta[1] = torch.nan
        disturbed.theta[2] *= -3
        for ours, theirs in zip(optimizees.losses_and_grads(), disturbed.losses_and_grads(), strict=True):
            assert torch.equal(ours[0], theirs[0])
            assert theirs[1].isnan().any()
        alone = make(member, indices=[0]).losses_and_grads()
        torch.testing.assert_close([x[0] for x in alone], [x[0] for x in make(member).losses_and_grads()])


def test_the_meta_gradient_of_a_window_is_the_unrolled_graphs(task):
    """To first and to second order, which differentiates the losses twice."""
    torch.manual_seed(1)
    rule = CoordinatewiseLSTM(hidden_size=3).double()
    for member, second_order in itertools.product(task.members, (False, True)):
        assert_windows_are_unrolled(rule, make(member, [0, 1]), make(member, [0, 1]), (2, 3), second_order)


def test_a_configuration_rebuilds_the_task(task):
    """And its description, a line of its own, says which one it is."""
    assert type(task).__name__ in task.describe()
    assert "\n" not in task.describe()
    assert [other for other in TASKS.values() if other.describe() == task.describe()] == [task]
    config = json.loads(json.dumps(class_config(task)))
    rebuilt = from_class_config(config, Task)
    assert class_config(rebuilt) == class_config(task)
    assert rebuilt.describe() == task.describe()
    assert [rebuilt.member(i).describe() for i in range(6)] == [task.member(i).describe() for i in range(6)]
    for ours, theirs in zip(task.members, rebuilt.members, strict=True):
        torch.testing.assert_close(
            make(theirs).losses_and_grads(), make(ours).losses_and_grads(), rtol=0, atol=0
        )
