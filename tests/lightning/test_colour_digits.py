"""MNIST's digits on photographs: what they are made of, and that no split shares any of it."""

import numpy as np
import pytest
import torch

from l2l_lightning.data import DataNotFoundError, load_images


@pytest.fixture(scope="module")
def splits():
    return load_images("colour-digits")


def test_they_are_the_embedded_digits_in_the_format_of_cifar(splits):
    digits = load_images("mnist", None)
    for ours, theirs in zip(splits, digits, strict=True):
        assert ours.pixels.shape == (len(theirs), 3, 32, 32)
        assert ours.pixels.min() >= 0
        assert ours.pixels.max() <= 1
        assert torch.equal(ours.labels, theirs.labels)
        assert ours.num_classes == 10


def test_an_image_is_the_difference_of_a_piece_of_a_photograph_and_the_digit(splits):
    """Where the digit is 0, in the margin too, a piece of the split's own strip is to be seen unchanged."""
    from sklearn.datasets import load_sample_image

    photographs = [load_sample_image(name).astype(np.int64) for name in ("china.jpg", "flower.jpg")]
    digits = load_images("mnist", None)
    for name, (start, end) in {"train": (0, 4), "validation": (4, 5), "test": (5, 6)}.items():
        image = (getattr(splits, name).pixels[0] * 255).round().long().permute(1, 2, 0).numpy()
        digit = np.zeros((32, 32))
        digit[2:30, 2:30] = getattr(digits, name).pixels[0].view(28, 28).numpy()
        found = 0
        for photograph in photographs:
            width = photograph.shape[1]
            strip = photograph[:, start * width // 6 : end * width // 6]
            corner = (strip == image[0, 0]).all(-1)
            for top, left in zip(*corner.nonzero(), strict=True):
                piece = strip[top : top + 32, left : left + 32]
                if piece.shape == image.shape and (piece[0] == image[0]).all():
                    composed = np.abs(piece / 255 - digit[..., None])
                    np.testing.assert_allclose(image / 255, composed, atol=0.6 / 255)
                    found += 1
        assert found >= 1


def test_they_are_the_same_every_time(splits):
    again = load_images("colour-digits")
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(splits, again, strict=True))


def test_without_scikit_learn_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(DataNotFoundError, match="pip install scikit-learn pillow"):
        load_images("colour-digits")
    with pytest.raises(DataNotFoundError, match="cannot be downloaded"):
        load_images("colour-digits", "somewhere", download=True)
