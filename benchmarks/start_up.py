"""How long a command takes to answer that needs no meta-training, beside `import torch` alone.

    python benchmarks/start_up.py [--repeats 5]

Commands and the import alternate, each a process of its own; the median of each is taken, and a ratio is its
time over that of the import.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

IMPORT = ("-c", "import torch")
COMMANDS = ("info", "--help", "reproduce --help", "fit --config qudratic")


def seconds(*arguments: str) -> float:
    """Wall-clock of one process, whatever it answers."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], capture_output=True, check=False)
    return time.perf_counter() - start


def main() -> None:
    """Prints a row for the import and one for each command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    programs = {"import torch": IMPORT} | {
        f"python -m l2l_lightning {command}": ("-m", "l2l_lightning", *command.split())
        for command in COMMANDS
    }
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(repeats + 1):
        for name, arguments in programs.items():
            times[name].append(seconds(*arguments))
    # The first of each fills the file cache.
    medians = {name: statistics.median(found[1:]) for name, found in times.items()}
    for name, median in medians.items():
        print(f"{name:<45} {median:6.2f} s {median / medians['import torch']:6.2f}")


if __name__ == "__main__":
    main()
