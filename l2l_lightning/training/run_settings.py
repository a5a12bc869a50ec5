"""What a run was configured with, as plain values: for loggers, and for the summary of its comparison."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import Logger

from l2l_lightning.comparison.settings import computing, flat, plain
from l2l_lightning.provenance import commit, versions

if TYPE_CHECKING:
    from l2l_lightning.training.data_module import MetaData
    from l2l_lightning.training.meta_learner import MetaLearner


def run_settings(model: MetaLearner, data: MetaData, options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns nested plain values: every option that is known, else the learner's, the data's and the seed.

    Options that say where a run is written to are left out (`settings.computing`).

    Args:
        model: The learner.
        data: Its data.
        options: The command line's, as in config.yaml; {} where there is none.
    """
    try:
        learner: Any = model.settings()
    except TypeError as error:  # a rule or task that cannot be written down can be trained all the same
        learner = str(error)
    known = {"seed_everything": model.seed, "model": learner, "data": data.settings()}
    return computing(plain({**known, **options}))


def log_settings(
    loggers: Iterable[Logger], model: MetaLearner, data: MetaData, options: Mapping[str, Any]
) -> None:
    """Hands a run's settings to its loggers as hyperparameters, by the names of the command line's options.

    Options that are not set are left out; commit, versions and the data's source are added.
    """
    loggers = list(loggers)
    if not loggers:
        return
    origin = {"commit": commit(), "versions": versions(), "data_source": data.source}
    settings = flat(run_settings(model, data, options) | origin)
    for logger in loggers:
        logger.log_hyperparams({name: value for name, value in settings.items() if value is not None})
