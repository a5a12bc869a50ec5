"""The LightningDataModule: which window of which rollout comes next, and the data that tasks draw from."""

from __future__ import annotations

import bisect
import itertools
import math
import os
from array import array
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock
from lightning.pytorch import LightningDataModule

from l2l_lightning.data import Examples, Splits, load_images, load_text
from l2l_lightning.data.data_sets import OWN
from l2l_lightning.data.loading import root_from_environment
from l2l_lightning.data.own import GIB, OwnData, check_own, load_own, recorded
from l2l_lightning.data.text import TextSymbols
from l2l_lightning.errors import DataError
from l2l_lightning.round_robin import turn
from l2l_lightning.tasks.base import Task
from l2l_lightning.training.data_settings import check_data_settings


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


class MetaData(LightningDataModule):
    """The data of a meta-training run: a data set that the task names, or data of the user's own.

    Of the user's own: `train`, `validation` and `test`, or `text`. The optimizees of training draw from
    train, those of validations and of the baselines' tuning from validation, and those of tests and
    comparisons from test. What is missing of validation and test is a sixth of train each, by a fixed
    permutation, and the source says so. They are for tasks whose data set is "own" or left to its default
    (ModuleTask).

    Args:
        root: Folder of the data set that the task names. MNIST, Fashion-MNIST, KMNIST, CIFAR-10 and SVHN: as
            torchvision lays them out; None is the variable L2L_DATA, or else, of MNIST, the real subset that
            the package ships. Smiles: GENKI-4K or two class folders; None is the variable L2L_SMILES. Digits
            need none.
        download: Let torchvision download what is missing under `root`.
        num_rollouts: Length of the meta-training: rollouts, each of `num_tasks` optimizees per process and of
            ceil(horizon / unroll) meta-steps.
        train: A map-style torch Dataset of pairs (input, target); a pair (inputs, targets) of tensors, [M, …]
            each, of any shape; Examples; a function without arguments that returns one of these, or its
            dotted path; or a folder that has a folder of images for each class, or such folders for train,
            validation and test.
        validation: The same, of held-out data to tune and choose a checkpoint on.
        test: The same, of held-out data to report on.
        text: A text file, whose first 80%, next 10% and last 10% are train, validation and test.
        text_length: L, the symbols of an input; the target is the L symbols from the second on.
        text_symbols: "characters", numbered as the training part has them (0 is any other), or "bytes".
        image_size: Height and width that images in class folders are resized to; None leaves them.
        memory_limit: GiB. A split that takes more is not kept in memory (Datasets, folders), but loaded by a
            DataLoader ahead of the minibatches that ask for it, with the same numbers; or not on a GPU (all
            else), but in the main memory.
        num_workers: Processes that load.

    Raises:
        DataNotFoundError: The data set is not where `root` says (when the data is loaded).
        DataCorruptedError: Its files cannot be read as images and labels (when the data is loaded).
        DataError: Data of the user's own cannot be used, or the task does not read it (when it is loaded).
        ValueError: num_rollouts is not in [1, 10⁷], another value is out of its range, or train, validation
            and test are not disjoint.
        TypeError: A value is of the wrong kind; the message names it.

    Example:
        >>> import torch
        >>> x = torch.randn(600, 3)
        >>> data = MetaData(train=(x, x.sum(-1)), num_rollouts=10)
        >>> from l2l_lightning import ModuleTask
        >>> data.load(ModuleTask(lambda: torch.nn.Linear(3, 1), torch.nn.functional.mse_loss))
        >>> [len(split) for split in data.splits]
        [400, 100, 100]
    """

    def __init__(
        self,
        root: str | None = None,
        download: bool = False,
        num_rollouts: int = 100,
        train: OwnData = None,
        validation: OwnData = None,
        test: OwnData = None,
        text: str | None = None,
        text_length: int = 64,
        text_symbols: TextSymbols = "characters",
        image_size: list[int] | None = None,
        memory_limit: float = 4.0,
        num_workers: int = 2,
    ) -> None:
        check_data_settings(locals())
        check_own(train=train, validation=validation, test=test)
        super().__init__()
        self.root = root
        self.download = download
        self.num_rollouts = num_rollouts
        self.text = text
        self.text_length = text_length
        self.text_symbols: TextSymbols = text_symbols
        self.image_size = image_size
        self.memory_limit = memory_limit
        self.num_workers = num_workers
        self.splits: Splits[Any] | None = None
        self._own: dict[str, OwnData] = {"train": train, "validation": validation, "test": test}
        self._dataset: str | None = None
        self._generated: str | None = None
        self._loaded_root = root
        self._on_device: dict[tuple[str, torch.device], Examples] = {}

    def __repr__(self) -> str:
        if self.splits is None:
            return f"MetaData(num_rollouts={self.num_rollouts}), nothing loaded"
        sizes = " + ".join(f"{len(split):,}" for split in self.splits)
        return f"MetaData(num_rollouts={self.num_rollouts}), {sizes} examples: {self.source}"

    __str__ = __repr__  # in place of Lightning's, which makes the dataloaders to print their lengths

    @property
    def has_own(self) -> bool:
        """Whether there is data of the user's own."""
        return self.text is not None or self._own["train"] is not None

    def load(self, task: Task) -> None:
        """Loads what the task needs, once; a task without a data set needs nothing."""
        name = self._name_for(task)
        self._generated = task.data_source
        if name in (None, self._dataset):
            return
        if name == OWN:
            self.splits = self._load_own()
        else:
            # The variable is looked up once, so that a checkpoint records the data it was trained on.
            root = self.root or root_from_environment(name)
            with _download_lock(root) if self.download and root else nullcontext():
                self.splits = load_images(name, root, self.download)
            self._loaded_root = root
        self._dataset = name
        self._on_device.clear()

    def _name_for(self, task: Task) -> str | None:
        """The data set to load for a task, OWN for the user's; None if it needs none."""
        if not self.has_own:
            if task.dataset == OWN:
                raise DataError(
                    f"{task.describe()} draws from data of your own, and there is none: give --data.train or "
                    "--data.text, in Python MetaData(train=…)"
                )
            return task.dataset
        if task.dataset == OWN or (task.dataset and task.accepts_own_data):
            return OWN
        given = "text" if self.text is not None else "train"
        reads = f"reads {task.dataset!r}" if task.dataset else "reads no data"
        raise DataError(
            f"{task.describe()} {reads}, and data of your own was given: leave out --data.{given} (null, if "
            "a checkpoint has it), or take a task that reads it: ModuleTask without dataset and sample"
        )

    def _load_own(self) -> Splits[Any]:
        if self.text is not None:
            return load_text(self.text, self.text_length, self.text_symbols)
        return load_own(self._own, self.image_size, self.memory_limit, self.num_workers)

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments as plain values; the root is the one that was loaded."""
        others = ("download", "num_rollouts", "text_length", "text_symbols", "memory_limit", "num_workers")
        return {
            "root": self._loaded_root,
            **{name: recorded(value) for name, value in self._own.items()},
            "text": None if self.text is None else str(Path(self.text).expanduser().resolve()),
            "image_size": None if self.image_size is None else list(self.image_size),
            **{name: getattr(self, name) for name in others},
        }

    @property
    def source(self) -> str:
        """Where the data came from, for the record."""
        if self.splits is None:
            return self._generated or "none (synthetic task)"
        source: str = self.splits.train.source
        return source

    def images(self, split: str, device: torch.device | str) -> Examples | None:
        """A split ("train", "validation", "test"), on a device if it fits; None for a synthetic task."""
        if self.splits is None:
            return None
        key = (split, torch.device(device))
        if key not in self._on_device:
            examples = getattr(self.splits, split)
            fits = examples.nbytes <= self.memory_limit * GIB
            self._on_device[key] = examples.to(device) if fits else examples
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
