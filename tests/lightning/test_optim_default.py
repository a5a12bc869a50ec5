"""LearnedOptimizer with no rule named: which one it is, in loops as users write them, and its warnings."""

import copy
import math
import re
import warnings

import lightning
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from l2l_lightning import CoordinatewiseLSTM, LearnedOptimizer
from l2l_lightning.optim.default_rule import default_rule
from l2l_lightning.rules import Grouped, ZeroShot

T = 8
X = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))


def loss_of(model, x=X):
    return F.cross_entropy(model(x), x[:, :5].argmax(-1))


def train(model, optimizer, steps=T):
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def name_of(group):
    return group["rule"].partition("@")[0]


@pytest.mark.parametrize(
    ("totals", "arguments", "names"),
    [
        ([None, None], {"total_steps": T}, ["zero-shot", "zero-shot"]),
        ([T, T], {}, ["zero-shot", "zero-shot"]),
        ([None, None], {}, ["zero-shot-free", "zero-shot-free"]),
        ([None, T], {}, ["zero-shot-free", "zero-shot"]),
        ([None, T], {"rule": ZeroShot(), "total_steps": T}, ["ZeroShot", "ZeroShot"]),
    ],
)
def test_a_group_that_knows_how_many_steps_there_will_be_has_the_rule_that_reads_it(totals, arguments, names):
    groups = [{"params": list(layer.parameters())} for layer in (network()[0], network()[2])]
    for group, total in zip(groups, totals, strict=True):
        group |= {} if total is None else {"total_steps": total}
    assert [name_of(group) for group in LearnedOptimizer(groups, **arguments).param_groups] == names


@pytest.mark.parametrize("total", [T, None])
def test_the_default_is_one_rule_whatever_pytorch_defaults_to(total):
    model, twin = network(), network()
    expected = train(model, LearnedOptimizer(model.parameters(), default_rule(total)[1], total_steps=total))
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), torch.inference_mode():
            optimizer = LearnedOptimizer(twin.parameters(), total_steps=total)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(train(twin, optimizer), expected)
    assert loss_of(twin) < 0.8 * loss_of(network())


WARNED = [
    ({"lr": 1e-3}, "lr=0.001 multiplies the learned step, for which 1 is what the rule is meant for"),
    ({"lr": torch.tensor(0.01)}, "lr=0.01 multiplies"),
    ({"weight_decay": 0.01}, "weight_decay=0.01 takes a share of 0.01 off every parameter at each step"),
]


@pytest.mark.parametrize("rule", [None, Grouped({"": ZeroShot()})], ids=["default", "Grouped"])
@pytest.mark.parametrize(("arguments", "message"), WARNED)
def test_another_optimizers_habits_are_told_once(rule, arguments, message):
    with pytest.warns(UserWarning, match=message):
        optimizer = LearnedOptimizer(network().named_parameters(), rule, total_steps=T, **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.add_param_group({"params": [("late", nn.Parameter(torch.ones(2)))]})


QUIET = {
    "a rule without step sizes": {"rule": CoordinatewiseLSTM(), "lr": 1e-3, "weight_decay": 0.1},
    "a warm-up by hand": {"lr": 0.0},
    "a small decay": {"weight_decay": 1e-3},
}


@pytest.mark.parametrize("what", QUIET)
@pytest.mark.filterwarnings("error")
def test_what_may_be_meant_is_not_warned_of(what):
    LearnedOptimizer(network().parameters(), **{"total_steps": T} | QUIET[what])


@pytest.mark.filterwarnings("error")
def test_schedulers_may_begin_and_end_at_small_rates():
    """A group that joins, or a run that is resumed, while the rate is small is judged by its initial rate."""
    model = network()
    optimizer = LearnedOptimizer(model[0].parameters(), total_steps=T)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1e-3 + min(step, T - step) / T)
    group = optimizer.param_groups[0]
    optimizer.add_param_group(
        {"params": model[2].parameters(), "lr": group["lr"], "initial_lr": group["initial_lr"]}
    )
    schedule.base_lrs.append(1.0)
    schedule.lr_lambdas.append(schedule.lr_lambdas[0])
    for _ in range(T):
        train(model, optimizer, steps=1)
        schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-3]
    assert [group["step"] for group in optimizer.param_groups] == [T, T]


