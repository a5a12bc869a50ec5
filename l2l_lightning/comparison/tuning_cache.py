"""Finished searches on disk: a JSON file for each baseline and horizon, found by all that determines it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from l2l_lightning.comparison.baselines import Baseline, Setting, TunedBaseline
from l2l_lightning.files import write_json
from l2l_lightning.provenance import origin, versions
from l2l_lightning.rollout.optimizees import Optimizees

_NAME, _KEYS = re.compile(r".+-[0-9a-f]{12}\.json"), {"search", "fingerprint", "origin"}
"""What the name of a search's file is like, and what is in it beside the result."""


def kept_searches(folder: Path) -> list[Path]:
    """Returns the files in a folder that a TuningCache has written, and none of anybody else's."""
    found = []
    for path in sorted(folder.glob("*.json")):
        with contextlib.suppress(OSError, ValueError):
            if _NAME.fullmatch(path.name) and json.loads(path.read_text(encoding="utf-8")).keys() >= _KEYS:
                found.append(path)
    return found


class TuningCache:
    """Keeps the searches on one task with one seed in a folder.

    A file is named by a hash of all that determines the search's result: the task, the data, the optimizer
    with its grid and settings, the horizon, the seed and the number of optimizees. A task's configuration
    doesn't hold its code, and a function of the user's can change under its name: so the mean loss and
    gradient norm at θ0 are kept too, and must come out the same. (The loss alone would not do, as every
    classifier starts near the logarithm of its number of classes.)

    Args:
        folder: Where the files are.
        optimizees: The tuning optimizees at θ0; one minibatch is taken from them.
        seed: What they were derived from.
    """

    def __init__(self, folder: Path | str, optimizees: Optimizees, seed: int) -> None:
        self.folder, self.optimizees, self.seed = Path(folder), optimizees, seed
        losses, grads = optimizees.losses_and_grads()
        self.at_start = {"loss": float(losses.mean()), "grad_norm": float(grads.norm(dim=1).mean())}

    def read(self, baseline: Baseline, horizon: int) -> TunedBaseline | None:
        """Returns the search that was kept; None without one, and with a warning if it cannot be used."""
        identity = self._identity(baseline, horizon)
        path = self._path(baseline, identity)
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept.pop("search") != identity:
                raise ValueError("it is about another search")
            kept.pop("origin")
            before = kept.pop("fingerprint")
            for name, value in self.at_start.items():
                # Devices and thread counts round differently; another task differs by far more.
                if not math.isclose(before[name], value, rel_tol=1e-3):
                    raise ValueError(f"the {name} at θ0 was {before[name]:g} and is {value:g}")
            return TunedBaseline.from_json(kept, {baseline.name: baseline})
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            warnings.warn(f"Tuning {baseline.name} again, as {path} cannot be used: {error!r}", stacklevel=3)
            return None

    def write(self, tuned: TunedBaseline, horizon: int) -> None:
        """Keeps a finished search, in place of what was there.

        Raises:
            OSError: The folder cannot be written.
        """
        identity = self._identity(tuned.baseline, horizon)
        found = {"task": self.optimizees.task.describe(), **origin(self.optimizees.device)}
        provenance = {"search": identity, "fingerprint": self.at_start, "origin": found}
        write_json(self._path(tuned.baseline, identity), tuned.as_json() | provenance)

    def _path(self, baseline: Baseline, identity: dict[str, Any]) -> Path:
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
        return self.folder / f"{type(self.optimizees.task).__name__.lower()}-{baseline.name}-{digest}.json"

    def _identity(self, baseline: Baseline, horizon: int) -> dict[str, Any]:
        """Returns all that determines a search's result, as plain JSON values."""
        task, images = self.optimizees.task, self.optimizees.images

        def hyperparameters(setting: Setting) -> dict[str, Any]:
            defaults = baseline.make([torch.zeros(1)], 1.0, **setting).defaults
            return {name: value for name, value in defaults.items() if name != "lr"}

        identity = {
            "task": f"{type(task).__module__}.{type(task).__qualname__}",
            "config": task.config(),
            "data_source": None if images is None else images.source,
            "num_images": None if images is None else len(images),
            "horizon": horizon,
            "seed": self.seed,
            "num_optimizees": len(self.optimizees),
            "dtype": str(self.optimizees.dtype),
            "optimizer": type(baseline.make([torch.zeros(1)], 1.0)).__name__,
            "hyperparameters": hyperparameters({}),
            "grid": baseline.learning_rates,
            "alternatives": [
                alternative._asdict() | {"hyperparameters": hyperparameters(alternative.setting)}
                for alternative in baseline.alternatives
            ],
            "package": versions()["l2l-lightning"],
        }
        plain: dict[str, Any] = json.loads(json.dumps(identity, default=str))
        return plain
