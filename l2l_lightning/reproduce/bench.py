"""What experiments ask for (trained rules, tuned baselines, losses), computed once and kept on disk.

Everything is kept under a hash of all that determines it: a command that was interrupted finds what is
there, experiments share what they have in common, and other settings never meet an old result.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import safetensors
import torch
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
from l2l_lightning.errors import CommandLineError, WeightsError
from l2l_lightning.files import write_atomically
from l2l_lightning.provenance import commit, device_name, versions
from l2l_lightning.reproduce.recipes import RECIPES, snapshot_of
from l2l_lightning.reproduce.settings import Settings
from l2l_lightning.reproduce.training import Report, meta_train
from l2l_lightning.rollout.optimizees import Optimizees
from l2l_lightning.rollout.rollout import run_rule
from l2l_lightning.rules import Rule
from l2l_lightning.tasks import MNISTMLP
from l2l_lightning.tasks.base import Task

SHIPPED_TUNING = "tuned_baselines.json"
"""Beside this module: what the searches of a complete reproduction found."""

REFERENCE_TASK, REFERENCE_HORIZON = MNISTMLP(), 100
"""What the "one for all" baselines are tuned on: the task that the rule `lstm-mnist` is trained on."""

RUNS_PER_SEARCH = 163
"""About how many settings and rates a search of all baselines tries: for the time left."""

Tuning = Literal["tuned", "reference", "default"]


class NotShippedError(CommandLineError):
    """`--from-pretrained` asks for something that the package does not hold; the message says what."""


@dataclass(frozen=True)
class Train:
    """A trained rule, by its name in RECIPES."""

    rule: str


@dataclass(frozen=True)
class Tune:
    """Every baseline's best learning rate and setting on a task, for each horizon."""

    task: Task
    horizons: tuple[int, ...]


@dataclass(frozen=True)
class Run:
    """An optimizer's losses on fresh test optimizees."""

    task: Task
    optimizer: str
    """A rule's name, or a baseline's."""
    horizon: int
    num_optimizees: int
    tuning: Tuning = "tuned"
    """For a baseline: tuned on this task and horizon, on the reference task, or PyTorch's default."""
    tuned_with: tuple[int, ...] = ()
    """The horizons of the search that its settings come from; () is this one's alone."""


Request = Train | Tune | Run


