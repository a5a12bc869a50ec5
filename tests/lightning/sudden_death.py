"""A callback for runs that torchrun starts: one of the processes dies, once."""

import os
import signal

from lightning.pytorch.callbacks import Callback


class SuddenDeath(Callback):
    """Kills a process after a meta-step, unless torchrun has already started it again."""

    def __init__(self, rank: int, meta_step: int):
        self.rank = rank
        self.meta_step = meta_step

    def on_train_batch_end(self, trainer, *_):
        first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if first and trainer.global_rank == self.rank and trainer.global_step == self.meta_step:
            os.kill(os.getpid(), signal.SIGKILL)
