"""`LearnedOptimizer` runs a trained rule in any training loop."""

from l2l_lightning.optim.learned_optimizer import LearnedOptimizer

__all__ = ["LearnedOptimizer"]
