"""What experiments need (trained rules, tuned baselines, losses), computed once and kept on disk.

Everything is kept under a hash of all that determines it: a command that was interrupted finds what is
there, experiments share what they have in common, and other settings never meet an old result.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple

import safetensors
from safetensors.torch import save as as_safetensors
from torch import Tensor

from l2l_lightning import pretrained
from l2l_lightning.class_paths import class_config
from l2l_lightning.comparison.baselines import (
    BASELINES,
    TunedBaseline,
    default_baselines,
    run_baseline,
)
from l2l_lightning.comparison.tuning import tune
from l2l_lightning.data import ImageSplits, load_images
from l2l_lightning.errors import WeightsError
from l2l_lightning.files import write_atomically
from l2l_lightning.provenance import origin
from l2l_lightning.reproduce.recipes import RECIPES, SNAPSHOTS
from l2l_lightning.reproduce.settings import Settings
from l2l_lightning.reproduce.training import Report, meta_train
from l2l_lightning.rollout.optimizees import Optimizees
from l2l_lightning.rollout.rollout import run_rule
from l2l_lightning.rules import Rule
from l2l_lightning.tasks import MNISTMLP
from l2l_lightning.tasks.base import Task
from l2l_lightning.training.presets import merged

SHIPPED_TUNING = "tuned_baselines.json"
"""The file beside this module with what the searches of a complete reproduction found."""

SHIPPED_CIFAR_TUNING = "tuned_baselines_cifar.json"
"""The same of `reproduce cifar`, which is no part of a complete one."""

CIFAR_FOLDER = "cifar-10-batches-py"
"""What torchvision unpacks CIFAR-10 to."""

REFERENCE_TASK, REFERENCE_HORIZON = MNISTMLP(), 100
"""The task and horizon that the "one for all" baselines are tuned on: those of the rule `lstm-mnist`."""

QUICK_TRAINING = {
    "model": {"horizon": 4, "unroll": 2, "num_tasks": 1, "num_validation_optimizees": 2},
    "data": {"num_rollouts": 2},
    "trainer": {"val_check_interval": 2},
}
"""The options that `quick` puts over a preset."""


@dataclass(frozen=True)
class Request:
    """An optimizer's losses on fresh test optimizees, which an experiment asks for."""

    task: Task
    optimizer: str
    """The name of a rule or of a baseline."""
    horizon: int
    num_optimizees: int
    tuning: Literal["tuned", "reference", "default"] = "tuned"
    """Where a baseline is tuned: on this task, on the reference task, or not: at PyTorch's default."""
    tuned_with: tuple[int, ...] = ()
    """The horizons that share the search for a baseline's setting; () is this request's alone."""
    tuned_on: Task | None = None
    """The task of the search for a baseline's setting; None is this request's."""

    @property
    def searched(self) -> tuple[int, ...]:
        """The horizons of the search for a baseline's setting."""
        return self.tuned_with or (self.horizon,)


class Optimizer(NamedTuple):
    """What a request runs."""

    identity: dict[str, Any]
    """All that tells it from others."""
    run: Callable[[Optimizees, int], Tensor]
    """(K optimizees, horizon) to the losses [horizon, K]; moves the optimizees."""


