"""Images: disjoint splits, an embedded subset that is what it says, and errors that name the options."""

import gzip
import struct
import sys
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from l2l_lightning.data import DATA_SETS, DataCorruptedError, DataNotFoundError, load_images
from l2l_lightning.tasks import MNISTMLP, ImageMLP, Quadratic
from l2l_lightning.training.data_module import MetaData

TRAIN, TEST = 600, 100


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


@pytest.fixture(autouse=True)
def downloads(monkeypatch):
    """What a download does: none is to be tried unless a test puts its own here."""
    doing = {"download": lambda root: pytest.fail("a download was not asked for")}
    monkeypatch.setattr(torchvision.datasets.MNIST, "download", lambda self: doing["download"](self.root))
    return doing


@pytest.fixture
def root(tmp_path):
    write_mnist(tmp_path)
    return tmp_path


def assert_splits(splits, counts, source, dataset="mnist"):
    """Disjoint sets of images, well formed, as is known of the data set, that say where they are from."""
    pixels, classes = DATA_SETS[dataset].num_pixels, DATA_SETS[dataset].num_classes
    assert [len(images) for images in splits] == counts
    everything = torch.cat([images.pixels for images in splits])
    assert len(everything.unique(dim=0)) == len(everything)
    for images in splits:
        assert (images.pixels.shape, images.pixels.dtype) == ((len(images), pixels), torch.float32)
        assert (images.labels.shape, images.labels.dtype) == ((len(images),), torch.int64)
        assert 0 <= images.pixels.min() <= images.pixels.max() <= 1
        assert (images.source, images.num_classes) == (source, classes)
        assert len(images.labels.unique()) == classes


# MNIST


def test_the_embedded_subset_is_disjoint_balanced_and_real():
    splits = load_images("mnist")
    assert_splits(splits, [4000, 1000, 1000], "embedded MNIST subset (5,000 + 1,000 images)")
    for images in splits:
        assert images.labels.bincount().tolist() == [len(images) // 10] * 10
    # MNIST's mean grey value, and a nearest-centroid classifier's known 82% on it.
    train, _, test = splits
    assert abs(train.pixels.mean() - 0.1307) < 0.003
    centroids = torch.stack([train.pixels[train.labels == digit].mean(0) for digit in range(10)])
    predicted = torch.cdist(test.pixels, centroids).argmin(-1)
    assert (predicted == test.labels).float().mean() > 0.78


def test_the_embedded_subset_is_small_and_attributed():
    folder = resources.files("l2l_lightning.data")
    assert folder.joinpath("mnist_subset.npz").stat().st_size < 2_000_000
    attribution = folder.joinpath("ATTRIBUTION.md").read_text()
    assert all(word in attribution for word in ("LeCun", "Cortes", "Burges", "CC BY-SA 3.0"))


def test_a_root_is_split_into_five_sixths_one_sixth_and_the_test_set(root, monkeypatch):
    splits = load_images("mnist", root)
    assert_splits(splits, [500, 100, 100], f"MNIST at {root} (600 + 100 images)")
    whole = torchvision.datasets.MNIST(root, train=True)
    pixels = torch.cat([splits.train.pixels, splits.validation.pixels])
    assert torch.equal((pixels * 255).round().byte().view(-1, 28, 28), whole.data)
    assert torch.equal(torch.cat([splits.train.labels, splits.validation.labels]), whole.targets)
    # The variable stands in for the root; an explicit root comes first, and an empty variable is none.
    monkeypatch.setenv("L2L_DATA", str(root))
    assert load_images("mnist").train.source == splits.train.source
    with pytest.raises(DataNotFoundError):
        load_images("mnist", root / "elsewhere")
    monkeypatch.setenv("L2L_DATA", "")
    assert load_images("mnist").train.source.startswith("embedded")


def test_a_missing_data_set_names_the_options_and_is_not_replaced(tmp_path, monkeypatch):
    for where in (tmp_path, str(tmp_path / "nowhere")):
        with pytest.raises(DataNotFoundError) as caught:
            load_images("mnist", where)
        named = ("--data.root", "--data.download true", "L2L_DATA", "MNIST/raw", str(where))
        assert all(part in str(caught.value) for part in (*named, "train-images-idx3-ubyte"))
    monkeypatch.setenv("L2L_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError):
        load_images("mnist")


TRAIN_IMAGES, TEST_IMAGES, TEST_LABELS = "train-images-idx3", "t10k-images-idx3", "t10k-labels-idx1"
TRAINING, TESTING = (f"the {kind} files of MNIST in .*raw are corrupted" for kind in ("training", "test"))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (TRAIN_IMAGES, lambda bytes: bytes[:-100], TRAINING),
        (TEST_LABELS, lambda bytes: bytes[:-100], TESTING),
        (TRAIN_IMAGES, lambda _: b"", TRAINING),
        (TEST_LABELS, lambda _: b"<html>404</html>" * 100, TESTING),
        (TEST_IMAGES, np.zeros((TEST, 8, 8), np.uint8), r"images of \[8, 8\] pixels"),
        (TEST_LABELS, np.zeros(TEST - 1, np.uint8), "100 images and 99 labels"),
        (TEST_LABELS, np.full(TEST, 10, np.uint8), "a label of 10"),
        (TEST_LABELS, None, "looked for t10k-labels-idx1-ubyte in"),
    ],
    ids=["cut images", "cut labels", "empty", "a page", "small images", "few labels", "a label", "missing"],
)
def test_damaged_foreign_and_missing_files_are_an_error(root, file, content, message):
    path = root / "MNIST" / "raw" / f"{file}-ubyte"
    match content:
        case None:
            path.unlink()
        case np.ndarray():
            write_idx(path, content)
        case _:
            path.write_bytes(content(path.read_bytes()))
    with pytest.raises(DataNotFoundError if content is None else DataCorruptedError, match=message):
        load_images("mnist", root)


