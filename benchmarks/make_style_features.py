"""Trains the small network of style transfer, whose weights ship with the package, in about a minute.

    python benchmarks/make_style_features.py

Another machine rounds differently, so that a file made there is another one: the results that are committed
are those of the file that is committed.
"""

import argparse
import hashlib
from pathlib import Path

from safetensors.torch import save

from l2l_lightning.files import write_atomically
from l2l_lightning.tasks.style import networks
from l2l_lightning.tasks.style.feature_training import train_features

OUTPUT = Path(networks.__file__).with_name(networks.SHIPPED)


def main() -> None:
    """Writes the weights and prints their size and hash."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    content = save(train_features(arguments.seed, progress=print).state_dict())
    write_atomically(arguments.output, content)
    print(f"{arguments.output}: {len(content):,} bytes, SHA-256 {hashlib.sha256(content).hexdigest()}")


if __name__ == "__main__":
    main()
