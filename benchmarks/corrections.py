"""What an LSTM on top of "zero-shot" gains, where it was trained and elsewhere, as ratios of held-out losses.

    python benchmarks/corrections.py corrected-direction corrected-step-size [--json FILE]
    python -m l2l_lightning fit --config corrected_direction
    python benchmarks/corrections.py runs/corrected_direction/TIME/checkpoints/last.ckpt

In distribution: small problems that neither meta-training nor validation has drawn, at three horizons. Out of
it: the problems of `reproduce zero-shot` of up to so many steps, on its seeds. Every ratio is of the same θ0
and minibatches; below 1 the LSTM gains. Intervals are at 95%, over problems.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import quality_tables
import torch
from measuring import print_table, start_log, write_json

from l2l_lightning import MetaLearner, Optimizees, pretrained, run_rule
from l2l_lightning.provenance import origin
from l2l_lightning.reproduce.zero_shot import PROBLEMS
from l2l_lightning.reproduce.zero_shot.experiment import protocol
from l2l_lightning.reproduce.zero_shot.peers import learned
from l2l_lightning.reproduce.zero_shot.problem import make_problem
from l2l_lightning.reproduce.zero_shot.ratios import Ratio
from l2l_lightning.reproduce.zero_shot.runs import train
from l2l_lightning.reproduce.zero_shot.store import FLOOR
from l2l_lightning.reproduce.zero_shot.suite import one_thread
from l2l_lightning.rules import Rule
from l2l_lightning.tasks import SmallProblem
from l2l_lightning.tasks.small.families import FAMILIES

FRESH_SEED = 2 * 10**8
"""Problems from here on are neither training's nor validation's."""
HORIZONS = (100, 300, 1000)
BASE = "zero-shot"


def rule_of(name: str) -> Rule:
    """Returns a rule of the package, a file's or a checkpoint's."""
    return MetaLearner.from_checkpoint(name).rule if name.endswith(".ckpt") else pretrained.load(name)


def in_distribution(rule: Rule, seeds: int, optimizees: int) -> dict[str, torch.Tensor]:
    """Returns the log held-out losses [optimizees] of every small problem and horizon."""
    found = {}
    for family in FAMILIES:
        for seed in range(seeds):
            task = SmallProblem(family, FRESH_SEED + seed)
            for horizon in HORIZONS:
                ones = Optimizees(task, None, 0, "test", range(optimizees))
                run_rule(rule, ones, horizon)
                losses = ones.held_out_losses(None).nan_to_num(nan=torch.inf)
                found[f"{family} {seed} @{horizon}"] = losses.clamp(FLOOR, 1e8).log()
    return found


def out_of_distribution(rule: Rule, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Returns the log held-out losses [seeds] of every problem of the suite."""
    peer, seeds = learned(lambda: rule), protocol(0, quick=False).seeds
    found = {}
    for name in names:
        losses = [train(make_problem(name), peer, {}, seed, "test") for seed in seeds]
        found[name] = torch.tensor(losses).clamp(FLOOR, 1e8).log()
    return found


def main() -> None:
    """Prints the table of rules, and writes the JSON asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "rules", nargs="+", help="corrected rules: the package's, files, or checkpoints of runs"
    )
    parser.add_argument("--seeds", type=int, default=3, help="small problems of each family")
    parser.add_argument("--optimizees", type=int, default=4, help="of each small problem")
    parser.add_argument("--max-steps", type=int, default=600, help="of the suite's problems")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rules = {name: rule_of(name) for name in (BASE, *options.rules)}
    names = [name for name in PROBLEMS if make_problem(name).steps <= options.max_steps]
    print_row = start_log(["rule".ljust(40), "where".ljust(20), "ratio".ljust(24), "ahead".ljust(10)])
    base: dict[str, dict[str, torch.Tensor]] = {}
    rows = []
    with one_thread():
        for name, rule in rules.items():
            found = {
                "in distribution": in_distribution(rule, options.seeds, options.optimizees),
                "out of distribution": out_of_distribution(rule, names),
            }
            base = base or found
            for where, losses in found.items() if name != BASE else ():
                logs = {problem: logs - base[where][problem] for problem, logs in losses.items()}
                ratio, ahead = Ratio.of(list(logs.values())), sum(bool(x.mean() < 0) for x in logs.values())
                print_row([name, where, str(ratio), f"{ahead} of {len(logs)}"])
                by_problem = {problem: float(x.mean().exp()) for problem, x in logs.items()}
                row = {"rule": name, "config": rule.config(), "where": where}
                rows.append(row | ratio.as_json() | {"ahead": ahead, "by_problem": by_problem})
    document = {"origin": origin("cpu"), "base": BASE, "rows": rows}
    print_table(quality_tables.corrections(document))
    write_json(options.json, document)


if __name__ == "__main__":
    main()
