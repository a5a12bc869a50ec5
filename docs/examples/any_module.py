"""A rule is meta-trained in seconds on networks with BatchNorm and dropout, and judged in eval mode."""

from lightning.pytorch import Trainer
from torch import manual_seed, nn, randn

from l2l_lightning import CoordinatewiseLSTM, MetaData, MetaLearner, ModuleTask, Optimizees, run_rule


def network():
    """Builds an optimizee."""
    return nn.Sequential(nn.Linear(2, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 2))


def rings(generator):
    """Draws 64 points of the plane, and whether each lies inside of the circle that half of them lie in."""
    points = randn(64, 2, generator=generator)
    return points, (points.norm(dim=-1) < 1.18).long()


def held_out_loss(task, rule):
    """Returns the mean loss of 4 networks after 20 steps, on fresh points, without dropout."""
    networks = Optimizees(task, None, seed=0, stream="test", indices=range(4))
    run_rule(rule, networks, horizon=20)
    return float(networks.held_out_losses(None).mean())


def main():
    """Returns the held-out losses before meta-training and after it."""
    manual_seed(0)  # the rule's start
    task, rule = ModuleTask(network, sample=rings), CoordinatewiseLSTM(1, 8, output_scale=1.0)
    before = held_out_loss(task, rule)
    model = MetaLearner(task, rule, horizon=20, unroll=20, num_tasks=2, learning_rate=0.01)
    Trainer(max_epochs=1, logger=False, limit_val_batches=0).fit(model, MetaData(num_rollouts=20))
    return before, held_out_loss(task, rule)


if __name__ == "__main__":
    print("held-out loss before meta-training {:.2f}, after it {:.2f}".format(*main()))
