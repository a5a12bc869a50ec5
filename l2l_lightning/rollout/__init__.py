"""The inner loop and its meta-gradient: K optimizees side by side, optimised by an update rule."""

from l2l_lightning.rollout.optimizees import Optimizees
from l2l_lightning.rollout.rollout import Rollout, Window, run_rule

__all__ = ["Optimizees", "Rollout", "Window", "run_rule"]
