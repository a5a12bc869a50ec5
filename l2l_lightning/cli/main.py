"""The commands of `l2l`, each imported when it is asked for."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import torch
from l2l_kernels import BackendUnavailableError

from l2l_lightning.cli.arguments import COMMANDS, names_runs, one_line, prepare
from l2l_lightning.errors import L2LError, RunStoppedError
from l2l_lightning.extras import needed_by
from l2l_lightning.program import program


def _help() -> str:
    return "\n".join(
        [
            f"usage: {program()} COMMAND [options]",
            "",
            *(f"  {name:<10} {what}" for name, what in COMMANDS.items()),
            "",
            f"{program()} COMMAND --help lists a command's options.",
        ]
    )


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line; what a user can mend is one line on standard error and a non-zero exit."""
    arguments = list(sys.argv[1:] if args is None else args)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a run must not end because a terminal lacks a letter
    if arguments in (["-h"], ["--help"]):
        print(_help())
        return
    handled = _handle_sigterm()
    # The folder is the run's own and new; what is in it are this run's other files.
    warnings.filterwarnings("ignore", message="Experiment logs directory .* exists and is not empty")
    # Lightning's own affair.
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.* is deprecated")
    # Saturated sigmoids at a search's largest learning rates make subnormal numbers, ten times as slow.
    torch.set_flush_denormal(True)
    try:
        with needed_by(" ".join([program(), *arguments[:1]])):
            _run(arguments)
    except RunStoppedError as stop:
        print(stop, file=sys.stderr)
        raise SystemExit(stop.exit_code) from stop
    except L2LError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        raise SystemExit(1) from error
    except KeyboardInterrupt as stop:
        print("interrupted", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from stop
    except argparse.ArgumentError as error:
        command = " ".join([program(), *arguments[:1], "--help"])
        print(f"error: {one_line(error)} ({command} lists the options)", file=sys.stderr)
        raise SystemExit(2) from error
    except BrokenPipeError:
        # Whoever read the output, such as `head`, has had enough; Python would complain once more at its end.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None  # 128 + SIGPIPE, as shells say it
    except OSError as error:
        where = {
            "reproduce": "--out",
            "plot": "--out",
            "compare": "--out" if names_runs(arguments) else "--out or --trainer.default_root_dir",
            "export": "FILE",
        }
        option = where.get(arguments[0], "--trainer.default_root_dir")
        print(f"error: {error} ({option} says where it is written)", file=sys.stderr)
        raise SystemExit(1) from error
    except Exception as error:
        message = _others_error(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(1) from error
    finally:
        wandb = sys.modules.get("wandb")
        if wandb is not None and wandb.run is not None:
            wandb.finish()
        if handled:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _run(arguments: list[str]) -> None:
    if arguments[:1] == ["info"]:
        from l2l_lightning.cli import info

        info.main(arguments[1:])
    elif arguments[:1] == ["export"]:
        from l2l_lightning.cli import export

        export.main(arguments[1:])
    elif arguments[:1] == ["reproduce"]:
        from l2l_lightning.reproduce.settings import parse

        names, settings = parse(arguments[1:])  # before what an experiment needs is imported
        from l2l_lightning.reproduce.command import main as reproduce

        reproduce(names, settings)
    elif arguments[:1] == ["plot"]:
        from l2l_lightning.cli.plot import plot

        plot(arguments[1:])
    elif names_runs(arguments):
        from l2l_lightning.cli.compare_runs import compare_runs

        compare_runs(arguments[1:])
    else:
        prepared, name = prepare(arguments)  # before Lightning is imported, which takes seconds
        from l2l_lightning.cli import lightning_cli

        lightning_cli.run(prepared, name)


def _handle_sigterm() -> bool:
    """Has SIGTERM end the program as an error does, unless whoever started it wants something else of it.

    In a meta-training LatestCheckpoint takes it over.
    """
    main_thread = threading.current_thread() is threading.main_thread()
    if not main_thread or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        return False

    def stop(number: int, frame: FrameType | None) -> None:
        os.write(2, b"\nstopped by SIGTERM\n")  # not print: the signal may have come in the middle of one
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    return True


def _others_error(error: Exception) -> str | None:
    """What an error that another package raises asks of the user; None if it asks nothing."""
    # Of packages that have been imported: only they can have raised it.
    lightning = sys.modules.get("lightning.fabric.utilities.exceptions")
    if isinstance(error, BackendUnavailableError) or (
        lightning is not None and isinstance(error, lightning.MisconfigurationException)
    ):
        return one_line(error)
    wandb = sys.modules.get("wandb")
    if wandb is not None and isinstance(error, wandb.Error):
        hint = (
            "--wandb_project and --wandb_entity say where it is logged, --wandb offline needs no account, "
            "--wandb off logs nothing"
        )
        return f"Weights & Biases: {one_line(error)} ({hint})"
    if isinstance(error, RuntimeError) and str(error).startswith("Early stopping conditioned on"):
        return f"{one_line(error)} (--early_stopping.monitor)"
    frames = traceback.extract_tb(error.__traceback__)
    if any(Path(frame.filename).name == "checkpoint_connector.py" for frame in frames):  # Lightning's
        return (
            f"the checkpoint (--ckpt_path) cannot be gone on from: {type(error).__name__}: {one_line(error)}"
        )
    return None
