"""Fashion-MNIST, KMNIST, CIFAR-10 and SVHN: made files in their layouts, whole, missing and damaged."""

import hashlib
import pickle
import struct

import numpy as np
import pytest
import torch
import torchvision
from scipy.io import savemat
from torch.nn import functional as F

from l2l_lightning.data import DATA_SETS, DataCorruptedError, DataNotFoundError, Images, load_images
from l2l_lightning.rollout.optimizees import Optimizees, gather
from l2l_lightning.tasks import ImageMLP, ModuleTask

TRAIN, TEST = 60, 12
CLASSES = {
    "fashion-mnist": ("FashionMNIST", "Fashion-MNIST"),
    "kmnist": ("KMNIST", "KMNIST"),
    "cifar10": ("CIFAR10", "CIFAR-10"),
    "svhn": ("SVHN", "SVHN"),
}
"""torchvision's class, and what messages call it."""


@pytest.fixture(autouse=True)
def no_downloads(monkeypatch):
    for name, _ in CLASSES.values():
        refuse = lambda self: pytest.fail("a download was not asked for")  # noqa: E731
        monkeypatch.setattr(getattr(torchvision.datasets, name), "download", refuse)


class Made:
    """A data set of random images in torchvision's layout: `pixels` and `labels` of train and test."""

    def __init__(self, name, root, monkeypatch):
        rng = np.random.default_rng(0)
        self.name, self.root, self.patch = name, root, monkeypatch
        shape = DATA_SETS[name].image_shape
        self.pixels = [rng.integers(0, 256, (count, *shape), dtype=np.uint8) for count in (TRAIN, TEST)]
        self.labels = [np.arange(count) % 10 for count in (TRAIN, TEST)]
        self.write()

    def write(self):
        {"cifar10": self._write_cifar, "svhn": self._write_svhn}.get(self.name, self._write_idx)()
        self.know_checksums()

    @property
    def folder(self):
        inner = {"cifar10": "cifar-10-batches-py", "svhn": "."}
        return self.root / inner.get(self.name, f"{CLASSES[self.name][0]}/raw")

    @property
    def test_file(self):
        name = {"cifar10": "test_batch", "svhn": "test_32x32.mat"}.get(self.name, "t10k-labels-idx1-ubyte")
        return self.folder / name

    def _write_idx(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        for prefix, pixels, labels in zip(("train", "t10k"), self.pixels, self.labels, strict=True):
            for kind, array in (("images-idx3", pixels), ("labels-idx1", labels.astype(np.uint8))):
                header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
                (self.folder / f"{prefix}-{kind}-ubyte").write_bytes(header + array.tobytes())

    def _write_cifar(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        rows = [pixels.reshape(len(pixels), -1) for pixels in self.pixels]
        files = {f"data_batch_{n + 1}": (rows[0][n::5], self.labels[0][n::5]) for n in range(5)}
        for name, (data, labels) in (files | {"test_batch": (rows[1], self.labels[1])}).items():
            content = {"data": data, "labels": labels.tolist()}
            (self.folder / name).write_bytes(pickle.dumps(content))
        meta = {"label_names": [str(label) for label in range(10)]}
        (self.folder / "batches.meta").write_bytes(pickle.dumps(meta))

    def _write_svhn(self):
        for part, pixels, labels in zip(("train", "test"), self.pixels, self.labels, strict=True):
            ones_based = np.where(labels == 0, 10, labels)[:, None].astype(np.uint8)
            path = self.folder / f"{part}_32x32.mat"
            savemat(path, {"X": pixels.transpose(2, 3, 1, 0), "y": ones_based})

    def know_checksums(self):
        """Has torchvision take these files for the published ones; MNIST's have no checksums."""

        def md5(name):
            return hashlib.md5((self.folder / name).read_bytes()).hexdigest()

        datasets = torchvision.datasets
        if self.name == "cifar10":
            lists = [[f"data_batch_{n}" for n in range(1, 6)], ["test_batch"]]
            for attribute, names in zip(("train_list", "test_list"), lists, strict=True):
                self.patch.setattr(datasets.CIFAR10, attribute, [[name, md5(name)] for name in names])
            meta = {**datasets.CIFAR10.meta, "md5": md5("batches.meta")}
            self.patch.setattr(datasets.CIFAR10, "meta", meta)
        elif self.name == "svhn":
            files = {part: f"{part}_32x32.mat" for part in ("train", "test")}
            known = {part: ["http://nowhere", name, md5(name)] for part, name in files.items()}
            self.patch.setattr(datasets.SVHN, "split_list", known)

    def order(self):
        """In which the training images come: CIFAR-10's batch by batch."""
        by_batch = np.concatenate([np.arange(TRAIN)[n::5] for n in range(5)])
        return by_batch if self.name == "cifar10" else np.arange(TRAIN)


@pytest.fixture(params=CLASSES)
def made(request, tmp_path, monkeypatch):
    return Made(request.param, tmp_path, monkeypatch)


def test_a_root_is_split_into_five_sixths_one_sixth_and_the_test_set(made, monkeypatch):
    splits, shape = load_images(made.name, made.root), DATA_SETS[made.name].image_shape
    assert [len(split) for split in splits] == [50, 10, TEST]
    inputs = (torch.cat([splits.train.pixels, splits.validation.pixels]), splits.test.pixels)
    labels = (torch.cat([splits.train.labels, splits.validation.labels]), splits.test.labels)
    for part, order in enumerate([made.order(), np.arange(TEST)]):
        expected = torch.from_numpy(made.pixels[part][order]).float() / 255
        assert torch.equal(inputs[part].view(-1, *shape), expected)
        assert torch.equal(labels[part], torch.from_numpy(made.labels[part][order]))
    title = CLASSES[made.name][1]
    for split in splits:  # grey images are flat, as MNIST's
        assert split.pixels.shape[1:] == ((784,) if len(shape) == 2 else shape)
        assert (split.source, split.num_classes) == (f"{title} at {made.root} (60 + 12 images)", 10)
        assert split.pixels.is_contiguous()
    monkeypatch.setenv("L2L_DATA", str(made.root))
    assert torch.equal(load_images(made.name).test.pixels, splits.test.pixels)


def test_a_subset_of_classes_is_relabelled_in_the_order_given(made):
    images = load_images(made.name, made.root).test
    animals = images.of_classes([7, 1])
    is_of = (images.labels == 7) | (images.labels == 1)
    assert torch.equal(animals.pixels, images.pixels[is_of])
    assert animals.labels.tolist() == [{7: 0, 1: 1}[label] for label in images.labels[is_of].tolist()]
    assert (animals.num_classes, animals.source) == (2, f"{images.source}, classes 7, 1")
    for classes, message in (
        ([3, 10], r"no example of the classes \[10\]"),
        ([], "one class"),
        ([1, 1], "twice"),
    ):
        with pytest.raises(ValueError, match=message):
            images.of_classes(classes)


def test_a_missing_data_set_names_the_options_and_is_not_replaced(made, tmp_path):
    title = CLASSES[made.name][1]
    for root, said in ((None, "does not come with the package"), (tmp_path / "nowhere", "nowhere")):
        with pytest.raises(DataNotFoundError) as caught:
            load_images(made.name, root)
        message = str(caught.value)
        assert all(
            part in message for part in (title, "--data.root", "L2L_DATA", "--data.download true", said)
        )
        assert "\n" not in message
    made.test_file.unlink()
    with pytest.raises(DataNotFoundError, match=f"{title} is not in .*looked for {made.test_file.name} in"):
        load_images(made.name, made.root)


DAMAGES = {
    "cut": (lambda made: made.test_file.write_bytes(made.test_file.read_bytes()[:-40]), False),
    "empty": (lambda made: made.test_file.write_bytes(b""), False),
    "a page": (lambda made: made.test_file.write_bytes(b"<html>404</html>" * 100), False),
    # Files of the right checksum, as if they had been published so.
    "not its format": (lambda made: made.test_file.write_bytes(b"<html>404</html>" * 100), True),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_an_error_of_one_line(made, damage):
    change, checksums = DAMAGES[damage]
    change(made)
    if checksums:
        made.know_checksums()
    with pytest.raises(DataCorruptedError, match=r"the (test )?files of .* are corrupted") as caught:
        load_images(made.name, made.root)
    assert "--data.download true" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_too_little_memory_is_not_taken_for_damaged_files(made, monkeypatch):
    def read(self, root, **part):
        raise MemoryError("cannot allocate 150 MiB")

    monkeypatch.setattr(getattr(torchvision.datasets, CLASSES[made.name][0]), "__init__", read)
    with pytest.raises(MemoryError, match="cannot allocate 150 MiB"):
        load_images(made.name, made.root)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda made: made.labels.__setitem__(1, np.full(TEST, 11)), "a label of 11"),
        (lambda made: made.labels.__setitem__(1, np.arange(TEST - 1) % 10), "12 images and 11 labels"),
    ],
    ids=["label", "count"],
)
def test_wrong_labels_are_an_error(made, change, message):
    change(made)
    made.write()
    with pytest.raises(DataCorruptedError, match=f"the (test )?files of .*{message}"):
        load_images(made.name, made.root)


