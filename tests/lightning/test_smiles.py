"""Smiles: three layouts of generated images against the tensors they were made of, and every user's error."""

import numpy as np
import pytest
import torch
from PIL import Image

from l2l_lightning.data import DataCorruptedError, DataNotFoundError, load_images

COUNT = 14
LABELS = [int(i % 3 == 0) for i in range(COUNT)]
SIZES = [(28, 28), (97, 61), (64, 130), (200, 33), (29, 27)]
LINES = [f"{label} 0.05 -0.11 0.02" for label in LABELS]


def picture(number):
    """An image's channels [3, H, W] uint8: smooth waves, so that JPEG keeps them, of every image its own."""
    width, height = SIZES[number % len(SIZES)]
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    waves = [np.sin(2 * (number + 1) * x + c) + np.cos((number + 2) * y - c) for c in range(3)]
    return torch.from_numpy((127.5 + 60 * np.stack(waves)).astype(np.uint8))


def expected(channels):
    """28x28 grey values in [0, 1] of channels [3, H, W], by PyTorch's own antialiased resizing."""
    luma = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    grey = torch.einsum("c,chw->hw", luma, channels.double())
    resized = torch.nn.functional.interpolate(
        grey[None, None], size=(28, 28), mode="bilinear", antialias=True, align_corners=False
    )
    return (resized / 255).flatten().float()