class Bench:
    """Answers requests; what it has answered once, in this run or an earlier one, it reads."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.out = Path(settings.out)
        self._splits: dict[str, ImageSplits] = {}

    # --- sizes

    def steps(self, number: int) -> int:
        """A number of inner steps, as it is or, with `quick`, a twentieth of it."""
        return max(2, number // 20) if self.settings.quick else number

    def count(self, number: int) -> int:
        """A number of optimizees, as it is or, with `quick`, 2."""
        return 2 if self.settings.quick else number

    # --- data

    def splits(self, dataset: str | None) -> ImageSplits | None:
        """A data set's images; None for a task without.

        Raises:
            DataNotFoundError: They are not where the settings say.
        """
        if dataset is None:
            return None
        if dataset not in self._splits:
            roots = {"mnist": self.settings.data_root, "smiles": self.settings.smiles_root}
            self._splits[dataset] = load_images(dataset, roots.get(dataset))
        return self._splits[dataset]

    @property
    def has_smiles(self) -> bool:
        """Whether there is a copy of GENKI-4K to measure on."""
        return bool(self.settings.smiles_root or os.environ.get("L2L_SMILES"))

    def source(self, dataset: str | None) -> str:
        """Where the test images come from, without the machine's paths."""
        splits = self.splits(dataset)
        if splits is None:
            return "none (synthetic task)"
        return f"{dataset}, {len(splits.train):,} + {len(splits.validation):,} + {len(splits.test):,} images"

    # --- requests

    def answer(self, request: Request, report: Report) -> Any:
        """Computes, or finds, what is asked for."""
        match request:
            case Train():
                return self.rule(request.rule, report)
            case Tune():
                return self.tuned(request, report)
            case Run():
                return self.losses(request, report)

    def seconds(self, request: Request) -> float:
        """What a request takes on two cores, if it is not answered yet: for the time left."""
        scale = 0.01 if self.settings.quick else 1.0
        match request:
            case Train(name):
                parent = snapshot_of(name)
                recipe = RECIPES[parent[0] if parent else name]
                return 0.1 if self.settings.from_pretrained else 60 * recipe.minutes * scale
            case Tune() if self._ships(request):
                return 0.1
            case Tune(task, horizons):
                runs = RUNS_PER_SEARCH * self.settings.num_tuning_optimizees
                return task.num_coordinates * max(horizons) * runs * 16e-9 * scale
            case Run(task, optimizer, horizon, number):
                cost = 75e-9 if optimizer not in BASELINES else 16e-9
                return 0.05 + task.num_coordinates * horizon * number * cost * scale

    def rule(self, name: str, report: Report = lambda fraction, text: None) -> Rule:
        """A trained rule.

        Raises:
            NotShippedError: It is to come from the package, and the package has none of that name.
        """
        if self.settings.from_pretrained:
            try:
                return pretrained.load(name)
            except WeightsError as error:
                raise NotShippedError(f"{error} (leave out --from-pretrained to train it)") from error
        parent = snapshot_of(name)
        recipe = RECIPES[parent[0] if parent else name]
        folder = self.rule_folder(parent[0] if parent else name)
        arguments = [f"--seed_everything={self.settings.seed}", *recipe.arguments]
        if self.settings.data_root:
            arguments.append(f"--data.root={self.settings.data_root}")
        if recipe.start:
            self.rule(recipe.start, report)
            arguments.append(f"--model.start_from={self.rule_folder(recipe.start) / 'rule.safetensors'}")
        if self.settings.quick:
            arguments += QUICK_TRAINING
        rule = meta_train(
            recipe.preset, folder, report=report, arguments=arguments, snapshots=recipe.snapshots
        )
        if parent and (snapshot := folder / f"after-{parent[1]}.safetensors").is_file():
            return pretrained.load(snapshot)
        return rule  # also where a quick run ended before the snapshot

    def rule_folder(self, name: str) -> Path:
        """Where a rule's meta-training is kept."""
        kind = self._digest({"quick": self.settings.quick, "seed": self.settings.seed, "data": self._mnist})
        return self.out / "rules" / f"{name}-{kind}"

    @functools.cached_property
    def _mnist(self) -> str:
        return self.source("mnist")

    def tuned(
        self, request: Tune, report: Report = lambda fraction, text: None
    ) -> dict[int, dict[str, TunedBaseline]]:
        """Every baseline at its best, by horizon and name."""
        if self._ships(request):
            return self._shipped_tuning(request)
        tried = 0

        def progress(name: str, rate: float, score: float) -> None:
            nonlocal tried
            tried += 1
            fraction = min(tried / RUNS_PER_SEARCH, 0.99)
            report(fraction, f"tuning {name}: learning rate {rate:g} gives {score:.3g}")

        splits = self.splits(request.task.dataset)
        return tune(
            request.task,
            None if splits is None else splits.validation,
            request.horizons,
            self.settings.seed,
            num_optimizees=self.count(self.settings.num_tuning_optimizees),
            cache_dir=self.out / "tuning",
            progress=progress,
        )

    def _ships(self, request: Tune) -> bool:
        """Whether the package's searches are wanted, and there are some for this task at these horizons."""
        keys = {tuning_key(request.task, horizon) for horizon in request.horizons}
        return self.settings.from_pretrained and keys <= _shipped_table().keys()

    def _shipped_tuning(self, request: Tune) -> dict[int, dict[str, TunedBaseline]]:
        table = _shipped_table()
        return {
            horizon: {
                row["baseline"]: TunedBaseline.from_json(row)
                for row in table[tuning_key(request.task, horizon)]
            }
            for horizon in request.horizons
        }

    def baseline(self, request: Run) -> TunedBaseline:
        """The baseline that a request names, at the learning rate and setting that it asks for."""
        if request.tuning == "default":
            return default_baselines()[request.optimizer]
        if request.tuning == "reference":
            horizon = self.steps(REFERENCE_HORIZON)
            return self.tuned(Tune(REFERENCE_TASK, (horizon,)))[horizon][request.optimizer]
        horizons = request.tuned_with or (request.horizon,)
        return self.tuned(Tune(request.task, horizons))[request.horizon][request.optimizer]

    def losses(self, request: Run, report: Report = lambda fraction, text: None) -> Tensor:
        """f_t(θ_t) of every test optimizee, [horizon, K] float32."""
        splits = self.splits(request.task.dataset)
        identity: dict[str, Any] = {
            "task": class_config(request.task),
            "data": self.source(request.task.dataset),
            "horizon": request.horizon,
            "num_optimizees": request.num_optimizees,
            "seed": self.settings.seed,
        }
        rule: Rule | None = None
        if request.optimizer in BASELINES:
            tuned = self.baseline(request)
            identity["optimizer"] = {
                "baseline": request.optimizer,
                "learning_rate": tuned.learning_rate,
                "setting": tuned.setting,
            }
        else:
            rule = self.rule(request.optimizer)
            identity["optimizer"] = {"rule": request.optimizer, "phi": _phi_digest(rule)}
        path = self.out / "losses" / f"{self._digest(identity)}.safetensors"
        kept = _read_losses(path, identity)
        if kept is not None:
            return kept
        report(0.0, f"{request.optimizer} on {request.task.describe()}, {request.horizon} steps")
        optimizees = Optimizees(
            request.task,
            None if splits is None else splits.test,
            self.settings.seed,
            "test",
            range(request.num_optimizees),
        )
        if rule is not None:
            losses = run_rule(rule, optimizees, request.horizon)
        else:
            losses = run_baseline(
                tuned.baseline, tuned.learning_rate, optimizees, request.horizon, setting=tuned.setting
            )
        metadata = {"identity": json.dumps(identity, sort_keys=True)}
        write_atomically(path, as_safetensors({"losses": losses.detach().contiguous()}, metadata))
        return losses.detach()

    @staticmethod
    def _digest(settings: dict[str, Any]) -> str:
        return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:12]

    # --- provenance

    def provenance(self, datasets: set[str | None]) -> dict[str, Any]:
        """What every result file says of its origin."""
        return {
            "seed": self.settings.seed,
            "commit": commit(),
            "device": device_name("cpu"),
            "threads": torch.get_num_threads(),
            "versions": versions(),
            "data": sorted({self.source(name) for name in datasets}),
            "from_pretrained": self.settings.from_pretrained,
            "quick": self.settings.quick,
            "num_tuning_optimizees": self.count(self.settings.num_tuning_optimizees),
        }


