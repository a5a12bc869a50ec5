"""LearnedOptimizer on sharded parameters: two processes give one process's numbers, and reshard its state."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from exactness import assert_identical
from mixed_features import TensorwiseMomentum
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from l2l_lightning import CoordinatewiseLSTM, LearnedOptimizer
from l2l_lightning.optim.pack import STATE, STATISTICS
from l2l_lightning.rules import Grouped, ZeroShot, orthogonal

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch has no gloo"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),  # one process saves and loads, too
]

RULE, WORLD, STEPS = "lstm-mnist", 2, 4
FULL = StateDictOptions(full_state_dict=True)


def make_model():
    """Rows that two processes do not share evenly, and one row that one of them has none of."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def make_optimizer(model):
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "rule": "lstm-quadratic", "lr": 0.5},
    ]
    return LearnedOptimizer(groups, RULE)


def train(model, optimizer, steps):
    """Every process sees the whole batch, so that the gradients are one process's."""
    for step in steps:
        x = torch.randn(6, 5, generator=torch.Generator().manual_seed(step))
        x = x.to(next(model.parameters()).dtype)
        optimizer.zero_grad()
        (model(x) - x[:, :1]).square().mean().backward()
        optimizer.step()


def whole(tensor):
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.detach().clone()


def snapshot(model, optimizer, what=STATE):
    """Every parameter and every state, whole and by name."""
    return {
        name.removeprefix("module."): (whole(p), whole(optimizer.state[p][what]))
        for name, p in model.named_parameters()
    }


def save(model, optimizer, folder):
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=folder)


def restore(model, optimizer, folder):
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])


def shard(model):
    fully_shard(model[0])
    fully_shard(model)
    return model


def train_without_the_first_layer(model):
    """Two steps with every gradient, and one in between without the first layer's."""
    optimizer = make_optimizer(model)
    for step in range(3):
        x = torch.randn(6, 5, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        if step == 1:
            model[0].zero_grad()
        optimizer.step()
    return snapshot(model, optimizer)


def train_by_tensors(model):
    """With a rule whose features are of whole tensors and of time, and another one for biases."""
    torch.manual_seed(2)
    rule = Grouped({"weight": TensorwiseMomentum(), "bias": CoordinatewiseLSTM(1, 4)})
    optimizer = LearnedOptimizer(model.named_parameters(), rule, total_steps=STEPS)
    train(model, optimizer, range(STEPS))
    return snapshot(model, optimizer)


def make_wide():
    """Matrices with four rows and columns and more, in float64, as the rounding of singular values grows."""
    torch.manual_seed(0)
    layers = nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 1)
    return nn.Sequential(*layers).double()


def zero_shot_rule(orthogonal=True):
    """With a decay that follows the gradients, the weights and the horizon."""
    rule = ZeroShot(orthogonal, decay_facts=4).double()
    with torch.no_grad():
        rule.decay.copy_(torch.tensor([-1.0, -0.5, 2.0, 0.3]))
    return rule


def zero_shot(model):
    rule, total = zero_shot_rule(), 2 * STEPS
    return LearnedOptimizer(model.named_parameters(), rule, total_steps=total, weight_decay=1e-4)


def train_zero_shot(model):
    optimizer = zero_shot(model)
    train(model, optimizer, range(2 * STEPS))
    return snapshot(model, optimizer, STATISTICS)


def warm_up(make=lambda values: values):
    """From a rate of 0 on, of one row, which one of two processes holds; its rule sums over the tensor."""
    torch.manual_seed(2)
    parameter = nn.Parameter(make(torch.ones(1, 5)))
    optimizer = LearnedOptimizer([parameter], TensorwiseMomentum(), lr=0.0, total_steps=STEPS)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = step / STEPS
        parameter.grad = make(torch.full((1, 5), 0.1 * (step + 1)))
        optimizer.step()
    return whole(parameter), whole(optimizer.state[parameter][STATE])


