"""A task and an update rule of your own: meta-trained in seconds, saved, and used in a plain PyTorch loop.

    python docs/examples/own_task_and_rule.py

The task is a function of a vector; the rule is an optimizer of three numbers φ. MetaLearner is an ordinary
LightningModule, which finds φ by Adam on the sum of the losses along whole rollouts of many optimizees.
"""

import torch
from lightning.pytorch import Trainer

from l2l_lightning import FunctionTask, LearnedOptimizer, MetaData, MetaLearner, UpdateRule, pretrained
from l2l_lightning.rollout import Optimizees, run_rule


def valley(theta):
    """Returns f(x, y) = (1 − x)² + 10 (y − x²)², a curved valley; its least value is f(1, 1) = 0."""
    x, y = theta.unbind()
    return (1 - x) ** 2 + 10 * (y - x**2) ** 2


class BoundedMomentum(UpdateRule):
    """m ← β m + g;  u = −η tanh(γ m), for each coordinate: φ is log η, log γ and the logit of β."""

    state_shape = (1,)  # m

    def __init__(self):
        super().__init__()
        self.phi = torch.nn.Parameter(torch.empty(3))
        self.reset_parameters()

    def step(self, inputs, state):
        """Returns (u [n], m [1, n]) for gradients [n] and a state [1, n]."""
        momentum = self.phi[2].sigmoid() * state[0] + inputs
        return -self.phi[0].exp() * (self.phi[1].exp() * momentum).tanh(), momentum[None]

    @torch.no_grad()
    def reset_parameters(self, generator=None):
        """Starts from η = 0.02, γ = 0.05 and β = 0.5."""
        self.phi.copy_(torch.tensor([0.02, 0.05, 1.0]).log())


def final_loss(task, rule):
    """Returns the mean loss of 200 fresh optimizees after 50 steps."""
    optimizees = Optimizees(task, None, seed=0, stream="test", indices=range(200))
    return float(run_rule(rule, optimizees, horizon=51)[-1].mean())


def main(num_rollouts=60):
    """Returns the rule's final loss before and after the meta-training, and where it takes (−1, 1)."""
    task, rule = FunctionTask(valley, dim=2), BoundedMomentum()
    before = final_loss(task, rule)
    model = MetaLearner(task, rule, horizon=50, unroll=50, num_tasks=32, learning_rate=0.05)
    off = ("logger", "enable_progress_bar", "enable_checkpointing", "enable_model_summary")
    trainer = Trainer(max_epochs=1, inference_mode=False, accelerator="cpu", **dict.fromkeys(off, False))
    trainer.fit(model, datamodule=MetaData(num_rollouts=num_rollouts))
    after = final_loss(task, rule)
    eta, gamma, beta = *rule.phi[:2].exp().tolist(), rule.phi[2].sigmoid().item()
    print(f"loss after 50 steps: {before:.3g} before meta-training, {after:.3g} after it")
    print(f"found: η = {eta:.3g}, γ = {gamma:.3g}, β = {beta:.3g}")

    pretrained.save(rule, "own_rule.safetensors")
    # The file names the rule's class; a class that is not the package's is imported on your word only.
    trained = pretrained.load("own_rule.safetensors", trust=[__name__])

    point = torch.nn.Parameter(torch.tensor([-1.0, 1.0]))
    optimizer = LearnedOptimizer([point], rule=trained)
    for _ in range(100):
        loss = valley(point)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(
        f"from (-1, 1) to ({point[0].item():.3f}, {point[1].item():.3f}) in 100 steps, f = {loss.item():.2g}"
    )
    return before, after, point.detach()


if __name__ == "__main__":
    main()
