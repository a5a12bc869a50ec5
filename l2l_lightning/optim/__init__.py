"""A trained rule in anybody's training loop."""

from l2l_lightning.optim.learned_optimizer import LearnedOptimizer

__all__ = ["LearnedOptimizer"]