def fully_sharded(folder):
    """Trains, saves, resumes one process's checkpoint, and resumes its own."""
    model = shard(make_model())
    optimizer = make_optimizer(model)
    results = {"bytes": optimizer.state_bytes, "local": sum(p.to_local().numel() for p in model.parameters())}
    train(model, optimizer, range(STEPS))
    results["trained"] = snapshot(model, optimizer)
    results["placements"] = {str(optimizer.state[p][STATE].placements) for p in model.parameters()}
    save(model, optimizer, folder / "two")
    results["full"] = get_optimizer_state_dict(model, optimizer, options=FULL)
    for source in ("one", "two"):
        model = shard(make_model())
        optimizer = make_optimizer(model)
        restore(model, optimizer, folder / source)
        results[f"restored {source}"] = snapshot(model, optimizer)
        train(model, optimizer, range(STEPS, 2 * STEPS))
        results[f"resumed {source}"] = snapshot(model, optimizer)
    model = shard(make_model())
    optimizer = make_optimizer(model)
    set_optimizer_state_dict(model, optimizer, results["full"], options=FULL)
    results["restored full"] = snapshot(model, optimizer)
    torch.save(optimizer.state_dict(), folder / f"shards-{dist.get_rank()}.pt")
    saved = torch.load(folder / f"shards-{dist.get_rank()}.pt", weights_only=True)
    optimizer.load_state_dict(copy.deepcopy(saved))
    results["loaded shards"] = snapshot(model, optimizer)
    unsharded = make_model()
    other = make_optimizer(unsharded)
    train(unsharded, other, range(1))
    try:
        optimizer.load_state_dict(other.state_dict())
    except ValueError as error:
        results["refused"] = str(error)
    model = shard(make_model())
    results["missing"] = train_without_the_first_layer(model)
    results["by tensors"] = train_by_tensors(shard(make_model()))
    model = shard(make_wide())
    optimizer = zero_shot(model)
    train(model, optimizer, range(STEPS))
    save(model, optimizer, folder / "zero-shot")
    model = shard(make_wide())
    optimizer = zero_shot(model)
    restore(model, optimizer, folder / "zero-shot")
    train(model, optimizer, range(STEPS, 2 * STEPS))
    results["zero-shot, resumed"] = snapshot(model, optimizer, STATISTICS)
    orthogonal.TOGETHER = 40  # of 72 coordinates in two matrices
    results["zero-shot, in bunches"] = train_zero_shot(shard(make_wide()))
    results["zero-shot, replicated"] = train_zero_shot(nn.parallel.DistributedDataParallel(make_wide()))
    return results


PLACEMENTS = {
    "columns": (Shard(1), Shard(1)),
    "replicated": (Replicate(), Replicate()),
    "gradient replicated": (Shard(0), Replicate()),
    "gradient sharded": (Replicate(), Shard(1)),
    "gradient not yet summed": (Shard(1), Partial()),
}
"""Of a parameter and its gradients."""


def matrix():
    return torch.ones(5, 7, dtype=torch.float64)


