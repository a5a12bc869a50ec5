"""Makes what `reproduce cifar --from-pretrained` reads: trains its rules, tunes its baselines, keeps both.

    python benchmarks/make_cifar.py reproduction-cifar

The folder is a reproduction's, `reproduce --out`: what is there is not done again, and after an interruption
the same command goes on where it was. Rules are kept in `pretrained/experiments/`; how they were trained, and
the baselines' settings, beside those of a complete reproduction.
"""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from pathlib import Path

from make_pretrained import tuned_table

from l2l_lightning import pretrained
from l2l_lightning.files import write_json
from l2l_lightning.provenance import commit
from l2l_lightning.reproduce import result_store
from l2l_lightning.reproduce.cifar import CIFAR_EXPERIMENT
from l2l_lightning.reproduce.recipes import RECIPES
from l2l_lightning.reproduce.result_store import ResultStore
from l2l_lightning.reproduce.settings import Settings

NUM_TUNING_OPTIMIZEES = 1
"""Three panels need 500 runs of baselines, each of which takes many times as long as on a perceptron."""


def main() -> None:
    """Writes rules and tuned baselines into the package."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("reproduction", help="its --out folder")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    settings = Settings(out=args.reproduction, num_tuning_optimizees=NUM_TUNING_OPTIMIZEES)
    store = ResultStore(settings, lambda text: print(text, flush=True))
    package, trainings = Path(pretrained.__file__).parent / "experiments", {}
    for name in (name for name, recipe in RECIPES.items() if recipe.dataset == "colour-digits"):
        pretrained.save(store.rule(name), package / f"{name}.safetensors")
        training = store.rule_folder(name) / "training.json"
        trainings[name] = json.loads(training.read_text(encoding="utf-8"))
    document = {
        "data": store.source("colour-digits"),
        "seed": settings.seed,
        "num_tuning_optimizees": settings.num_tuning_optimizees,
        "commit": commit(),
        "rules": trainings,
        "searches": tuned_table(store, [CIFAR_EXPERIMENT]),
    }
    write_json(Path(result_store.__file__).parent / result_store.SHIPPED_CIFAR_TUNING, document)


if __name__ == "__main__":
    main()
