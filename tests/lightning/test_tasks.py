"""Each task against closed forms and plain PyTorch in float64; what is true of all is in their contract."""

import math
import warnings
from itertools import pairwise

import pytest
import torch
from jsonargparse import ArgumentParser
from problems import ConvNet, TinyNet, generator, halves, regression
from torch import nn
from torch.nn import functional as F

from l2l_lightning.class_paths import class_config, from_class_config
from l2l_lightning.data import Images, load_images
from l2l_lightning.errors import TaskError
from l2l_lightning.rollout.optimizees import Optimizees, check_evaluable
from l2l_lightning.tasks import (
    MNISTMLP,
    FunctionTask,
    ImageMLP,
    ModuleTask,
    NoisyScaledSquare,
    Quadratic,
    SimpleSquare,
    Task,
)


def cubic(theta):
    return (theta**3).sum()


@pytest.fixture(scope="module")
def images():
    return load_images("mnist").train


def make(task, images=None, indices=(0, 1, 2), dtype=torch.float64):
    return Optimizees(task, images, 0, "train", indices, dtype=dtype)


def test_the_command_line_builds_tasks_by_their_short_names():
    def build(*arguments):
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--task", type=Task)
        config = parser.parse_args(list(arguments))
        # What is written to a run's configuration must read back as the same thing.
        return parser.instantiate(parser.parse_string(parser.dump(config))).task

    assert build("--task=MNISTMLP", "--task.hidden_sizes=[20,10]").hidden_sizes == [20, 10]
    image_mlp = build("--task=ImageMLP", "--task.dataset=digits", "--task.hidden_sizes=[5]")
    assert image_mlp.describe() == ImageMLP("digits", [5]).describe()
    assert build("--task=Quadratic", "--task.variant=deepmind").num_coordinates == 1280
    function = build("--task=FunctionTask", "--task.f=test_tasks.cubic", "--task.dim=2", "--task.init=0.5")
    assert function.config() == {"f": "test_tasks.cubic", "dim": 2, "init": 0.5}
    functions = {"module": "problems.TinyNet", "loss_fn": "torch.nn.functional.mse_loss"}
    functions["sample"] = "problems.regression"
    module = build("--task=ModuleTask", *(f"--task.{name}={path}" for name, path in functions.items()))
    assert module.describe() == ModuleTask(TinyNet, F.mse_loss, sample=regression).describe()


def test_a_task_of_ones_own_is_described_by_its_constructors_arguments():
    class Kept(SimpleSquare):
        def __init__(self, dim, name="x", **more):
            super().__init__(dim)
            self.name = name

    class Lost(SimpleSquare):
        def __init__(self, size):
            super().__init__(size)

    assert Kept(2).config() == {"dim": 2, "name": "x"}
    with pytest.raises(TypeError, match=r"Lost does not keep its arguments size.* override config\(\)"):
        Lost(2).config()
    assert Lost(2).describe() == "Lost"  # messages about a task name it whatever it keeps


# Quadratics, squares and functions


@pytest.mark.parametrize("variant", ["paper", "deepmind"])
def test_quadratic_is_the_mean_of_squared_residuals(variant):
    task = Quadratic(dim=3, variant=variant, batch_size=2)
    W, y = (leaf.double() for leaf in task.instance(generator()))
    theta = torch.randn(6, generator=generator(1), dtype=torch.float64)
    residuals = [W[b] @ theta[3 * b : 3 * b + 3] - y[b] for b in range(2)]
    torch.testing.assert_close(task.loss(theta, (W, y)), sum(r @ r for r in residuals) / 2)


def test_quadratic_variants_have_their_distributions():
    paper, deepmind = Quadratic(), Quadratic(variant="deepmind")
    assert (paper.num_coordinates, deepmind.num_coordinates) == (10, 1280)
    assert [leaf.shape for leaf in deepmind.instance(generator())] == [(128, 10, 10), (128, 10)]
    gaussian, _ = Quadratic(batch_size=200).instance(generator())
    uniform, y = deepmind.instance(generator())
    assert gaussian.mean().abs() < 0.03
    assert abs(gaussian.std() - 1) < 0.03
    assert min(uniform.min(), y.min()) >= 0
    assert max(uniform.max(), y.max()) < 1
    assert abs(uniform.mean() - 0.5) < 0.01
    assert abs(deepmind.init(generator()).std() - 0.01) < 1e-3


def test_simple_square_and_functions_are_what_they_say():
    losses, grads = make(SimpleSquare(), indices=[0]).losses_and_grads()
    assert (losses.tolist(), grads.tolist()) == ([1.0], [[2.0]])
    optimizees = make(FunctionTask(cubic, dim=3))
    torch.testing.assert_close(optimizees.losses_and_grads()[0], (optimizees.theta**3).sum(-1))