def test_downloads_when_asked_and_says_why_it_could_not(made, tmp_path):
    cls = getattr(torchvision.datasets, CLASSES[made.name][0])
    root, asked = tmp_path / "new", []

    def download(self):
        asked.append(self.root)
        Made(made.name, root, made.patch)

    root.mkdir()
    made.patch.setattr(cls, "download", download)
    assert len(load_images(made.name, root, download=True).train) == 50
    assert {*map(str, asked)} == {str(root)}

    def fail(self):
        raise RuntimeError("no route to host")

    made.patch.setattr(cls, "download", fail)
    with pytest.raises(DataNotFoundError, match=r"could not be downloaded to .*no route to host"):
        load_images(made.name, tmp_path / "other", download=True)


@pytest.mark.parametrize(("stride", "inputs"), [(1, 3072), (8, 48)])
def test_a_perceptron_reads_coloured_images_flat(stride, inputs):
    pixels = torch.rand(20, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images = Images(pixels, torch.arange(20) % 10, "random", 10)
    task = ImageMLP("cifar10", [], batch_size=6, init_std=0.1, stride=stride)
    assert task.num_coordinates == inputs * 10 + 10
    optimizees = Optimizees(task, images, 0, "train", [0, 1], dtype=torch.float64)
    (indices,) = optimizees.draw(1)
    losses, _ = task.losses_and_grads(optimizees.theta, gather(task, images, optimizees.theta, indices))
    for theta, row, loss in zip(optimizees.theta, indices, losses, strict=True):
        x = pixels[row][:, :, ::stride, ::stride].reshape(6, inputs).double()
        logits = x @ theta[:-10].view(inputs, 10) + theta[-10:]
        torch.testing.assert_close(loss, F.cross_entropy(logits, images.labels[row]), rtol=1e-12, atol=0)


def test_a_module_reads_coloured_images_in_their_own_shape_or_another(made):
    images = load_images(made.name, made.root).train
    own_shape = images.pixels.shape[1:]
    other = [3, 1024] if len(own_shape) == 3 else [1, 28, 28]
    indices = torch.tensor([[0, 3], [7, 3]])
    for image_shape, expected in ((None, own_shape), (other, other)):
        task = ModuleTask(
            lambda: torch.nn.Linear(1, 1), dataset=made.name, batch_size=2, image_shape=image_shape
        )
        inputs, labels = task.gather(indices, images)
        assert torch.equal(inputs, images.pixels[indices].reshape(2, 2, *expected))
        assert torch.equal(labels, images.labels[indices])
    task = ModuleTask(lambda: torch.nn.Linear(1, 1), image_shape=[5, 5])
    with pytest.raises(ValueError, match=r"image_shape must hold (784|3072) pixels, got \[5, 5\] \(.* at "):
        task.gather(indices, images)
