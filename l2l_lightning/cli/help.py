"""What `fit --help` shows: the project's options, and of Lightning's those that a first run may want."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

OURS = {
    "model": "What is meta-trained, and how",
    "data": "How long, and on what data",
    "comparison": "The comparison with tuned baselines",
    "averaging": "The average of φ over meta-steps",
    "collapse": "What is done about a collapse",
    "latest": "The newest checkpoint, from which a run goes on",
}
"""Sections whose options are all shown, in this order, and their titles."""
OF_LIGHTNINGS = {
    "config": "A preset's name, or a file of options: {presets}.",
    "print_config": "Print all options as a file that --config takes, and exit.",
    "seed_everything": "Seed of every random draw.",
    "ckpt_path": "The checkpoint: fit goes on from it, the other commands take the rule in it.",
    "trainer.accelerator": "cpu, gpu or auto.",
    "trainer.devices": "How many, or which: 2, or [0,3].",
    "trainer.precision": "Of the optimizee's network: 32-true, 64-true, bf16-mixed or 16-mixed.",
    "trainer.max_steps": "End after so many meta-steps; -1 is the whole run, --data.num_rollouts.",
    "trainer.max_time": "End after DD:HH:MM:SS.",
    "trainer.val_check_interval": "Meta-steps from one validation to the next.",
    "trainer.gradient_clip_val": "Largest norm of the meta-gradient.",
    "trainer.accumulate_grad_batches": "Windows whose meta-gradients make one meta-step.",
    "trainer.default_root_dir": "Where runs' folders are made.",
    "trainer.logger": "A logger beside the run's own, such as TensorBoardLogger; false is none.",
}
"""Lightning's options that are shown, in fewer words than Lightning's."""


class HelpAll(argparse._HelpAction):
    """`--help-all`: prints the help with every option of Lightning's, and exits."""

    def __call__(self, parser: Any, *arguments: Any, **options: Any) -> None:
        """Has the parser print the whole help."""
        parser.whole_help = True
        super().__call__(parser, *arguments, **options)

    @classmethod
    def add_to(cls, parser: argparse.ArgumentParser) -> None:
        """Adds the option, which is none of a run's."""
        parser.add_argument(
            "--help-all",
            action=cls,
            dest=argparse.SUPPRESS,
            default=argparse.SUPPRESS,
            help="Show Lightning's options, too, and exit.",
        )


def shorten(parser: argparse.ArgumentParser, command: str, what: str, presets: Sequence[str]) -> None:
    """Leaves the project's options in a parser's help, in their order, and puts Lightning's few last.

    Args:
        parser: The command's, which is not to parse any more.
        command: How it is typed.
        what: What it does.
        presets: Names that --config takes.
    """
    parser.usage = f"{command} [--config PRESET] [--quick] [options]"
    parser.description = f"{what[:1].upper()}{what[1:]}. --quick shortens it to a first look."
    parser.epilog = f"{command} --help-all lists Lightning's options, too."
    for action in parser._actions:
        section, _, name = action.dest.partition(".")
        words = OF_LIGHTNINGS.get(action.dest)
        if words:
            action.help = words.format(presets=", ".join(presets))
        elif section in OURS:
            if not name:  # a file for the section alone
                action.help = argparse.SUPPRESS
        elif section in ("trainer", "checkpoint", "early_stopping", "weights_only"):
            action.help = argparse.SUPPRESS

    def place(group: argparse._ArgumentGroup) -> int:
        sections = {action.dest.partition(".")[0] for action in group._group_actions}
        for number, (name, title) in enumerate(OURS.items()):
            if name in sections and not any(action.dest == "model.seed" for action in group._group_actions):
                group.title = title
                return number
        return -1 if "config" in sections else len(OURS)

    parser._action_groups.sort(key=place)