def test_noisy_scaled_square_redraws_its_scales_at_every_evaluation():
    optimizees = make(NoisyScaledSquare(dim=1000), indices=[0])
    theta = optimizees.theta[0]
    assert theta.min() >= -1
    assert theta.max() < 1
    assert abs(theta.square().mean() - 1 / 3) < 0.03
    (loss,), (grad,) = optimizees.losses_and_grads()
    scales = (grad / (2 * theta)).sqrt()  # ∇ = 2 s² θ
    assert scales.min() >= 0.5 - 1e-6
    assert scales.max() < 1.5 + 1e-6
    torch.testing.assert_close(loss, (scales * theta).square().sum())
    losses = torch.stack([optimizees.losses_and_grads()[0][0] for _ in range(100)])
    assert abs(losses.mean() / theta.square().sum() - 13 / 12) < 0.01
    assert len(losses.unique()) == 100


def test_function_task_draws_theta0_as_told():
    assert abs(FunctionTask(cubic, dim=10_000, init=0.2).init(generator()).std() - 0.2) < 0.01
    assert FunctionTask(cubic, dim=3, init=halves).init(generator()).tolist() == [0.5] * 3
    with pytest.raises(ValueError, match=r"init must return θ0 of shape \[dim\] = \[4\], got \[3\]"):
        FunctionTask(cubic, dim=4, init=halves).init(generator())


@pytest.mark.parametrize(
    ("task", "error", "message"),
    [
        (FunctionTask(torch.square, dim=3), ValueError, r"f = .*square must return a scalar.* shape \[3\]"),
        (FunctionTask(lambda theta: 1.0, dim=3), TypeError, "must return a scalar tensor, got float"),
        (
            ModuleTask(TinyNet, lambda output, target: (output - target) ** 2, sample=regression),
            ValueError,
            r"loss_fn = .* must return a scalar tensor, got one of shape \[6, 1\]",
        ),
    ],
    ids=["a tensor", "a number", "a loss per example"],
)
def test_a_loss_that_is_no_scalar_is_refused(task, error, message):
    with pytest.raises(error, match=message):
        make(task).losses_and_grads()


# Perceptrons on images

ACTIVATIONS = {"sigmoid": nn.Sigmoid, "relu": nn.ReLU, "tanh": nn.Tanh, "elu": nn.ELU}


@pytest.mark.parametrize(
    ("dataset", "hidden_sizes", "activation"),
    [
        ("mnist", [], "sigmoid"),
        ("mnist", [6], "sigmoid"),
        ("mnist", [5, 4], "relu"),
        ("digits", [7], "tanh"),
        ("smiles", [5, 4], "elu"),
    ],
)
def test_an_mlp_is_the_network_of_its_data_sets_size(dataset, hidden_sizes, activation):
    """Losses and gradients are those of nn.Sequential by autograd, where activations saturate, too."""
    inputs, classes = {"mnist": (784, 10), "digits": (64, 10), "smiles": (784, 2)}[dataset]
    task = ImageMLP(dataset, hidden_sizes, activation, batch_size=9, init_std=0.5)
    pixels, labels = torch.rand(40, inputs, generator=generator()), torch.arange(40) % classes
    optimizees = make(task, Images(pixels, labels, "random", classes))
    optimizees.theta[2] *= 30
    batches = optimizees.next_batches()
    losses, grads = task.losses_and_grads(optimizees.theta, batches)
    torch.testing.assert_close(task.losses(optimizees.theta, batches), losses, rtol=1e-12, atol=1e-13)
    for theta, x, y, loss, grad in zip(optimizees.theta, *batches, losses, grads, strict=True):
        net, at = nn.Sequential(), 0
        for n, m in pairwise([inputs, *hidden_sizes, classes]):
            linear = nn.Linear(n, m, dtype=torch.float64)
            with torch.no_grad():
                linear.weight.copy_(theta[at : at + n * m].view(n, m).T)
                linear.bias.copy_(theta[at + n * m : at + n * m + m])
            net.extend([linear, ACTIVATIONS[activation]()])
            at += n * m + m
        assert at == task.num_coordinates
        expected = F.cross_entropy(net[:-1](x), y)
        expected.backward()
        flat = torch.cat([g.flatten() for layer in net[::2] for g in (layer.weight.grad.T, layer.bias.grad)])
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(grad, flat, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("task", "N"), [(MNISTMLP(), 15_910), (ImageMLP("digits"), 1_510)])
def test_an_mlp_starts_at_chance_and_every_evaluation_has_its_own_minibatch(task, N):
    optimizees = make(task, load_images(task.dataset).train)
    assert task.num_coordinates == N
    pixels, labels = optimizees.next_batches()
    assert pixels.shape == (3, 128, task.num_pixels)
    assert not torch.equal(labels, optimizees.next_batches()[1])
    assert not torch.equal(labels[0], labels[1])
    assert (optimizees.losses_and_grads()[0] - math.log(10)).abs().max() < 0.05
    assert abs(optimizees.theta.std() - 0.01) < 1e-3


