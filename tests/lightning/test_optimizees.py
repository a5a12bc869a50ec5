"""Optimizees: independent random streams, exact gradients, and states that resume bit for bit."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

from l2l_lightning.data import load_images
from l2l_lightning.rollout.optimizees import STREAMS, Optimizees, derive_generator
from l2l_lightning.tasks import MNISTMLP, NoisyScaledSquare, Quadratic

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


def test_draws_and_rollouts_do_not_depend_on_the_grouping(make):
    together, apart, order = make(range(4)), [make([0]), make([3, 1]), make([2])], [0, 3, 1, 2]
    for _ in range(3):
        assert torch.equal(together.theta[order], torch.cat([o.theta for o in apart]))
        ours, *theirs = (tree_leaves(o.next_batches()) for o in (together, *apart))
        for mine, *others in zip(ours, *theirs, strict=True):
            assert torch.equal(mine[order], torch.cat(others))
    losses = torch.cat([descend(o, 5) for o in apart], dim=1)
    torch.testing.assert_close(descend(together, 5)[:, order], losses, rtol=1e-12, atol=1e-12)


def test_seed_stream_and_index_each_change_the_draws(make):
    for other in ({"seed": 1}, {"stream": "test"}, {"indices": [1]}):
        mine = make(**{"indices": [0]})
        theirs = make(**{"indices": [0], **other})
        assert not torch.equal(mine.theta, theirs.theta)
        assert not torch.equal(descend(mine, 2), descend(theirs, 2))


def test_streams_are_numbered_for_good():
    # A renumbered stream would change every recorded result.
    assert STREAMS == {"train": 0, "validation": 1, "tuning": 2, "test": 3, "phi": 4, "perturbation": 5}
    assert derive_generator(0, "train", 7).initial_seed() == 3542883155007454814


def test_a_state_resumes_bit_for_bit(make):
    optimizees = make(range(3), dtype=torch.float32)
    descend(optimizees, 3)
    state = optimizees.state_dict()
    rest = descend(optimizees, 4)  # going on does not change a saved state …
    # Other optimizees: everything that distinguishes the first ones must come from the state.
    resumed = make(range(7, 10), seed=5, dtype=torch.float32)
    for _ in range(2):  # … nor a loaded one
        resumed.load_state_dict(state)
        assert torch.equal(descend(resumed, 4), rest)
        assert torch.equal(resumed.theta, optimizees.theta)


def test_a_state_of_another_number_of_optimizees_is_refused(make):
    with pytest.raises(ValueError, match="zip"):
        make(range(3)).load_state_dict(make(range(2)).state_dict())
