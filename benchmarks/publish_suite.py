"""Puts what `reproduce zero-shot` has found of the peers into the package, for `--from-pretrained`.

python -m l2l_lightning reproduce zero-shot
python benchmarks/publish_suite.py reproduction/zero-shot/entries
"""

from __future__ import annotations

import argparse
from pathlib import Path

from l2l_lightning.reproduce.zero_shot.published import FILE, publish


def main() -> None:
    """Adds the entries of the folders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="folders of entries")
    for folder in parser.parse_args().folders:
        print(f"{FILE.name} has {publish(folder)} entries")


if __name__ == "__main__":
    main()
