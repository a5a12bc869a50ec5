"""Images: disjoint splits, an embedded subset that is what it says, and errors that name the options."""

import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from l2l_lightning.data import DataCorruptedError, DataNotFoundError, load_images

TRAIN, TEST = 600, 100


@pytest.fixture(autouse=True)
def no_root(monkeypatch):
    monkeypatch.delenv("L2L_DATA", raising=False)


@pytest.fixture
def no_download(monkeypatch):
    def refuse(self):
        raise AssertionError("a download was not asked for")

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", refuse)


def write_idx(path, array):
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.tobytes())


def write_mnist(root):
    """MNIST's four files with random images, 600 and 100."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for prefix, count in (("train", TRAIN), ("t10k", TEST)):
        write_idx(raw / f"{prefix}-images-idx3-ubyte", rng.integers(0, 256, (count, 28, 28), dtype=np.uint8))
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", rng.integers(0, 10, count, dtype=np.uint8))
    return raw


@pytest.fixture
def root(tmp_path, no_download):
    write_mnist(tmp_path)
    return tmp_path


def hashes(images):
    return [hashlib.sha256(image.numpy().tobytes()).digest() for image in images.pixels]


def assert_disjoint(splits):
    everything = [digest for images in splits for digest in hashes(images)]
    assert len(set(everything)) == len(everything)


def assert_well_formed(images):
    assert images.pixels.shape == (len(images), 784)
    assert images.pixels.dtype == torch.float32
    assert images.labels.shape == (len(images),)
    assert images.labels.dtype == torch.int64
    assert 0 <= images.pixels.min() <= images.pixels.max() <= 1


# The embedded subset


def test_embedded_subset_is_disjoint_and_balanced(no_download):
    splits = load_images("mnist")
    assert [len(images) for images in splits] == [4000, 1000, 1000]
    assert_disjoint(splits)
    for images in splits:
        assert_well_formed(images)
        assert images.labels.bincount().tolist() == [len(images) // 10] * 10
        assert images.source == "embedded MNIST subset (5,000 + 1,000 images)"


def test_embedded_subset_holds_real_digits():
    train, _, test = load_images("mnist")
    # MNIST's mean grey value, and a nearest-centroid classifier's known 82% on it.
    assert abs(train.pixels.mean() - 0.1307) < 0.003
    centroids = torch.stack([train.pixels[train.labels == digit].mean(0) for digit in range(10)])
    predicted = torch.cdist(test.pixels, centroids).argmin(-1)
    assert (predicted == test.labels).float().mean() > 0.78


def test_embedded_subset_is_small_and_attributed():
    import l2l_lightning.data

    folder = Path(l2l_lightning.data.__file__).parent
    assert (folder / "mnist_subset.npz").stat().st_size < 2_000_000
    attribution = (folder / "ATTRIBUTION.md").read_text()
    for word in ("LeCun", "Cortes", "Burges", "CC BY-SA 3.0"):
        assert word in attribution


# The whole data set under a root


def test_a_root_is_split_into_five_sixths_one_sixth_and_the_test_set(root):
    splits = load_images("mnist", root)
    assert [len(images) for images in splits] == [500, 100, 100]
    assert_disjoint(splits)
    for images in splits:
        assert_well_formed(images)
        assert images.source == f"MNIST at {root} (600 + 100 images)"
    whole = torchvision.datasets.MNIST(root, train=True)
    pixels = torch.cat([splits.train.pixels, splits.validation.pixels])
    assert torch.equal((pixels * 255).round().byte().view(-1, 28, 28), whole.data)
    assert torch.equal(torch.cat([splits.train.labels, splits.validation.labels]), whole.targets)


def test_the_variable_stands_in_for_the_root(root, monkeypatch, tmp_path):
    monkeypatch.setenv("L2L_DATA", str(root))
    assert load_images("mnist").train.source.startswith(f"MNIST at {root}")
    with pytest.raises(DataNotFoundError):  # an explicit root comes first
        load_images("mnist", tmp_path / "elsewhere")
    monkeypatch.setenv("L2L_DATA", "")
    assert load_images("mnist").train.source.startswith("embedded")


def test_a_missing_data_set_names_the_options_and_is_not_replaced(tmp_path, no_download, monkeypatch):
    for arguments in (("mnist", tmp_path), ("mnist", str(tmp_path / "nowhere"))):
        with pytest.raises(DataNotFoundError) as caught:
            load_images(*arguments)
        message = str(caught.value)
        for part in ("--data.root", "--data.download true", "L2L_DATA", "MNIST/raw", str(arguments[1])):
            assert part in message
        assert "train-images-idx3-ubyte" in message
    monkeypatch.setenv("L2L_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError):
        load_images("mnist")


def test_only_the_missing_files_are_listed(root):
    (root / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataNotFoundError, match=r"looked for t10k-labels-idx1-ubyte in"):
        load_images("mnist", root)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def empty(path):
    path.write_bytes(b"")


def scribble(path):
    path.write_bytes(b"<html>404</html>" * 100)


@pytest.mark.parametrize("damage", [truncate, empty, scribble])
@pytest.mark.parametrize(("file", "kind"), [("train-images-idx3", "training"), ("t10k-labels-idx1", "test")])
def test_damaged_files_are_an_error(root, damage, file, kind):
    damage(root / "MNIST" / "raw" / f"{file}-ubyte")
    with pytest.raises(DataCorruptedError, match=rf"the {kind} files of MNIST in .*raw are corrupted"):
        load_images("mnist", root)


@pytest.mark.parametrize(
    ("file", "array", "message"),
    [
        ("t10k-images-idx3", np.zeros((TEST, 8, 8), np.uint8), r"images of \[8, 8\] pixels"),
        ("t10k-labels-idx1", np.zeros(TEST - 1, np.uint8), "100 images and 99 labels"),
        ("t10k-labels-idx1", np.full(TEST, 10, np.uint8), "a label of 10"),
    ],
)
def test_files_of_another_data_set_are_an_error(root, file, array, message):
    write_idx(root / "MNIST" / "raw" / f"{file}-ubyte", array)
    with pytest.raises(DataCorruptedError, match=message):
        load_images("mnist", root)


def test_downloads_when_asked(tmp_path, monkeypatch):
    calls = []

    def download(self):
        calls.append(self.root)
        write_mnist(Path(self.root))

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", download)
    assert len(load_images("mnist", tmp_path, download=True).train) == 500
    assert [Path(call) for call in calls] == [tmp_path]


def test_a_failed_download_is_an_error(tmp_path, monkeypatch):
    def download(self):
        raise RuntimeError("no route to host")

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", download)
    with pytest.raises(DataNotFoundError, match=r"could not be downloaded to .*: no route to host"):
        load_images("mnist", tmp_path, download=True)


def test_a_download_needs_a_folder():
    with pytest.raises(
        DataNotFoundError, match=r"--data.download true needs .* --data.root or the variable L2L_DATA"
    ):
        load_images("mnist", download=True)


def test_an_unknown_name_is_an_error():
    with pytest.raises(ValueError, match="unknown data set 'cifar'; available: 'mnist'"):
        load_images("cifar")


# Images


def test_gather_takes_any_shape_of_indices():
    images = load_images("mnist").test
    indices = torch.tensor([[3, 5, 3], [0, 999, 1]])
    pixels, labels = images.gather(indices)
    assert torch.equal(pixels, images.pixels[indices])
    assert torch.equal(labels, images.labels[indices])


def test_sampling_is_with_replacement_and_reproducible():
    images = load_images("mnist").test
    draws = [images.sample_indices(5000, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*draws)
    assert 0 <= draws[0].min() <= draws[0].max() < len(images)
    assert len(draws[0].unique()) < 5000
