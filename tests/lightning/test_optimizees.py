"""Optimizees: independent random streams, exact gradients, and states that resume bit for bit."""

import copy

import pytest
import torch

from l2l_lightning.data import load_images
from l2l_lightning.rollout.optimizees import STREAMS, Optimizees, derive_generator
from l2l_lightning.tasks import MNISTMLP, NoisyScaledSquare, Quadratic, Task

TASKS = {
    "constant": Quadratic(dim=4),
    "noise": NoisyScaledSquare(dim=4),
    "minibatches": MNISTMLP(hidden_sizes=[4], batch_size=6),
}


@pytest.fixture(scope="module")
def images():
    return load_images("mnist").train


@pytest.fixture(params=TASKS)
def make(request, images):
    task = TASKS[request.param]

    def build(indices, seed=0, stream="train", dtype=torch.float64):
        return Optimizees(task, images if task.dataset else None, seed, stream, indices, dtype=dtype)

    return build


def descend(optimizees, steps):
    losses = []
    for _ in range(steps):
        loss, grad = optimizees.losses_and_grads()
        optimizees.theta -= 0.01 * grad
        losses.append(loss)
    return torch.stack(losses)


def test_draws_do_not_depend_on_the_grouping(make):
    together = make(range(4))
    apart = [make([0]), make([3, 1]), make([2])]
    order = [0, 3, 1, 2]
    for _ in range(3):
        assert torch.equal(together.theta[order], torch.cat([o.theta for o in apart]))
        leaves = torch.utils._pytree.tree_leaves
        for ours, *theirs in zip(
            leaves(together.next_batches()), *(leaves(o.next_batches()) for o in apart), strict=True
        ):
            assert torch.equal(ours[order], torch.cat(theirs))


def test_rollouts_do_not_depend_on_the_grouping(make):
    together = descend(make(range(4)), 5)
    apart = torch.cat([descend(make([0]), 5), descend(make([1, 2, 3]), 5)], dim=1)
    torch.testing.assert_close(together, apart, rtol=1e-12, atol=1e-12)


def test_seed_stream_and_index_each_change_the_draws(make):
    for other in ({"seed": 1}, {"stream": "test"}, {"indices": [1]}):
        mine = make(**{"indices": [0]})
        theirs = make(**{"indices": [0], **other})
        assert not torch.equal(mine.theta, theirs.theta)
        assert not torch.equal(descend(mine, 2), descend(theirs, 2))


def test_streams_are_numbered_for_good():
    # A renumbered stream would change every recorded result.
    assert STREAMS == {"train": 0, "validation": 1, "tuning": 2, "test": 3, "phi": 4}
    assert derive_generator(0, "train", 7).initial_seed() == 3542883155007454814


def test_a_state_resumes_bit_for_bit(make, tmp_path):
    optimizees = make(range(3), dtype=torch.float32)
    descend(optimizees, 3)
    torch.save(optimizees.state_dict(), tmp_path / "state.pt")
    rest = descend(optimizees, 4)
    # Other optimizees: everything that distinguishes the first ones must come from the state.
    resumed = make(range(7, 10), seed=5, dtype=torch.float32)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(descend(resumed, 4), rest)
    assert torch.equal(resumed.theta, optimizees.theta)


def test_going_on_does_not_change_a_saved_or_a_loaded_state(make):
    optimizees = make(range(2))
    state = optimizees.state_dict()
    kept = copy.deepcopy(state["theta"])
    descend(optimizees, 2)
    resumed = make(range(2))
    resumed.load_state_dict(state)
    first = descend(resumed, 2)
    assert torch.equal(state["theta"], kept)
    resumed.load_state_dict(state)
    assert torch.equal(descend(resumed, 2), first)


def test_a_state_of_another_number_of_optimizees_is_refused(make):
    with pytest.raises(ValueError, match="zip"):
        make(range(3)).load_state_dict(make(range(2)).state_dict())


def test_a_task_without_an_instance_or_batches_needs_neither():
    class Bowl(Task):
        num_coordinates = 2

        def init(self, generator):
            return torch.ones(2)

        def loss(self, theta, batch):
            return theta.square().sum()

        def config(self):
            return {}

    losses, grads = Optimizees(Bowl(), None, 0, "train", [0]).losses_and_grads()
    assert losses.tolist() == [2.0]
    assert grads.tolist() == [[2.0, 2.0]]
