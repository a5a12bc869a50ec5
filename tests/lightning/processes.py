"""Meta-training in several processes on one machine, for tests."""

import os
import signal
import socket
import subprocess
import tempfile
from contextlib import ExitStack, suppress

import torch
from lightning.pytorch.callbacks import Callback
from meta_training import fit


class Report(Callback):
    """Every process writes down what it ended with."""

    def __init__(self, folder):
        self.folder = folder

    def on_fit_end(self, trainer, pl_module):
        ended = {
            "phi": {name: value.detach().clone() for name, value in pl_module.rule.named_parameters()},
            "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
            "meta_steps": trainer.global_step,
            "restarts": [getattr(callback, "restarts", 0) for callback in trainer.callbacks],
        }
        torch.save(ended, self.folder / f"process-{trainer.global_rank}.pt")


def fit_in_processes(model, folder, devices, *callbacks, **arguments):
    """Fits in forked processes; returns what each ended with, in the order of their ranks."""
    folder.mkdir(parents=True, exist_ok=True)
    if devices > 1:
        arguments.update(devices=devices, strategy="ddp_fork")
    fit(model, folder, *callbacks, Report(folder), **arguments)
    return [torch.load(folder / f"process-{rank}.pt", weights_only=True) for rank in range(devices)]


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def run_together(commands, seconds=240):
    """Runs programs beside each other, (arguments, additional environment) each; returns what each printed.

    All of them, and what they started, are gone afterwards.
    """
    with ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in commands]
        codes = _run(commands, outputs, seconds)
        printed = []
        for output in outputs:
            output.seek(0)
            printed.append(output.read())
    assert not any(codes), "\n".join([str(codes), *printed])
    return printed


def _run(commands, outputs, seconds):
    started = [
        subprocess.Popen(
            arguments,
            env={**os.environ, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        for (arguments, environment), output in zip(commands, outputs, strict=True)
    ]
    try:
        return [process.wait(timeout=seconds) for process in started]
    except subprocess.TimeoutExpired as late:
        return [str(late)]  # what they printed says where they hang
    finally:
        for process in started:
            # The group outlives its leader if anything in it does.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
