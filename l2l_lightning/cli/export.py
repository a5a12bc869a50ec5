"""The command `export`: a checkpoint's rule as a file to share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from l2l_lightning.cli.parser import CommandParser
from l2l_lightning.extras import needed_by
from l2l_lightning.program import program


def main(arguments: Sequence[str]) -> None:
    """Writes the rule and its card, and says how to load it."""
    parser = CommandParser("export", "Writes a checkpoint's rule, and beside it a card, as files to share.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="of a run: checkpoints/best-….ckpt")
    parser.add_argument("file", metavar="FILE", help="what to write, ending in .safetensors")
    parser.add_argument(
        "--trust", default="", help="modules of yours, separated by commas, that the checkpoint may name"
    )
    parser.add_argument("--force", action="store_true", help="write over what is there")
    options = parser.parse_args(arguments)
    with needed_by(f"{program()} export"):
        from l2l_lightning.training.export import export_rule
    trust = [module for module in options.trust.split(",") if module]
    card = export_rule(options.checkpoint, options.file, trust, options.force)
    training, trusted = card["meta_training"], f", trust={trust}" if trust else ""
    done, total = training["best_meta_step"], training["meta_steps"]
    averaged = ", averaged" if training["averaged"] else ""
    print(
        f"{card['rule']['class']}, φ of meta-step {done} of {total}{averaged}: "
        f"{options.file}, with its card {Path(options.file).with_suffix('.json')}\n"
        f"In Python: LearnedOptimizer(parameters, l2l_lightning.load({options.file!r}{trusted}))"
    )