def test_downloads_when_asked(tmp_path, downloads):
    asked = []
    downloads["download"] = lambda root: (asked.append(Path(root)), write_mnist(Path(root)))
    assert len(load_images("mnist", tmp_path, download=True).train) == 500
    assert asked == [tmp_path]


def test_a_download_that_fails_or_cannot_be_is_an_error(tmp_path, downloads):
    def fail(root):
        raise RuntimeError("no route to host")

    downloads["download"] = fail
    with pytest.raises(DataNotFoundError, match=r"could not be downloaded to .*: no route to host"):
        load_images("mnist", tmp_path, download=True)
    with pytest.raises(DataNotFoundError, match=r"--data.download true needs .* --data.root or .* L2L_DATA"):
        load_images("mnist", download=True)
    for name in ("digits", "smiles"):
        with pytest.raises(DataNotFoundError, match=rf"{name!r} cannot be downloaded.*--data.download false"):
            load_images(name, tmp_path, download=True)
    with pytest.raises(
        ValueError, match=r"unknown data set 'cifar'; available: 'mnist', 'digits', .*'cifar10'"
    ):
        load_images("cifar")


# Digits


def test_digits_are_scikit_learns_and_every_one_is_in_one_split(tmp_path, monkeypatch):
    """Against scikit-learn's file, read without its code; another data set's root changes nothing."""
    monkeypatch.setenv("L2L_DATA", str(tmp_path / "nowhere"))
    splits = load_images("digits", tmp_path / "nowhere")
    assert_splits(splits, [1199, 299, 299], "digits 8x8 of scikit-learn (1,797 images)", "digits")
    file = resources.files("sklearn.datasets.data").joinpath("digits.csv.gz")
    table = np.loadtxt(gzip.decompress(file.read_bytes()).decode().splitlines(), delimiter=",")
    label_of = {tuple(row[:64] / 16): row[64] for row in table}
    assert len(label_of) == 1797
    for images in splits:
        for image, label in zip(images.pixels.tolist(), images.labels.tolist(), strict=True):
            assert label_of.pop(tuple(image)) == label  # sixteenths are exact in float32
    assert label_of == {}


def test_the_splits_of_the_digits_are_the_same_everywhere():
    """A permutation that changed would put what one version trains on into another's test split."""
    assert [images.labels[:8].tolist() for images in load_images("digits")] == [
        [0, 6, 3, 8, 1, 8, 4, 1],
        [5, 3, 5, 5, 4, 6, 1, 6],
        [7, 0, 4, 2, 1, 0, 2, 6],
    ]


def test_a_data_set_names_the_package_that_reads_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ModuleNotFoundError, match=r"torchvision: pip install 'l2l-lightning\[data\]'"):
        load_images("mnist", tmp_path)


# The data module


def test_the_data_module_loads_what_the_task_names(root, monkeypatch):
    data = MetaData(root=str(root))
    data.load(MNISTMLP())
    assert data.source == f"MNIST at {root} (600 + 100 images)"
    assert data.images("test", "cpu").pixels.shape == (100, 784)
    loaded = data.splits
    data.load(ImageMLP("mnist", [5]))
    data.load(Quadratic())
    assert data.splits is loaded
    data.load(ImageMLP("digits"))
    assert data.source.startswith("digits")
    assert data.images("test", "cpu").pixels.shape == (299, 64)
    # It records the root that the data set's variable names.
    monkeypatch.setenv("L2L_DATA", str(root))
    for task, recorded in ((MNISTMLP(), str(root)), (ImageMLP("digits"), None), (Quadratic(), None)):
        data = MetaData()
        data.load(task)
        assert data.settings()["root"] == recorded
    with pytest.raises(DataNotFoundError, match="L2L_SMILES"):
        MetaData().load(ImageMLP("smiles"))


# Images


def test_images_are_gathered_selected_and_sampled():
    images = load_images("mnist").test
    indices = torch.tensor([[3, 5, 3], [0, 999, 1]])
    pixels, labels = images.gather(indices)
    assert torch.equal(pixels, images.pixels[indices])
    assert torch.equal(labels, images.labels[indices])
    draws = [images.sample_indices(5000, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*draws)
    assert 0 <= draws[0].min() <= draws[0].max() < len(images)
    assert len(draws[0].unique()) < 5000  # with replacement
    for copy in (images.to("cpu"), images.select(indices[0])):
        assert (copy.source, copy.num_classes) == (images.source, 10)
    assert torch.equal(copy.pixels, images.pixels[indices[0]])