QUICK_TRAINING = [
    "--data.num_rollouts=2",
    "--model.horizon=4",
    "--model.unroll=2",
    "--model.num_tasks=1",
    "--model.num_validation_optimizees=2",
    "--trainer.val_check_interval=2",
]


def tuning_key(task: Task, horizon: int) -> str:
    """What the shipped searches are found by."""
    return f"{task.describe()} for {horizon} steps"


@functools.cache
def _shipped_table() -> dict[str, list[dict[str, Any]]]:
    file = resources.files("l2l_lightning.reproduce").joinpath(SHIPPED_TUNING)
    if not file.is_file():
        return {}
    table: dict[str, list[dict[str, Any]]] = json.loads(file.read_text(encoding="utf-8"))["searches"]
    return table


def _phi_digest(rule: Rule) -> str:
    digest = hashlib.sha256(json.dumps(rule.config(), sort_keys=True).encode())
    for value in rule.state_dict().values():
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def _read_losses(path: Path, identity: dict[str, Any]) -> Tensor | None:
    """The losses kept in a file; None if there is none, or it is damaged or about something else."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            if json.loads((file.metadata() or {})["identity"]) != identity:
                return None
            losses: Tensor = file.get_tensor("losses")
            return losses
    except (OSError, KeyError, ValueError, safetensors.SafetensorError):
        return None
