"""Draws the MNIST subset that ships with the package: `python benchmarks/make_mnist_subset.py --root DIR`.

DIR holds the whole of MNIST (DIR/MNIST/raw). The file written is the same, byte for byte, every time: images
are ranked by the SHA-256 of their pixels, which no random generator's version can change, and the first few
of every digit are kept, from each of the three splits of `load_images`. A rule that is meta-trained on the
subset has therefore seen none of the whole's validation and test images, and the other way round.
"""

import argparse
import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from l2l_lightning.data import Images, load_images

PER_DIGIT = {"train": 400, "validation": 100, "test": 100}
OUTPUT = Path(__file__).parents[1] / "l2l_lightning" / "data" / "mnist_subset.npz"


def draw(split: Images, per_digit: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Images [10 per_digit, 28, 28] and labels [10 per_digit], in the order that they have in the split."""
    images = split.pixels.mul(255).round().byte().reshape(-1, 28, 28).numpy()
    labels = split.labels.byte().numpy()
    ranked = sorted(range(len(images)), key=lambda i: hashlib.sha256(images[i].tobytes()).digest())
    kept = sorted(i for digit in range(10) for i in [j for j in ranked if labels[j] == digit][:per_digit])
    return images[kept], labels[kept]


def main() -> None:
    """Writes the subset and prints its size and hash."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", required=True, help="folder that holds MNIST/raw")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()

    splits = load_images("mnist", arguments.root)
    arrays = {}
    for name, per_digit in PER_DIGIT.items():
        arrays[f"{name}_images"], arrays[f"{name}_labels"] = draw(getattr(splits, name), per_digit)
    np.savez_compressed(arguments.output, **arrays)
    content = arguments.output.read_bytes()
    print(f"{arguments.output}: {len(content):,} bytes, SHA-256 {hashlib.sha256(content).hexdigest()}")


if __name__ == "__main__":
    main()
