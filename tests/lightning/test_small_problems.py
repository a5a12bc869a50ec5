"""Small problems: the families' networks against torch's modules, their examples, and how they take turns."""

import math

import pytest
import torch
from torch import nn

from l2l_lightning import MetaLearner, Optimizees, run_rule
from l2l_lightning.data.digits import load_digits
from l2l_lightning.data.mnist import load_mnist
from l2l_lightning.rules import ZeroShot
from l2l_lightning.tasks import SmallProblem, SmallProblems
from l2l_lightning.tasks.small import networks
from l2l_lightning.tasks.small.families import FAMILIES

SEEDS = range(3)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("family", FAMILIES)
def test_problems_of_a_family(family):
    """They repeat, differ by their seeds, hold examples out, and run side by side as one by one."""
    sizes = set()
    for seed in SEEDS:
        task, again = SmallProblem(family, seed), SmallProblem(**SmallProblem(family, seed).config())
        assert torch.equal(task.problem.examples.inputs, again.problem.examples.inputs)
        assert torch.equal(task.init(generator()), again.init(generator()))
        sizes.add((task.num_coordinates, len(task.problem.examples.inputs), task.batch_size))
        assert sum(tensor.numel for tensor in task.tensors) == task.num_coordinates <= 10_000
        batch, held_out = task.batch((), None, generator(1)), task.held_out_batch((), None, generator(1))
        assert len(batch) == task.batch_size
        assert batch.max() < task.problem.examples.num_train == held_out.min()
        assert held_out.max() + 1 == len(task.problem.examples.inputs) >= len(held_out) + 40
        side_by_side = Optimizees(task, None, 0, "train", [0, 1], dtype=torch.float64)
        losses, grads = side_by_side.losses_and_grads()
        for k in range(2):
            alone, grad = Optimizees(task, None, 0, "train", [k], dtype=torch.float64).losses_and_grads()
            torch.testing.assert_close((alone, grad), (losses[[k]], grads[[k]]), rtol=1e-9, atol=1e-12)
        assert losses.isfinite().all()
        assert all(part.any() for part in torch.split(grads, [t.numel for t in task.tensors], -1))
    assert len(sizes) == len(SEEDS)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_they_can_be_learned(family):
    ratios = []
    for seed in SEEDS:
        losses = run_rule(ZeroShot(), Optimizees(SmallProblem(family, seed), None, 0, "train", [0]), 100)
        ratios.append((losses[-10:].mean() / losses[:3].mean()).item())
    assert max(ratios) < 1
    assert math.prod(ratios) ** (1 / len(SEEDS)) < 0.9


def test_a_perceptron_is_the_modules():
    network = networks.perceptron([6, 5, 5, 3], "gelu", "he")
    module = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 5), nn.GELU(), nn.Linear(5, 3))
    assert_same(network, module, torch.randn(7, 6, generator=generator(3)))


@pytest.mark.parametrize("normalisation", ["layer", "batch"])
def test_a_normalised_perceptron_is_the_modules(normalisation):
    network = networks.perceptron([6, 5, 3], "tanh", "lecun", normalisation)
    norm = nn.LayerNorm(5) if normalisation == "layer" else nn.BatchNorm1d(5)
    module = nn.Sequential(nn.Linear(6, 5, bias=False), norm, nn.Tanh(), nn.Linear(5, 3))
    names = {"0.weight": "0.weight", "0.bias": "1.bias", "0.gain": "1.weight", "1.weight": "3.weight"}
    assert_same(network, module, torch.randn(7, 6, generator=generator(3)), names | {"1.bias": "3.bias"})


def test_a_residual_perceptron_adds_to_its_inputs():
    network = networks.perceptron([4, 3, 3, 2], "sine", "0.1", residual=True)
    w = network.init(generator())
    x = torch.randn(5, 4, generator=generator(3))
    first = torch.sin(x @ w[0].T + w[1])
    second = first + torch.sin(first @ w[2].T + w[3])
    torch.testing.assert_close(network.forward(w, x), second @ w[4].T + w[5])


@pytest.mark.parametrize("normalised", [True, False])
def test_convolutions_are_the_modules(normalised):
    network = networks.convolutional(9, 4, "relu", "he", normalised)
    convs = [nn.Conv2d(a, b, 3, stride=2, bias=not normalised) for a, b in ((1, 4), (4, 8))]
    norms = [nn.BatchNorm2d(4), nn.BatchNorm2d(8)] if normalised else [nn.Identity(), nn.Identity()]
    layers = [layer for pair in zip(convs, norms, strict=True) for layer in (*pair, nn.ReLU())]
    module = nn.Sequential(nn.Unflatten(-1, (1, 9, 9)), *layers, nn.Flatten(), nn.Linear(8, 10))
    names = {"0.weight": "1.weight", "1.weight": "4.weight", "head.weight": "8.weight", "head.bias": "8.bias"}
    if normalised:
        names |= {"0.bias": "2.bias", "0.gain": "2.weight", "1.bias": "5.bias", "1.gain": "5.weight"}
    else:
        names |= {"0.bias": "1.bias", "1.bias": "4.bias"}
    assert_same(network, module, torch.randn(6, 81, generator=generator(3)), names)