def test_mnistmlp_is_imagemlp_on_mnist_and_draws_what_it_always_drew(images):
    """θ0, minibatches and losses as recorded before there was an `ImageMLP`."""
    task, arguments = MNISTMLP(), ([6], "tanh", 5, 0.1)
    for ours, theirs in ((MNISTMLP(*arguments), ImageMLP("mnist", *arguments)), (task, ImageMLP("mnist"))):
        assert theirs.config() == {"dataset": "mnist", **ours.config(), "stride": 1}
    assert class_config(task) == {
        "class_path": "l2l_lightning.tasks.mlp.MNISTMLP",
        "init_args": {"hidden_sizes": [20], "activation": "sigmoid", "batch_size": 128, "init_std": 0.01},
    }
    assert task.describe() == "MNISTMLP(hidden_sizes=[20], activation=sigmoid, batch_size=128, init_std=0.01)"
    optimizees = make(task, images, indices=[0, 1], dtype=torch.float32)
    corners = [
        [0.00256022112, -0.01339541003, -0.00467351219],
        [-0.02376704104, 0.00192355446, -0.00504366914],
    ]
    torch.testing.assert_close(optimizees.theta[:, [0, 1, -1]], torch.tensor(corners))
    assert optimizees.draw(2)[:, :, :5].tolist() == [
        [[2895, 2369, 2550, 995, 203], [2235, 1128, 3954, 1394, 1264]],
        [[1661, 241, 120, 2980, 584], [562, 875, 1656, 1105, 2082]],
    ]
    for losses in ([2.30369925, 2.29908133], [2.33083057, 2.32100677]):
        ours, grads = optimizees.losses_and_grads()
        torch.testing.assert_close(ours, torch.tensor(losses), rtol=1e-5, atol=0)
        optimizees.theta -= 0.5 * grads


@pytest.mark.parametrize(("stride", "inputs"), [(2, 196), (5, 36), (40, 1)])
def test_a_stride_keeps_every_so_many_rows_and_columns(stride, inputs, images):
    task = ImageMLP("mnist", [3], stride=stride)
    assert task.num_coordinates == 3 * inputs + 3 + 3 * 10 + 10
    indices = torch.tensor([[0, 5], [7, 9]])
    pixels, labels = task.gather(indices, images)
    expected = images.pixels.view(-1, 28, 28).numpy()[indices.numpy(), ::stride, ::stride]
    assert pixels.shape == (2, 2, inputs)
    assert (pixels.view(2, 2, *expected.shape[2:]).numpy() == expected).all()
    assert torch.equal(labels, images.labels[indices])


NEEDS_IMAGES = r"draws its minibatches from images.*load_images"


@pytest.mark.parametrize(
    ("task", "images", "message"),
    [
        (
            MNISTMLP(),
            Images(torch.rand(6, 64), torch.arange(6), "digits", 10),
            r"MNISTMLP on 'mnist' takes images of 784 pixels in 10 classes, and was given 64 pixels in 10 "
            r"classes \(digits\): pass a split of load_images\('mnist'\)",
        ),
        (
            ImageMLP("smiles"),
            Images(torch.rand(6, 784), torch.arange(6), "MNIST", 10),
            "784 pixels in 2 classes, and was given 784 pixels in 10 classes",
        ),
        (ImageMLP("digits"), Images(torch.rand(6, 65), torch.arange(6), "mine"), r"given 65 pixels \(mine\)"),
        (MNISTMLP(), None, NEEDS_IMAGES),
        (ModuleTask(lambda: nn.Linear(784, 10)), None, NEEDS_IMAGES),
    ],
    ids=["pixels", "classes", "unknown classes", "none", "none for a module"],
)
def test_images_of_another_data_set_or_none_are_refused(task, images, message):
    with pytest.raises(ValueError, match=message):
        make(task, images).losses_and_grads()


def test_images_that_do_not_say_their_classes_are_taken():
    images = Images(torch.rand(6, 64), torch.arange(6), "mine")
    assert make(ImageMLP("digits"), images).losses_and_grads()[0].isfinite().all()


