"""What is trained: a network, three disjoint sets of data, and how long."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from l2l_lightning.examples.module import OptimizerSetting
from l2l_lightning.examples.training import Data, Run, train
from l2l_lightning.rollout.optimizees import derive_generator

Stream = Literal["tuning", "test"]
"""Settings are chosen by runs of one stream, and reported by runs of the other."""


@dataclass(frozen=True)
class Problem:
    """A training problem; its runs are determined by (seed, stream, index) and the optimizer alone."""

    name: str
    description: str
    source: str
    """Where the data comes from, for the record."""
    make_network: Callable[[], nn.Module]
    """A fresh network, whose weights come from torch's global generator."""
    train: Data
    validation: Data
    """What settings are chosen on."""
    test: Data
    """What is reported."""
    steps: int
    batch_size: int
    seed: int
    accelerator: str = "auto"

    def run(self, setting: OptimizerSetting, stream: Stream, index: int) -> Run:
        """Trains the network of (stream, index): the same weights and minibatches for every setting.

        It is evaluated on the validation data if the stream is "tuning", on the test data if it is "test".

        Raises:
            ValueError: `steps` is no multiple of EVALUATIONS.
        """
        generator = derive_generator(self.seed, stream, index)
        return train(
            self.network(generator),
            setting,
            self.train,
            self.validation if stream == "tuning" else self.test,
            steps=self.steps,
            batch_size=self.batch_size,
            generator=generator,
            accelerator=self.accelerator,
        )

    def network(self, generator: torch.Generator) -> nn.Module:
        """A network whose weights come from this generator; the global one is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            return self.make_network()
