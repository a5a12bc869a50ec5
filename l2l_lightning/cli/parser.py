"""The parser of the commands that need no Lightning."""

from __future__ import annotations

import argparse
from typing import NoReturn

from l2l_lightning.program import program


class CommandParser(argparse.ArgumentParser):
    """Parses a command's arguments; what is wrong with them is an `argparse.ArgumentError`, for one line.

    Args:
        command: The command's name.
        description: What it does.
    """

    def __init__(self, command: str, description: str) -> None:
        super().__init__(f"{program()} {command}", description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raises the error, where argparse would print two lines and exit."""
        raise argparse.ArgumentError(None, message)