# Modules


def assert_trained(module, loss_fn, theta, batch, loss, grad):
    """The loss and its gradient are those of torch's own module with the parameters θ."""
    net, (inputs, targets) = module().double(), batch
    nn.utils.vector_to_parameters(theta, net.parameters())
    expected = loss_fn(net(inputs), targets)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-14)
    flat = nn.utils.parameters_to_vector([p.grad for p in net.parameters()])
    torch.testing.assert_close(grad, flat, rtol=1e-10, atol=1e-14)


def test_module_task_trains_the_module(images):
    task = ModuleTask(ConvNet, batch_size=4, image_shape=[1, 28, 28])
    optimizees = make(task, images)
    pixels, labels = optimizees.next_batches()
    assert pixels.shape == (3, 4, 1, 28, 28)
    results = task.losses_and_grads(optimizees.theta, (pixels, labels))
    for theta, x, y, *result in zip(optimizees.theta, pixels, labels, *results, strict=True):
        assert_trained(ConvNet, F.cross_entropy, theta, (x, y), *result)


def test_module_task_initialises_as_the_module_does():
    before = torch.get_rng_state()
    for module in (lambda: nn.Linear(784, 50), nn.Linear(784, 50)):
        assert 0.99 / 28 < ModuleTask(module).init(generator()).abs().max() <= 1 / 28
    task = ModuleTask(TinyNet(), F.mse_loss, sample=regression)
    assert not torch.equal(task.init(generator(0)), task.init(generator(1)))
    torch.set_rng_state(before)
    task.init(generator())
    assert torch.equal(before, torch.get_rng_state())


def test_a_parents_reset_overrules_its_childrens():
    class ZeroHead(nn.Sequential):
        def reset_parameters(self):
            nn.init.zeros_(self[-1].weight)

    task = ModuleTask(ZeroHead(nn.Linear(3, 2), nn.Linear(2, 1)), F.mse_loss, sample=regression)
    assert task.init(generator())[8:10].tolist() == [0.0, 0.0]
    assert task.init(generator())[:8].all()


def test_module_task_keeps_constant_buffers_and_tied_parameters():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(3, 3, bias=False)
            self.second = nn.Linear(3, 3, bias=False)
            self.second.weight = self.first.weight
            self.register_buffer("scale", torch.tensor(2.0))

        def forward(self, x):
            return self.scale * self.second(self.first(x)).sum(-1, keepdim=True)

    task = ModuleTask(Tied, F.mse_loss, sample=regression)
    assert task.num_coordinates == 9
    optimizees = make(task)
    x, y = optimizees.next_batches()
    W = optimizees.theta.view(3, 3, 3)
    expected = (2 * (x @ W.mT @ W.mT).sum(-1, keepdim=True) - y).square().mean((1, 2))
    torch.testing.assert_close(task.losses(optimizees.theta, (x, y)), expected)


class NoReset(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 1))

    def forward(self, x):
        return x @ self.weight


def test_a_module_that_cannot_be_drawn_anew_has_two_ways_out():
    with pytest.raises(ValueError, match=r"NoReset.*no reset_parameters.*function that builds.*init_std"):
        ModuleTask(NoReset(), F.mse_loss, sample=regression)
    assert ModuleTask(NoReset, F.mse_loss, sample=regression).init(generator()).tolist() == [1.0] * 3
    theta = ModuleTask(NoReset(), F.mse_loss, sample=regression, init_std=0.1).init(generator())
    assert 0 < theta.abs().max() < 1


def test_a_module_or_a_lambda_cannot_be_rebuilt_and_says_so():
    for module in (NoReset(), lambda: NoReset()):
        task = ModuleTask(module, F.mse_loss, sample=regression, init_std=1.0)
        with pytest.raises(ValueError, match="dotted path of something at a module's top level"):
            from_class_config(class_config(task), Task)


class _LastOutput(nn.Module):
    def __init__(self, recurrent):
        super().__init__()
        self.recurrent, self.head = recurrent, nn.Linear(4, 1)

    def forward(self, x):
        return self.head(self.recurrent(x)[0][:, -1])


class _LooksAtItsOutput(nn.Linear):
    def forward(self, x):
        y = super().forward(x).flatten(1)[:, :1]
        return y if y.sum().item() > 0 else 2 * y


def _sequences(generator):
    x = torch.randn(8, 5, 3, generator=generator, dtype=torch.float64)
    return x, x.sum((1, 2))[:, None]


