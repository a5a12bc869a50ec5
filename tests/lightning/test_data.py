"""Images: disjoint splits, an embedded subset that is what it says, and errors that name the options."""

import gzip
import hashlib
import struct
import subprocess
import sys
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from l2l_lightning.data import DATA_SETS, DataCorruptedError, DataNotFoundError, Images, load_images
from l2l_lightning.data.splits import split_images
from l2l_lightning.tasks import MNISTMLP, ImageMLP, Quadratic
from l2l_lightning.training.data_module import MetaData

TRAIN, TEST = 600, 100


@pytest.fixture(autouse=True)
def no_root(monkeypatch):
    for variable in ("L2L_DATA", "L2L_SMILES"):
        monkeypatch.delenv(variable, raising=False)


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
    with pytest.raises(ValueError, match="unknown data set 'cifar'; available: 'mnist', 'digits', 'smiles'"):
        load_images("cifar")


# Digits


def the_digits():
    """scikit-learn's file, read without scikit-learn's code: 64 grey values and the label on every line."""
    file = resources.files("sklearn.datasets.data").joinpath("digits.csv.gz")
    table = np.loadtxt(gzip.decompress(file.read_bytes()).decode().splitlines(), delimiter=",")
    return torch.from_numpy(table[:, :64]) / 16, torch.from_numpy(table[:, 64]).long()


def test_digits_are_scikit_learns_and_every_one_is_in_one_split():
    splits = load_images("digits")
    assert [len(images) for images in splits] == [1199, 299, 299]
    pixels, labels = the_digits()
    label_of = {tuple(image): label for image, label in zip(pixels.tolist(), labels.tolist(), strict=True)}
    assert len(label_of) == 1797
    for images in splits:
        assert (images.pixels.shape, images.pixels.dtype) == ((len(images), 64), torch.float32)
        assert images.labels.dtype == torch.int64
        assert images.source == "digits 8x8 of scikit-learn (1,797 images)"
        assert images.num_classes == 10
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


def test_another_data_sets_root_does_not_break_digits(tmp_path, monkeypatch):
    monkeypatch.setenv("L2L_DATA", str(tmp_path / "nowhere"))
    assert len(load_images("digits").train) == 1199
    assert len(load_images("digits", tmp_path / "nowhere").train) == 1199


def test_digits_without_scikit_learn_name_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(
        DataNotFoundError, match=r"'digits' comes with scikit-learn.*pip install scikit-learn"
    ):
        load_images("digits")


@pytest.mark.parametrize("name", ["digits", "smiles"])
def test_only_mnist_can_be_downloaded(name, tmp_path):
    with pytest.raises(DataNotFoundError, match=rf"{name!r} cannot be downloaded.*--data.download false"):
        load_images(name, tmp_path, download=True)


def test_data_imports_without_the_packages_that_read_images():
    blocked = "import sys; sys.modules.update(dict.fromkeys(('sklearn', 'torchvision', 'PIL')))\n"
    code = f"{blocked}from l2l_lightning.data import load_images; load_images('mnist')"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


# Splits


@pytest.mark.parametrize("count", [6, 11, 12, 100])
def test_splits_are_disjoint_and_cover(count):
    numbers = torch.arange(count)
    splits = split_images(Images(numbers.float().unsqueeze(1), numbers, "numbers", count))
    sixth = count // 6
    assert [len(images) for images in splits] == [count - 2 * sixth, sixth, sixth]
    everything = torch.cat([images.labels for images in splits])
    assert torch.equal(everything.sort().values, numbers)
    assert not torch.equal(everything, numbers)
    for images in splits:
        assert torch.equal(images.pixels[:, 0].long(), images.labels)
        assert (images.source, images.num_classes) == ("numbers", count)


# The data module


def test_every_data_set_is_what_is_known_of_it():
    for name in ("mnist", "digits"):
        for images in load_images(name):
            assert images.pixels.shape[1] == DATA_SETS[name].num_pixels
            assert images.num_classes == DATA_SETS[name].num_classes == len(images.labels.unique())


def test_the_data_module_loads_what_the_task_names(root):
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


def test_the_data_module_records_the_root_that_its_variable_named(root, tmp_path, monkeypatch):
    monkeypatch.setenv("L2L_DATA", str(root))
    for task, recorded in ((MNISTMLP(), str(root)), (ImageMLP("digits"), None), (Quadratic(), None)):
        data = MetaData()
        data.load(task)
        assert data.settings()["root"] == recorded
    with pytest.raises(DataNotFoundError, match="L2L_SMILES"):
        MetaData().load(ImageMLP("smiles"))


def test_the_command_line_meta_trains_on_digits(tiny_fit):
    folder = tiny_fit("--model.task=ImageMLP", "--model.task.dataset=digits", "--model.task.batch_size=8")
    assert "digits 8x8 of scikit-learn" in (folder / "summary.json").read_text()


def test_the_command_line_says_what_smiles_need(fails, tmp_path):
    arguments = ["fit", "--model.task=ImageMLP", "--model.task.dataset=smiles", "--wandb=off"]
    printed = fails(*arguments, f"--trainer.default_root_dir={tmp_path}")
    assert "error: the data set 'smiles' is a folder of your own" in printed
    assert "--data.root (or the variable L2L_SMILES)" in printed


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


def test_what_is_known_of_images_goes_where_they_go():
    images = Images(torch.rand(4, 3), torch.tensor([0, 1, 0, 1]), "four random vectors", 2)
    for copy in (images.to("cpu"), images.select(torch.tensor([3, 0]))):
        assert (copy.source, copy.num_classes) == (images.source, 2)
    assert torch.equal(images.select(torch.tensor([3, 0])).pixels, images.pixels[[3, 0]])