def write(path, number, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(picture(number).permute(1, 2, 0).numpy()).convert(mode)
    image.save(path, **({"quality": 98, "subsampling": 0} if path.suffix.lower() == ".jpg" else {}))


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def genki_4k(folder):
    for number in range(COUNT):
        write(folder / "files" / f"file{number + 1:04d}.jpg", number)
    write_lines(folder / "labels.txt", LINES)
    return "GENKI-4K layout"


def genki_r2009a(folder):
    subset = folder / "Subsets" / "GENKI-4K"
    # In no order, and beside images that are of other subsets.
    numbers = [(5 * i) % COUNT for i in range(COUNT)]
    for number in range(COUNT + 3):
        write(folder / "files" / f"file{number:016d}.jpg", number)
    write_lines(subset / "GENKI-4K_Images.txt", [f"file{number:016d}.jpg" for number in numbers])
    write_lines(subset / "GENKI-4K_Labels.txt", [LINES[number] for number in numbers])
    return "GENKI-R2009a layout"


def class_folders(folder):
    modes = ["RGB", "L", "RGBA", "CMYK"]
    for number, label in enumerate(LABELS):
        suffix, mode = [(".jpg", "RGB"), (".PNG", modes[number % 3]), (".tiff", "RGB")][number % 3]
        write(folder / ("grin" if label else "frown") / f"{number:02d}{suffix}", number, mode)
    (folder / "grin" / "Thumbs.db").write_bytes(b"no image")
    (folder / "grin" / "._00.jpg").write_bytes(b"no image")
    (folder / ".cache").mkdir()
    (folder / "readme.txt").write_text("about")
    return "class folders frown and grin"


@pytest.mark.parametrize("enclosed", [False, True], ids=["", "enclosed"])
@pytest.mark.parametrize("layout", [genki_4k, genki_r2009a, class_folders])
def test_every_layout_gives_all_images_with_their_labels(layout, enclosed, tmp_path):
    kind = layout(tmp_path / "inside" if enclosed else tmp_path)
    if enclosed:
        (tmp_path / "__MACOSX").mkdir()
    splits = load_images("smiles", tmp_path)
    assert [len(images) for images in splits] == [10, 2, 2]
    pixels = torch.cat([images.pixels for images in splits])
    labels = torch.cat([images.labels for images in splits])
    assert (pixels.shape, pixels.dtype, labels.dtype) == ((COUNT, 784), torch.float32, torch.int64)
    for images in splits:
        assert images.source == f"smiles at {tmp_path} ({kind}, 14 images)"
        assert images.num_classes == 2
    wanted = torch.stack([expected(picture(number)) for number in range(COUNT)])
    nearest = torch.cdist(wanted, pixels, p=torch.inf)
    # Each image is there once; JPEG and rounding to 8 bits cost two grey levels.
    assert nearest.argmin(1).sort().values.tolist() == list(range(COUNT))
    assert nearest.min(1).values.max() < 2.5 / 255
    assert labels[nearest.argmin(1)].tolist() == LABELS


def test_the_splits_depend_on_nothing_but_the_names(tmp_path):
    class_folders(tmp_path / "a")
    for path in sorted((tmp_path / "a").rglob("*"), reverse=True):  # another order on the disk
        if path.is_file():
            target = tmp_path / "b" / path.relative_to(tmp_path / "a")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    for ours, theirs in zip(*(load_images("smiles", tmp_path / name) for name in "ab"), strict=True):
        assert torch.equal(ours.pixels, theirs.pixels)
        assert torch.equal(ours.labels, theirs.labels)


def test_the_root_may_be_a_variable_of_its_own(tmp_path, monkeypatch):
    genki_4k(tmp_path)
    # Labels may come from another system.
    (tmp_path / "labels.txt").write_bytes(("\ufeff" + "\r\n".join(LINES) + "\r\n\r\n").encode())
    monkeypatch.setenv("L2L_DATA", str(tmp_path))
    with pytest.raises(DataNotFoundError, match=r"set --data.root \(or the variable L2L_SMILES\) to it"):
        load_images("smiles")
    monkeypatch.setenv("L2L_SMILES", str(tmp_path))
    splits = load_images("smiles")
    assert len(splits.train) == 10
    assert sum(int(images.labels.sum()) for images in splits) == sum(LABELS)
    with pytest.raises(DataNotFoundError):  # an explicit root comes first
        load_images("smiles", tmp_path / "elsewhere")


def test_a_root_without_smiles_says_what_was_looked_for(tmp_path):
    (tmp_path / "files").mkdir()
    for root, part in (
        (tmp_path / "nowhere", "nowhere is not a folder"),
        (tmp_path, "labels.txt and files/"),
        (tmp_path, "Subsets/GENKI-4K/ and files/"),
        (tmp_path, "two folders of images, one per class"),
    ):
        with pytest.raises(DataNotFoundError) as caught:
            load_images("smiles", root)
        for words in (part, str(root), "--data.root (or the variable L2L_SMILES)"):
            assert words in str(caught.value)


def test_a_folder_that_may_not_be_read_is_an_error(tmp_path, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(type(tmp_path), "iterdir", refuse)
    with pytest.raises(DataNotFoundError, match=r"may not be read \(--data.root .*Permission denied"):
        load_images("smiles", tmp_path)


def file(root, number):
    return root / "files" / f"file{number:04d}.jpg"


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def swap_line(path, number, line):
    lines = path.read_text().splitlines()
    lines[number - 1] = line
    write_lines(path, lines)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: file(root, 14).unlink(), r"labels.txt has 14 lines and .*files has 13 images"),
        (lambda root: write(file(root, 15), 1), r"labels.txt has 14 lines and .*files has 15 images"),
        (
            lambda root: file(root, 3).rename(root / "files" / "face.jpg"),
            r"labels.txt, line 3: its image .*file0003.jpg is missing",
        ),
        (
            lambda root: swap_line(root / "labels.txt", 4, "2 0.1 0.1 0.1"),
            r"labels.txt, line 4: must begin with 1 \(smiles\) or 0 .*, got '2 0.1 0.1 0.1'",
        ),
        (lambda root: swap_line(root / "labels.txt", 2, ""), "labels.txt, line 2: .*, got ''"),
        (lambda root: (root / "labels.txt").write_bytes(b"\xff\xd8" * 99), "labels.txt, line 1: must begin"),
        (lambda root: truncate(file(root, 5)), r"file0005.jpg cannot be read as an image \(.*truncated"),
        (lambda root: file(root, 6).write_bytes(b""), "file0006.jpg cannot be read as an image"),
        (lambda root: file(root, 7).write_text("<html>404"), "file0007.jpg cannot be read as an image"),
    ],
    ids=["fewer", "more", "renamed", "label", "blank", "binary", "truncated", "empty", "text"],
)
def test_a_damaged_archive_names_the_file_and_the_line(damage, message, tmp_path):
    genki_4k(tmp_path)
    damage(tmp_path)
    with pytest.raises(DataCorruptedError, match=message):
        load_images("smiles", tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("Images", lambda lines: lines[1:], DataCorruptedError, "Images.txt has 13 .*Labels.txt has 14"),
        ("Images", lambda lines: ["no.jpg", *lines[1:]], DataCorruptedError, "line 1: no image 'no.jpg' in"),
        ("Images", lambda lines: [*lines[:-1], lines[0]], DataCorruptedError, "line 14: .* is on line 1 too"),
        ("Labels", lambda lines: ["-1", *lines[1:]], DataCorruptedError, "Labels.txt, line 1: must begin"),
        ("Labels", None, DataNotFoundError, "Labels.txt is missing from the GENKI-R2009a release"),
    ],
    ids=["fewer", "missing", "twice", "label", "no-labels"],
)
def test_a_damaged_release_names_the_file_and_the_line(name, change, error, message, tmp_path):
    genki_r2009a(tmp_path)
    path = tmp_path / "Subsets" / "GENKI-4K" / f"GENKI-4K_{name}.txt"
    lines = path.read_text().splitlines()
    path.unlink()
    if change:
        write_lines(path, change(lines))
    with pytest.raises(error, match=message):
        load_images("smiles", tmp_path)


def test_class_folders_are_two_and_not_empty(tmp_path):
    class_folders(tmp_path)
    write(tmp_path / "neutral" / "a.jpg", 0)
    with pytest.raises(DataCorruptedError, match=r"3 class folders \(frown, grin, neutral\), .* 2 classes"):
        load_images("smiles", tmp_path)
    for path in (tmp_path / "neutral" / "a.jpg", *(tmp_path / "grin").iterdir()):
        path.unlink()
    (tmp_path / "neutral").rmdir()
    with pytest.raises(DataCorruptedError, match=r"the class folder .*grin has no images \(.bmp, .jpeg"):
        load_images("smiles", tmp_path)


def test_sixteen_bits_are_refused_rather_than_clipped_and_five_images_are_too_few(tmp_path):
    for number in range(5):
        write(tmp_path / ("grin" if number % 2 else "frown") / f"{number}.png", number)
    with pytest.raises(DataCorruptedError, match="has 5 images, and three splits need 6 at least"):
        load_images("smiles", tmp_path)
    Image.fromarray(np.full((30, 30), 40_000, np.uint16)).save(tmp_path / "grin" / "deep.png")
    with pytest.raises(DataCorruptedError, match=r"deep.png cannot be read .*more than 8 bits a channel"):
        load_images("smiles", tmp_path)