def train_one(parameter, laid_out=lambda gradient: gradient, rule=RULE):
    optimizer = LearnedOptimizer([parameter], rule, total_steps=3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        parameter.grad = laid_out(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
        optimizer.step()
    return whole(parameter), whole(optimizer.state[parameter][STATE])


def tensor_parallel(folder):
    """Sharded on either dimension, replicated, on a mesh of two dimensions; gradients laid out otherwise."""
    mesh = init_device_mesh("cpu", (WORLD,))
    results = {"warm-up": warm_up(lambda values: distribute_tensor(values, mesh, [Shard(0)]))}
    alone = ZeroShot()
    alone.finishes_shards = False
    partial = DTensor.from_local(matrix(), mesh, [Partial()])
    for what, rule, parameter in (
        ("of shards", alone, distribute_tensor(matrix(), mesh, [Shard(0)])),
        ("partial", None, partial),
    ):
        try:
            LearnedOptimizer([nn.Parameter(parameter)], rule, total_steps=STEPS)
        except ValueError as error:
            results[what] = str(error)
    for name, (placement, layout) in PLACEMENTS.items():

        def laid_out(gradient, layout=layout):
            if layout == Partial():
                return DTensor.from_local(gradient / WORLD, mesh, [layout])
            return distribute_tensor(gradient, mesh, [layout])

        parameter = nn.Parameter(distribute_tensor(torch.ones(3, 5), mesh, [placement]))
        results[name] = train_one(parameter, laid_out)
        for what, by_matrices in (("zero-shot", True), ("elementwise", False)):
            parameter = nn.Parameter(distribute_tensor(matrix(), mesh, [placement]))
            results[f"{what}, {name}"] = train_one(parameter, laid_out, zero_shot_rule(by_matrices))

    plane = init_device_mesh("cpu", (1, WORLD), mesh_dim_names=("data", "tensor"))
    model = make_model()
    parallelize_module(model, plane["tensor"], {"2": ColwiseParallel(), "4": RowwiseParallel()})
    for layer in (model[0], model[2], model[4]):
        fully_shard(layer, mesh=plane["data"])
    optimizer = make_optimizer(model)
    train(model, optimizer, range(STEPS))
    results["plane"] = snapshot(model, optimizer)
    results["plane placements"] = str(model[2].weight.placements)
    save(model, optimizer, folder / "plane")
    return results


def on_four(rank, folder):
    """Tensor parallelism and FSDP2 on a mesh of two by two, whose rows are of uneven numbers."""
    store = dist.FileStore(str(folder / "store of four"), 4)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=4)
    try:
        plane = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
        model = make_wide()
        parallelize_module(model, plane["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        for layer in (model[0], model[2], model[4]):
            fully_shard(layer, mesh=plane["data"])
        results = {name: str(parameter.placements) for name, parameter in model.named_parameters()}
        torch.save((results, train_zero_shot(model)), folder / f"four-{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def work(rank, folder):
    store = dist.FileStore(str(folder / "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    try:
        results = {"sharded": fully_sharded(folder), "tensor": tensor_parallel(folder)}
        torch.save(results, folder / f"results-{rank}.pt")
        dist.barrier()  # neither takes its group down while the other one talks to it
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def single():
    """One process's model and optimizer, half and all the way."""
    model = make_model()
    optimizer = make_optimizer(model)
    train(model, optimizer, range(STEPS))
    half = snapshot(model, optimizer), copy.deepcopy((model, optimizer))
    train(model, optimizer, range(STEPS, 2 * STEPS))
    return *half, snapshot(model, optimizer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def results(single, folder):
    """What each of two processes found; one spawn for all tests, as starting them takes longest."""
    model, optimizer = copy.deepcopy(single[1])
    save(model, optimizer, folder / "one")
    torch.multiprocessing.spawn(work, args=(folder,), nprocs=WORLD)
    return [torch.load(folder / f"results-{rank}.pt", weights_only=False) for rank in range(WORLD)]


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, (parameter, state) in expected.items():
        assert_identical(actual[name][0], parameter)
        assert_identical(actual[name][1], state)


def test_two_processes_have_the_numbers_of_one(results, single):
    for found in results:
        assert_equal(found["sharded"]["trained"], single[0])
        assert_equal(found["sharded"]["missing"], train_without_the_first_layer(make_model()))


def test_a_rate_of_zero_at_first_is_one_for_all_processes(results):
    """A process without a row takes part in the first step's sum; the other one would wait for it."""
    for found in results:
        for ours, theirs in zip(found["tensor"]["warm-up"], warm_up(), strict=True):
            assert_identical(ours, theirs)


def test_each_process_holds_its_shards_states_only(results):
    counts = [found["sharded"]["local"] for found in results]
    assert sum(counts) == 39
    assert min(counts) > 0
    assert [found["sharded"]["bytes"] for found in results] == [4 * 80 * count for count in counts]
    assert all(found["sharded"]["placements"] == {"(Shard(dim=3),)"} for found in results)


@pytest.mark.parametrize("source", ["one", "two"])
def test_two_processes_resume_from_one_or_two(results, single, source):
    for found in results:
        assert_equal(found["sharded"][f"restored {source}"], single[0])
        assert_equal(found["sharded"][f"resumed {source}"], single[2])


@pytest.mark.parametrize("source", ["one", "two", "plane"])
def test_one_process_resumes_from_one_two_or_a_mesh(results, single, folder, source):
    model = make_model()
    optimizer = make_optimizer(model)
    restore(model, optimizer, folder / source)
    expected = results[0]["tensor"]["plane"] if source == "plane" else single[0]
    assert_equal(snapshot(model, optimizer), expected)
    train(model, optimizer, range(STEPS, 2 * STEPS))
    if source != "plane":
        assert_equal(snapshot(model, optimizer), single[2])


def test_the_whole_state_can_be_gathered_and_given_back(results, single):
    for found in results:
        for name, (_, state) in found["sharded"]["restored full"].items():
            assert_identical(state, single[0][name][1])
    for name, entries in results[0]["sharded"]["full"]["state"].items():
        assert_identical(entries[STATE], single[0][name][1])


def test_a_state_dict_of_shards_fits_the_same_shards_only(results):
    for found in results:
        assert_equal(found["sharded"]["loaded shards"], found["sharded"]["restored full"])
    refused = [found["sharded"]["refused"] for found in results]
    assert all("sharded in another way" in message for message in refused)
    assert all("torch.distributed.checkpoint" in message for message in refused)


def test_what_a_rule_reads_of_tensors_is_of_whole_tensors(results):
    expected = train_by_tensors(make_model())
    for found in results:
        for name, pair in expected.items():
            for ours, theirs in zip(found["sharded"]["by tensors"][name], pair, strict=True):
                # The sum over a tensor is taken shard by shard.
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_every_placement_gives_the_same_numbers(results):
    expected = train_one(nn.Parameter(torch.ones(3, 5)))
    for found in results:
        for name in PLACEMENTS:
            for ours, theirs in zip(found["tensor"][name], expected, strict=True):
                assert_identical(ours, theirs)


def test_a_mesh_of_two_dimensions(results, single):
    for found in results:
        assert "_StridedShard(dim=0" in found["tensor"]["plane placements"]
        for name, (theta, state) in single[0].items():
            # The tensor-parallel sums are taken in another order.
            torch.testing.assert_close(found["tensor"]["plane"][name][0], theta, rtol=0, atol=2e-5)
            torch.testing.assert_close(found["tensor"]["plane"][name][1], state, rtol=0, atol=2e-5)


def test_a_checkpoint_before_the_first_step_changes_nothing(single, tmp_path):
    model = make_model()
    optimizer = make_optimizer(model)
    save(model, optimizer, tmp_path / "start")
    assert len(optimizer.state) == 6
    assert not any(optimizer.state[parameter][STATE].any() for parameter in model.parameters())
    resumed = make_model()
    twin = make_optimizer(resumed)
    restore(resumed, twin, tmp_path / "start")
    for pair in ((model, optimizer), (resumed, twin)):
        train(*pair, range(STEPS))
        assert_equal(snapshot(*pair), single[0])


def assert_near(actual, expected):
    """To rounding: sums are taken in another order."""
    for name, pair in expected.items():
        for ours, theirs in zip(actual[name], pair, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-11)


def test_whole_matrices_are_moved_as_by_one_process(results):
    expected = train_zero_shot(make_wide())
    for found in results:
        for how in ("resumed", "in bunches", "replicated"):
            assert_near(found["sharded"][f"zero-shot, {how}"], expected)
        for what, by_matrices in (("zero-shot", True), ("elementwise", False)):
            alone = train_one(nn.Parameter(matrix()), rule=zero_shot_rule(by_matrices))
            assert_near(found["tensor"], {f"{what}, {name}": alone for name in PLACEMENTS})


def test_shards_that_a_rule_cannot_move_are_refused(results):
    for found in results:
        assert found["tensor"]["of shards"].endswith(
            "ZeroShot moves whole tensors: its finish must serve shards, and say so (finishes_shards)"
        )
        assert (
            "sharded as (Partial(sum),), which ZeroShot cannot put together: use Shard and"
            in found["tensor"]["partial"]
        )


@pytest.mark.slow
def test_whole_matrices_are_orthogonalised_on_a_mesh(folder):
    torch.multiprocessing.spawn(on_four, args=(folder,), nprocs=4)
    expected = train_zero_shot(make_wide())
    for rank in range(4):
        placements, found = torch.load(folder / f"four-{rank}.pt", weights_only=False)
        assert placements["0.weight"] == "(_StridedShard(dim=0, sf=2), Shard(dim=0))"
        assert placements["2.weight"] == "(Shard(dim=0), Shard(dim=1))"
        assert_near(found, expected)
