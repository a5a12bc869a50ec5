"""The LightningDataModule: which window of which rollout comes next, and the images that tasks draw from."""

from __future__ import annotations

import bisect
import itertools
import math
import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock
from lightning.pytorch import LightningDataModule

from l2l_lightning.checks import check_switches, check_whole_numbers
from l2l_lightning.data import ImageSplits, load_images
from l2l_lightning.data.images import Images
from l2l_lightning.data.loading import root_from_environment
from l2l_lightning.round_robin import turn
from l2l_lightning.tasks.base import Task


class WindowIndex(NamedTuple):
    """Which window a training step runs: T = `length` inner steps after the rollout's first `start`."""

    rollout: int
    start: int
    length: int


def listed(value: Any) -> list[Any]:
    """A setting that may be one value or a list of them, as a list."""
    return list(value) if isinstance(value, list | tuple) else [value]


def rollout_horizon(horizons: Sequence[int], rollout: int) -> int:
    """Inner steps of a run's rollout: one of the horizons, which take turns in a shuffled order."""
    return horizons[turn(rollout, len(horizons), "horizon")]


class WindowLoader:
    """Every window of every rollout in order; resumable between any two windows.

    It is sized and stateful, which is what makes Lightning's resume in mid-rollout exact. With several unroll
    lengths the run is divided evenly between them, in their order; a rollout's last window may be shorter.
    """

    def __init__(self, num_rollouts: int, horizon: int | Sequence[int], unrolls: Sequence[int]) -> None:
        self._horizons = listed(horizon)
        self._unrolls = unrolls
        self._num_rollouts = num_rollouts
        lengths = (math.ceil(horizon / unroll) for horizon, unroll in map(self._shape, range(num_rollouts)))
        self._ends = array("q", itertools.accumulate(lengths))  # windows up to each rollout's end
        self._next = 0

    def _shape(self, rollout: int) -> tuple[int, int]:
        unroll = self._unrolls[rollout * len(self._unrolls) // self._num_rollouts]
        return rollout_horizon(self._horizons, rollout), unroll

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> WindowIndex:
        rollout = bisect.bisect_right(self._ends, range(len(self))[index])
        horizon, unroll = self._shape(rollout)
        start = (index - (self._ends[rollout - 1] if rollout else 0)) * unroll
        return WindowIndex(rollout, start, min(unroll, horizon - start))

    def __iter__(self) -> Iterator[WindowIndex]:
        while self._next < len(self):
            self._next += 1
            yield self[self._next - 1]
        self._next = 0

    def state_dict(self) -> dict[str, Any]:
        return {"next": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._next = state["next"]


def _download_lock(root: str) -> AbstractContextManager[Any]:
    """Lets the processes of a run download one after another, so that all but the first find the files."""
    folder = Path(root).expanduser()
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    # To a folder that cannot be written nobody downloads; what is missing in it, the loader says.
    return FileLock(folder / ".download.lock") if os.access(folder, os.W_OK) else nullcontext()


def check_data_settings(settings: Mapping[str, Any]) -> None:
    """Raises TypeError or ValueError for settings that MetaData's constructor does not take."""
    root = settings["root"]
    if root is not None and not isinstance(root, str | os.PathLike):
        raise TypeError(f"root must be a folder's path or None, got {root!r}")
    check_switches(download=settings["download"])
    check_whole_numbers(1, 10**7, num_rollouts=settings["num_rollouts"])


class MetaData(LightningDataModule):
    """The data of a meta-training run.

    Args:
        root: Folder of the data set that the task names. MNIST: as torchvision lays it out; None is the
            variable L2L_DATA, or else the real subset that the package ships. Smiles: GENKI-4K or two class
            folders; None is the variable L2L_SMILES. Digits need none.
        download: Let torchvision download what is missing of MNIST under `root`.
        num_rollouts: Length of the meta-training: rollouts, each of `num_tasks` optimizees per process and of
            ceil(horizon / unroll) meta-steps.

    Raises:
        DataNotFoundError: The data set is not where `root` says (when the data is loaded).
        DataCorruptedError: Its files cannot be read as images and labels (when the data is loaded).
        ValueError: num_rollouts is not in [1, 10⁷].
        TypeError: num_rollouts is not a whole number, download no switch, or root no path.
    """

    def __init__(self, root: str | None = None, download: bool = False, num_rollouts: int = 100) -> None:
        check_data_settings(locals())
        super().__init__()
        self.root = root
        self.download = download
        self.num_rollouts = num_rollouts
        self.splits: ImageSplits | None = None
        self._dataset: str | None = None
        self._loaded_root = root
        self._on_device: dict[tuple[str, torch.device], Images] = {}

    def load(self, task: Task) -> None:
        """Loads what the task needs, once; a task without a data set needs nothing."""
        if task.dataset in (None, self._dataset):
            return
        # The variable is looked up once, so that a checkpoint records the data it was trained on.
        root = self.root or root_from_environment(task.dataset)
        with _download_lock(root) if self.download and root else nullcontext():
            self.splits = load_images(task.dataset, root, self.download)
        self._dataset, self._loaded_root = task.dataset, root
        self._on_device.clear()

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments as plain values; the root is the one that was loaded."""
        return {"root": self._loaded_root, "download": self.download, "num_rollouts": self.num_rollouts}

    @property
    def source(self) -> str:
        """Where the data came from, for the record."""
        return "none (synthetic task)" if self.splits is None else self.splits.train.source

    def images(self, split: str, device: torch.device | str) -> Images | None:
        """A split ("train", "validation", "test") on a device; None for a synthetic task."""
        if self.splits is None:
            return None
        key = (split, torch.device(device))
        if key not in self._on_device:
            self._on_device[key] = getattr(self.splits, split).to(device)
        return self._on_device[key]

    def setup(self, stage: str) -> None:
        assert self.trainer is not None
        self.load(self.trainer.lightning_module.task)  # type: ignore[arg-type]

    def train_dataloader(self) -> WindowLoader:
        assert self.trainer is not None
        return self.windows(self.trainer.lightning_module)

    def windows(self, model: Any) -> WindowLoader:
        """Every window of a run of this length on a MetaLearner."""
        return WindowLoader(self.num_rollouts, model.horizons, model.unrolls)

    def num_windows(self, model: Any, trainer: Any) -> int:
        """Windows of a run on a MetaLearner, as many as a trainer is limited to."""
        whole_run, limit = len(self.windows(model)), trainer.limit_train_batches  # of overfit_batches too
        return min(whole_run, limit) if isinstance(limit, int) else int(whole_run * limit)

    def val_dataloader(self) -> list[int]:
        return [0]

    def test_dataloader(self) -> list[int]:
        return [0]