class ResultStore:
    """Answers requests; what it has answered once, in this run or an earlier one, it reads.

    Args:
        settings: How experiments are run.
        report: Told what is being computed.
    """

    def __init__(self, settings: Settings, report: Report = lambda text: None) -> None:
        self.settings = settings
        self.report = report
        self.out = Path(settings.out)
        self._splits: dict[str, ImageSplits] = {}

    def steps(self, number: int) -> int:
        """Returns a number of inner steps as it is or, with `quick`, a twentieth of it."""
        return max(2, number // 20) if self.settings.quick else number

    def count(self, number: int) -> int:
        """Returns a number of optimizees as it is or, with `quick`, 2."""
        return 2 if self.settings.quick else number

    def splits(self, dataset: str | None) -> ImageSplits | None:
        """Returns a data set's images; None is for a task without.

        Raises:
            DataNotFoundError: They are not where the settings say.
        """
        if dataset is not None and dataset not in self._splits:
            self._splits[dataset] = load_images(dataset, self.root(dataset))
        return None if dataset is None else self._splits[dataset]

    def root(self, dataset: str) -> str | None:
        """Returns the folder of a data set that the settings name, if they name one."""
        settings = self.settings
        roots = {"mnist": settings.data_root, "smiles": settings.smiles_root, "cifar10": self.cifar_root}
        return roots.get(dataset)

    @property
    def cifar_root(self) -> str | None:
        """The folder of CIFAR-10: the settings', or MNIST's if it is there too; None without a copy."""
        if self.settings.cifar_root:
            return self.settings.cifar_root
        beside = self.settings.data_root or os.environ.get("L2L_DATA")
        return beside if beside and (Path(beside).expanduser() / CIFAR_FOLDER).is_dir() else None

    @property
    def has_smiles(self) -> bool:
        """Whether there is a copy of GENKI-4K to measure on."""
        return bool(self.settings.smiles_root or os.environ.get("L2L_SMILES"))

    def source(self, dataset: str | None) -> str:
        """Says where the images come from, without the machine's paths."""
        splits = self.splits(dataset)
        if splits is None:
            return "none (synthetic task)"
        return f"{dataset}, {len(splits.train):,} + {len(splits.validation):,} + {len(splits.test):,} images"

    def data_source(self, task: Task) -> str:
        """Says where a task's examples come from: its own, or its data set's images."""
        return task.data_source or self.source(task.dataset)

    def rule(self, name: str) -> Rule:
        """Returns a trained rule: the package's, or one that is meta-trained here, if there is a recipe.

        Raises:
            WeightsError: It is to come from the package, and the package has none of that name.
        """
        parent, rollouts = SNAPSHOTS.get(name, (name, 0))
        if self.settings.from_pretrained or parent not in RECIPES:
            try:
                return pretrained.load(name)
            except WeightsError as error:
                raise WeightsError(f"{error} (leave out --from-pretrained to train it)") from error
        recipe, folder = RECIPES[parent], self.rule_folder(parent)
        options = merged(recipe.options, {"data": {"root": self.root(recipe.dataset)}})
        if recipe.task:
            options = merged(options, {"model": {"task": class_config(recipe.task(self.settings))}})
        if recipe.start:
            self.rule(recipe.start)
            start = str(self.rule_folder(recipe.start) / "rule.safetensors")
            options = merged(options, {"model": {"start_from": start}})
        rule = meta_train(
            recipe.preset,
            folder,
            seed=self.settings.seed,
            report=lambda text: self.report(f"meta-training {parent}, {text}"),
            options=merged(options, QUICK_TRAINING if self.settings.quick else {}),
            snapshots=[number for of, number in SNAPSHOTS.values() if of == parent],
        )
        snapshot = folder / f"after-{rollouts}.safetensors"
        return pretrained.load(snapshot) if snapshot.is_file() else rule  # a quick run may end before it

    def rule_folder(self, name: str) -> Path:
        """Returns where a rule's meta-training is kept."""
        quick, seed, recipe = self.settings.quick, self.settings.seed, RECIPES[name]
        kind = {"quick": quick, "seed": seed, "data": self.source(recipe.dataset)}
        if recipe.task:
            task = recipe.task(self.settings)
            kind |= {"task": class_config(task), "data": self.data_source(task)}
        return self.out / "rules" / f"{name}-{_digest(kind)}"

    def tuned(
        self, task: Task, horizons: tuple[int, ...], names: Sequence[str] = tuple(BASELINES)
    ) -> dict[int, dict[str, TunedBaseline]]:
        """Returns baselines' best learning rates and settings on a task, by horizon and name.

        With `from_pretrained` they are the package's, if it has a search for this task at all the horizons.
        """
        shipped = _shipped_searches() if self.settings.from_pretrained else {}
        keys = {horizon: tuning_key(task, horizon) for horizon in horizons}
        if shipped.keys() >= set(keys.values()):
            return {
                horizon: {row["baseline"]: TunedBaseline.from_json(row) for row in shipped[key]}
                for horizon, key in keys.items()
            }
        splits = self.splits(task.dataset)
        return tune(
            task,
            None if splits is None else splits.validation,
            horizons,
            self.settings.seed,
            num_optimizees=self.count(self.settings.num_tuning_optimizees),
            baselines=[BASELINES[name] for name in names],
            cache_dir=self.out / "tuning",
            progress=lambda name, rate, score: self.report(
                f"tuning {name} on {task.describe()}: learning rate {rate:g} gives {score:.3g}"
            ),
        )

    def baseline(self, request: Request) -> TunedBaseline:
        """Returns the baseline that a request names, at the learning rate and setting that it asks for."""
        if request.tuning == "default":
            return default_baselines()[request.optimizer]
        if request.tuning == "reference":
            request = Request(REFERENCE_TASK, request.optimizer, self.steps(REFERENCE_HORIZON), 0)
        task, name = request.tuned_on or request.task, request.optimizer
        return self.tuned(task, request.searched, [name])[request.horizon][name]

    def optimizer(self, request: Request) -> Optimizer:
        """Returns the optimizer that a request names; trains or tunes what that needs."""
        if request.optimizer in BASELINES:
            tuned = self.baseline(request)
            rate, setting = tuned.learning_rate, tuned.setting
            identity = {"baseline": request.optimizer, "learning_rate": rate, "setting": setting}
            return Optimizer(identity, functools.partial(run_baseline, tuned.baseline, rate, setting=setting))
        rule = self.rule(request.optimizer)
        identity = {"rule": request.optimizer, "phi": _phi_digest(rule)}
        return Optimizer(identity, functools.partial(run_rule, rule))

    def losses(self, request: Request) -> Tensor:
        """Returns f_t(θ_t) of every test optimizee, [horizon, K] float32; trains or tunes what that needs."""
        optimizer, run = self.optimizer(request)
        identity = {
            "task": class_config(request.task),
            "data": self.data_source(request.task),
            "horizon": request.horizon,
            "num_optimizees": request.num_optimizees,
            "seed": self.settings.seed,
            "optimizer": optimizer,
        }
        path = self.out / "losses" / f"{_digest(identity)}.safetensors"
        if (kept := _read_losses(path, identity)) is not None:
            return kept
        self.report(f"{request.optimizer} on {request.task.describe()}, {request.horizon} steps")
        splits, chosen = self.splits(request.task.dataset), range(request.num_optimizees)
        images = None if splits is None else splits.test
        optimizees = Optimizees(request.task, images, self.settings.seed, "test", chosen)
        losses = run(optimizees, request.horizon).detach().contiguous()
        metadata = {"identity": json.dumps(identity, sort_keys=True)}
        write_atomically(path, as_safetensors({"losses": losses}, metadata))
        return losses

    def provenance(self, tasks: Iterable[Task]) -> dict[str, Any]:
        """Returns what every result file says of its origin, the tasks' examples among it."""
        return {
            "seed": self.settings.seed,
            **origin("cpu"),
            "data": sorted({self.data_source(task) for task in tasks}),
            "from_pretrained": self.settings.from_pretrained,
            "quick": self.settings.quick,
            "num_tuning_optimizees": self.count(self.settings.num_tuning_optimizees),
        }


def tuning_key(task: Task, horizon: int) -> str:
    """Returns the key of a search among the shipped ones."""
    return f"{task.describe()} for {horizon} steps"


@functools.cache
def _shipped_searches() -> dict[str, list[dict[str, Any]]]:
    searches: dict[str, list[dict[str, Any]]] = {}
    for name in (SHIPPED_TUNING, SHIPPED_CIFAR_TUNING):
        file = resources.files("l2l_lightning.reproduce").joinpath(name)
        searches |= json.loads(file.read_text(encoding="utf-8"))["searches"]
    return searches


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _phi_digest(rule: Rule) -> str:
    digest = hashlib.sha256(json.dumps(rule.config(), sort_keys=True).encode())
    for value in rule.state_dict().values():
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def _read_losses(path: Path, identity: dict[str, Any]) -> Tensor | None:
    """Returns the losses kept in a file, or None if it is missing, damaged or about something else."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            if json.loads((file.metadata() or {})["identity"]) != identity:
                return None
            losses: Tensor = file.get_tensor("losses")
            return losses
    except (OSError, KeyError, ValueError, safetensors.SafetensorError):
        return None