def assert_same(network, module, x, names=None):
    """Of the same parameters, by name, the network and the module make the same outputs."""
    names = {name: name for name, _ in module.named_parameters()} if names is None else names
    if names.keys() != network.shapes.keys():  # of nn.Sequential the layers without parameters count
        names = dict(zip(network.shapes, dict(module.named_parameters()), strict=True))
    own = dict(module.named_parameters())
    with torch.no_grad():
        for value in own.values():
            value.add_(0.1 * torch.randn(value.shape, generator=generator(8)))
    values = [own[names[name]] for name in network.shapes]
    assert [value.shape for value in values] == list(network.shapes.values())
    torch.testing.assert_close(network.forward(values, x), module(x), rtol=1e-4, atol=1e-5)


def test_the_gated_network_is_torchs():
    network = networks.recurrent(symbols=5, length=4, units=6, gated=True, initialisation="lecun")
    table, w_in, w_hidden, bias, w_out, b_out = network.init(generator())
    bias = torch.randn(18, generator=generator(1))
    gru = nn.GRU(6, 6, batch_first=True)
    with torch.no_grad():
        gru.weight_ih_l0.copy_(w_in)
        gru.weight_hh_l0.copy_(w_hidden)
        gru.bias_ih_l0.copy_(bias)
        gru.bias_hh_l0.zero_()
    x = torch.randint(5, (3, 4), generator=generator(2))
    expected = gru(table[x])[0] @ w_out.T + b_out
    ours = network.forward([table, w_in, w_hidden, bias, w_out, b_out], x)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_the_transformers_attention_is_torchs():
    """A layer whose second half is zero, before a head that is the identity."""
    width, length = 8, 5
    network = networks.transformer(width, length, width, 1, "lecun")
    values = dict(zip(network.shapes, network.init(generator()), strict=True))
    values["0.down.weight"] = torch.zeros(width, 2 * width)
    values["head.weight"] = torch.eye(width)
    attention = nn.MultiheadAttention(width, 2, bias=False, batch_first=True)
    with torch.no_grad():
        attention.in_proj_weight.copy_(values["0.qkv.weight"])
        attention.out_proj.weight.copy_(values["0.out.weight"])
    x = torch.randint(width, (3, length), generator=generator(2))
    hidden = values["token.table"][x] + values["place.table"]
    normed = nn.functional.layer_norm(hidden, (width,))
    mask = nn.Transformer.generate_square_subsequent_mask(length)
    attended = attention(normed, normed, normed, attn_mask=mask, need_weights=False)[0]
    expected = nn.functional.layer_norm(hidden + attended, (width,))
    ours = network.forward(list(values.values()), x)
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


def test_images_are_of_the_training_parts_alone():
    known = {
        pixels.shape[1]: {tuple(row) for row in (pixels * 4080).round().int().tolist()}
        for pixels in (load_digits().train.pixels, load_mnist(None, False).train.pixels)
    }
    seen = set()
    for seed in range(60):
        inputs = SmallProblem("image_perceptron", seed).problem.examples.inputs
        size = inputs.shape[1]
        if inputs.min() == 0 and size in known:  # neither centred nor of every other pixel
            seen.add(size)
            assert {tuple(row) for row in (4080 * inputs / inputs.max()).round().int().tolist()} <= known[
                size
            ]
    assert seen == known.keys()


def test_every_rollout_has_a_problem_of_its_own():
    task = SmallProblems(["linear", "regression", "embeddings"])
    for stretch in range(3):
        drawn = [task.member(3 * stretch + i) for i in range(3)]
        assert sorted(member.family for member in drawn) == ["embeddings", "linear", "regression"]
        assert [member.seed for member in drawn] == [3 * stretch + i for i in range(3)]
    assert [member.family for member in task.members] == task.families
    assert SmallProblems(**task.config()).families == task.families
    assert task.num_coordinates == max(member.num_coordinates for member in task.members)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SmallProblem("lstm"), ValueError, "family must be one of image_perceptron"),
        (lambda: SmallProblem("linear", -1), ValueError, "seed must not be negative"),
        (lambda: SmallProblems([]), ValueError, "families must name at least one"),
        (lambda: SmallProblems(["linaer"]), ValueError, "families must be one of image_perceptron"),
        (lambda: SmallProblems().init(generator()), TypeError, "take a member's"),
    ],
)
def test_wrong_arguments_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_an_unrolled_graph_has_no_held_out_loss():
    with pytest.raises(ValueError, match="loss_weights must not be held_out"):
        MetaLearner(SmallProblems(["linear"]), ZeroShot(), loss_weights="held_out", second_order=True)