@pytest.mark.parametrize(
    "module",
    [
        lambda: _LastOutput(nn.LSTM(3, 4, batch_first=True)),
        lambda: _LastOutput(nn.GRU(3, 4, num_layers=2, batch_first=True)),
        lambda: _LooksAtItsOutput(3, 1),
    ],
    ids=["LSTM", "GRU", "item"],
)
def test_what_vmap_cannot_run_is_run_one_after_the_other(module):
    """Losses and gradients are those of torch's own module, and a warning says once why it takes longer."""
    task = ModuleTask(module, F.mse_loss, sample=_sequences)
    optimizees = make(task)
    theta, batches = optimizees.theta, optimizees.next_batches()
    message = r"cannot run under torch\.func\.vmap.*one after the other"
    with pytest.warns(UserWarning, match=message) as warned:
        losses, grads = task.losses_and_grads(theta, batches)
    assert len(warned) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(task.losses_and_grads(theta, batches)[1], grads)
    assert dict(task._one_by_one) == {"cpu": True}  # another device's first call decides for it
    assert not ModuleTask._one_by_one
    for row, x, y, loss, grad in zip(theta, *batches, losses, grads, strict=True):
        assert_trained(module, F.mse_loss, row, (x, y), loss, grad)


def test_a_lazy_module_is_refused():
    with pytest.raises(ValueError, match=r"weight has no shape before.*nn\.Linear for nn\.LazyLinear"):
        ModuleTask(lambda: nn.LazyLinear(1), F.mse_loss, sample=_sequences)


def test_a_loss_of_ones_own_that_draws_from_the_global_stream_is_refused():
    """Of a module it is seeded; a function's would not repeat."""
    noisy = FunctionTask(lambda theta: (theta + torch.randn(2)).square().sum(), dim=2)
    with pytest.raises(TaskError, match="draws from torch's global random stream"):
        check_evaluable(noisy, None, seed=0)


def test_a_loss_of_ones_own_that_is_wrong_is_blamed_itself():
    """What the loop raises is the loss's own fault, and vmap is not mentioned."""
    wrong = FunctionTask(lambda theta: theta.sum() + len(theta[7]), dim=2)
    with pytest.raises(TaskError, match=r"cannot be evaluated: IndexError: index 7") as refused:
        check_evaluable(wrong, None, seed=0)
    assert "vmap" not in str(refused.value)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Quadratic(dim=0), "dim must be at least 1, got 0"),
        (lambda: Quadratic(init_std=math.nan), "init_std must be at least 0, got nan"),
        (lambda: Quadratic(variant="papers"), "variant must be one of paper, deepmind, got 'papers'"),
        (lambda: NoisyScaledSquare(scale_low=2.0), "scale_high must be at least 2.0, got 1.5"),
        (lambda: MNISTMLP(hidden_sizes=[20, 0]), r"hidden_sizes\[1\] must be at least 1, got 0"),
        (lambda: ImageMLP("cifar"), "dataset must be one of mnist, digits, .*cifar10.*, got 'cifar'"),
        (lambda: MNISTMLP(activation="swish"), "activation must be one of sigmoid, relu, tanh, elu, got 'sw"),
        (lambda: FunctionTask("no_such_module.f", dim=2), "f='no_such_module.f' cannot be imported .No mod"),
        (lambda: FunctionTask("f", dim=2), "f='f' cannot be imported"),
        (lambda: FunctionTask(3, dim=2), "f must be callable or the dotted path of a callable, got 3"),
        (lambda: FunctionTask(cubic, dim=2, init="math.nothing"), "init='math.nothing' cannot be imported"),
        (lambda: ModuleTask(dict), "module must build an nn.Module, got dict"),
        (lambda: ModuleTask(nn.Identity), "module has no parameters"),
        (lambda: ModuleTask(TinyNet, dataset="mnist", image_shape=[1, 27, 28]), "must hold 784 pixels"),
        (lambda: ModuleTask(TinyNet, dataset="cifar10", image_shape=[1024]), "must hold 3072 pixels"),
        (lambda: ModuleTask(TinyNet, dataset="cifar"), "dataset must be one of mnist, .*own, got 'cifar'"),
        (lambda: ModuleTask(TinyNet, dataset="mnist", sample=regression), "is what `sample` replaces"),
        (lambda: ModuleTask(TinyNet, sample=lambda: 0), r"sample = .* must be a function of \(generator\)"),
        (lambda: ModuleTask(TinyNet, sample=lambda a, b: 0), r"of \(generator\), or of \(generator, split\)"),
        (lambda: ModuleTask(TinyNet, image_shape=[784], sample=regression), "reshape in `sample`"),
    ],
)
def test_wrong_arguments_are_named(build, message):
    with pytest.raises((ValueError, TypeError), match=message):
        build()