def test_a_step_beyond_the_last_moves_nothing_and_is_told_once():
    model = network()
    optimizer = LearnedOptimizer(model.parameters(), total_steps=T)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reached = train(model, optimizer)
    with pytest.warns(
        RuntimeWarning, match=r"step 9 is beyond total_steps=8: the rule moves nothing any more"
    ):
        assert torch.equal(train(model, optimizer, steps=1), reached)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(train(model, optimizer, steps=1), reached)
        train(model, LearnedOptimizer(model.parameters(), CoordinatewiseLSTM(), total_steps=1), steps=3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"betas": (0.9, 0.99)}, TypeError, "unexpected keyword argument 'betas'"),
        ({"rule": 1e-3}, TypeError, "rule must be a name, a path or a Rule, got float: a rate is lr=0.001"),
        (
            {"total_steps": math.inf},
            ValueError,
            "total_steps must be finite, got inf: leave it out where nobody",
        ),
        ({"total_steps": 2.5}, TypeError, "total_steps must be a whole number, got 2.5"),
    ],
)
def test_other_optimizers_arguments(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        LearnedOptimizer(network().parameters(), **arguments)


def test_other_optimizers_options_of_a_group():
    with pytest.raises(TypeError, match="LearnedOptimizer has no betas, eps: its rule has learned"):
        LearnedOptimizer([{"params": network().parameters(), "eps": 1e-8, "betas": (0.9, 0.99)}])


def test_a_resumed_run_keeps_its_number_of_steps_and_says_so():
    model = network()
    optimizer = LearnedOptimizer(model.parameters(), total_steps=T)
    train(model, optimizer, steps=3)
    other = LearnedOptimizer(network().parameters(), total_steps=2 * T)
    with pytest.warns(
        UserWarning, match="the state dict's total_steps, 8, is kept, and not the optimizer's, 16"
    ):
        other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["total_steps"] == T
    free = LearnedOptimizer(network().parameters())
    with pytest.raises(
        ValueError, match=r"is zero-shot-free@.*the total_steps \(8\), that it was saved with"
    ):
        free.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(("totals", "step"), [((T, T), 3), ((None, None), 3), ((T, 2 * T), 0)])
def test_a_group_that_joins_takes_its_place_in_the_schedule(totals, step):
    """With those of its total_steps; a number of steps of its own begins a schedule of its own."""
    model = network()
    optimizer = LearnedOptimizer(model.parameters(), total_steps=totals[0])
    train(model, optimizer, steps=3)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(4, 4))], "total_steps": totals[1]})
    assert [group["step"] for group in optimizer.param_groups] == [3, step]
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "total_steps": totals[1], "step": 5})
    assert optimizer.param_groups[2]["step"] == 5


def test_gradients_are_accumulated_over_minibatches():
    model, twin = network().double(), network().double()
    optimizers = [LearnedOptimizer(m.parameters(), ZeroShot().double(), total_steps=T) for m in (model, twin)]
    for _ in range(T):
        loss_of(model, X.double()).backward()
        for part in X.double().split(8):
            (loss_of(twin, part) / 4).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for ours, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_rows_of_an_embedding_that_no_minibatch_has_stay():
    torch.manual_seed(0)
    embedding, head = nn.Embedding(50, 8, padding_idx=0), nn.Linear(8, 5)
    before = embedding.weight.detach().clone()
    parameters = [*embedding.parameters(), *head.parameters()]
    optimizer = LearnedOptimizer(parameters, total_steps=T)
    for _ in range(T):
        words = torch.randint(0, 20, (16,))
        optimizer.zero_grad()
        F.cross_entropy(head(embedding(words)), words % 5).backward()
        optimizer.step()
    assert torch.equal(embedding.weight[20:], before[20:])
    assert not embedding.weight[0].any()
    assert (embedding.weight[1:20] != before[1:20]).any(1).sum() > 15


def test_a_tied_parameter_is_one_and_a_frozen_one_is_none():
    """Both in what the rule reads: how many tensors there are."""
    results = []
    for tied in (True, False):
        model = network()
        optimized = [model[0].weight, model[2].weight]
        if tied:
            model.again = nn.Linear(6, 8)
            model.again.weight = model[0].weight
            for bias in (model[0].bias, model[2].bias, model.again.bias):
                bias.requires_grad_(False)
            optimized = model.parameters()
        optimizer = LearnedOptimizer(optimized, total_steps=T)
        for _ in range(T):
            optimizer.zero_grad()
            F.cross_entropy(model[2](model[0](X).tanh()), X[:, :5].argmax(-1)).backward()
            optimizer.step()
        results.append(torch.cat([model[0].weight.detach().flatten(), model[2].weight.detach().flatten()]))
    assert torch.equal(*results)


@pytest.mark.parametrize("total", [T, None])
def test_an_averaged_model_follows(total):
    """As torch.optim.swa_utils keeps it, which copies the model and not the optimizer."""
    model = network()
    optimizer = LearnedOptimizer(model.parameters(), total_steps=total)
    average = torch.optim.swa_utils.AveragedModel(
        model, avg_fn=lambda ours, new, count: 0.9 * ours + 0.1 * new
    )
    expected = None
    for _ in range(T):
        theta = train(model, optimizer, steps=1)
        average.update_parameters(model)
        expected = theta if expected is None else 0.9 * expected + 0.1 * theta
    found = torch.cat([parameter.flatten() for parameter in average.module.parameters()])
    torch.testing.assert_close(found, expected)


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = network()

    def training_step(self, batch, index):
        return loss_of(self.model, batch)

    def configure_optimizers(self):
        return LearnedOptimizer(self.parameters(), total_steps=self.trainer.estimated_stepping_batches)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(X, batch_size=4)


def test_a_lightning_trainer_knows_how_many_steps_there_will_be(tmp_path):
    """Accumulation and the epochs' ends counted; and nothing is told, as nothing is wrong."""
    quiet = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = lightning.Trainer(
        max_epochs=3,
        accumulate_grad_batches=3,
        gradient_clip_val=1.0,
        accelerator="cpu",
        default_root_dir=tmp_path,
        **quiet,
    )
    module = Module()
    start = copy.deepcopy(module.model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*total_steps")
        trainer.fit(module)
    (group,) = trainer.optimizers[0].param_groups
    assert (name_of(group), group["total_steps"], group["step"]) == ("zero-shot", 9, 9)
    assert loss_of(module.model) < 0.8 * loss_of(start)
