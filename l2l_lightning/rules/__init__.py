"""Update rules: what is learned."""

from l2l_lightning.rules.base import UpdateRule
from l2l_lightning.rules.lstm import CoordinatewiseLSTM

__all__ = ["CoordinatewiseLSTM", "UpdateRule"]
