"""What products rounded to bfloat16 gain on the CPU, and what they cost: rules with precision "bf16".

    python benchmarks/rounded_products.py [--json FILE]

Times are paired: float32 and bf16 take turns in one process, and a ratio is the median over the turns of
float32's time over bf16's. They are a thread's own, without those in which another process had its core: of
`step` and `bptt` by units, layers and inputs, and of a meta-step as meta_step.py has it, on one thread.
Errors ‖a − b‖ / ‖b‖ are against the float64 reference, of one step and of a window's meta-gradient; those of
bf16 are beside float32's own. Of whole windows, in which rounded updates lead elsewhere, the two precisions'
meta-gradients are compared, for a fresh rule and a trained one. Quality: `lstm-mnist` on test optimizees.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import speed_tables
import torch
from cells import spec_of
from l2l_kernels import LSTMSpec, cpu, reference
from l2l_kernels.cpu import library
from measuring import print_table, start_log, write_json

from l2l_lightning import MNISTMLP, CoordinatewiseLSTM, Optimizees, pretrained, run_rule
from l2l_lightning.comparison.statistics import final_losses, mean_and_half_width, paired_difference
from l2l_lightning.data import load_images
from l2l_lightning.provenance import origin
from l2l_lightning.rollout.rollout import Rollout

PRECISIONS = {"float32": None, "bf16": "bf16"}
UNITS, LAYERS, INPUTS = (4, 8, 20, 32), (1, 2), (1, 2, 4)
STEPS = 10
TURN_S = 4e-3
"""The least that a turn takes, of as many calls as that needs."""
CHECKED = 1031
"""Coordinates of the errors: no multiple of a vector's."""


def in_turns(runs: dict[str, Callable[[], object]], turns: int) -> dict[str, Any]:
    """Milliseconds of one call, the median and the least, and the ratio of the first to the second."""
    calls = {}
    for name, run in runs.items():
        run()
        start = time.thread_time()
        run()
        calls[name] = max(1, round(TURN_S / (time.thread_time() - start)))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns):
        for name in list(runs)[:: 1 if turn % 2 else -1]:
            start = time.thread_time()
            for _ in range(calls[name]):
                runs[name]()
            seconds[name].append((time.thread_time() - start) / calls[name])
    first, second = seconds.values()
    ratios = [a / b for a, b in zip(first, second, strict=True)]
    return {
        "ms": {name: 1e3 * statistics.median(found) for name, found in seconds.items()},
        "ms_least": {name: 1e3 * min(found) for name, found in seconds.items()},
        "ratio": statistics.median(ratios),
        "ratio_p20_p80": np.quantile(ratios, [0.2, 0.8]).tolist(),
    }


class Problem:
    """One step and one window of an LSTM on N coordinates."""

    def __init__(self, spec: LSTMSpec, N: int) -> None:
        generator = torch.Generator().manual_seed(0)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        self.spec, self.phi = spec, 0.3 * randn(spec.num_parameters)
        self.inputs = randn(STEPS, *spec.input_shape(N))
        self.history, self.d_updates = 0.5 * randn(STEPS + 1, *spec.state_shape, N), randn(STEPS, N)
        self.theta, self.new_state = torch.zeros(N), torch.empty_like(self.history[0])

    def step(self, spec: LSTMSpec) -> None:
        """A step of the compiled kernels; θ goes on."""
        cpu.step_(self.theta, self.inputs[0], self.history[0], self.new_state, self.phi, spec)

    def bptt(self, spec: LSTMSpec) -> tuple[torch.Tensor, torch.Tensor]:
        """A window's backward of the compiled kernels."""
        return cpu.bptt(self.inputs, self.history, self.d_updates, None, self.phi, spec)

    def errors(self, spec: LSTMSpec) -> dict[str, float]:
        """Of the update and the state after one step, and of the window's gradients, against float64."""
        self.theta.zero_()
        self.step(spec)
        actual = self.theta, self.new_state, *self.bptt(spec)
        given = self.inputs, self.history, self.d_updates, self.phi
        inputs, history, d_updates, phi = (tensor.double() for tensor in given)
        theta = torch.zeros_like(self.theta).double()
        stepped = reference.step(theta, inputs[0], history[0], phi, self.spec)
        expected = *stepped, *reference.bptt(inputs, history, d_updates, None, phi, self.spec)
        names = "update", "state", "d_phi", "d_initial_state"
        pairs = zip(names, actual, expected, strict=True)
        return {name: float((a.double() - b).norm() / b.norm()) for name, a, b in pairs}


def measure_cell(layers: int, units: int, inputs: int, N: int, turns: int) -> dict[str, Any]:
    """Times in ns for a coordinate and step, their ratios, and errors, of one size of the LSTM."""
    spec = spec_of(units, layers, inputs)
    specs = {name: replace(spec, precision=precision) for name, precision in PRECISIONS.items()}
    row: dict[str, Any] = {"layers": layers, "units": units, "inputs": inputs}
    problem, checked = Problem(spec, N), Problem(spec, CHECKED)
    for kernel, steps in (("step", 1), ("bptt", STEPS)):
        run = getattr(problem, kernel)
        found = in_turns({name: partial(run, one) for name, one in specs.items()}, turns)
        for what, field in (("ns", "ms"), ("ns_least", "ms_least")):
            found[what] = {name: 1e6 * ms / (N * steps) for name, ms in found.pop(field).items()}
        row[kernel] = found
    return row | {"errors": {name: checked.errors(one) for name, one in specs.items()}}


def measure_meta_step(unroll: int, threads: int, turns: int) -> dict[str, Any]:
    """A meta-step of peers/ours.py, as meta_step.py times it."""
    sys.path.insert(0, str(Path(__file__).parent / "peers"))
    import harness
    import ours

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "problem.npz"
        harness.make_problem(path, unroll, num_tasks=1, reps=turns)
        with np.load(path) as file:
            problem = dict(file)
    meta_steps = {
        name: ours.prepare(problem, argparse.Namespace(device="cpu"), precision)
        for name, precision in PRECISIONS.items()
    }
    batches = {name: itertools.cycle(problem["indices"]) for name in meta_steps}
    runs = {name: lambda name=name: meta_steps[name](next(batches[name])) for name in meta_steps}
    return {"unroll": unroll, "threads": threads} | in_turns(runs, turns)


def measure_meta_gradient(trained: bool, unroll: int, seed: int) -> dict[str, Any]:
    """How far the two precisions' meta-losses and meta-gradients of the first window of a rollout differ."""
    torch.manual_seed(seed)
    rule, images = pretrained.load("lstm-mnist") if trained else CoordinatewiseLSTM(), load_images("mnist")
    gradients, losses = {}, {}
    for name, precision in PRECISIONS.items():
        rule.precision = precision
        ones = Optimizees(MNISTMLP(), images.train, seed, "train", range(2))
        meta_loss = Rollout(rule, ones).window(unroll).meta_loss
        found = torch.autograd.grad(meta_loss, list(rule.parameters()))
        gradients[name] = torch.cat([part.reshape(-1) for part in found])
        losses[name] = meta_loss.item()
    exact, rounded = gradients.values()
    return {
        "rule": "lstm-mnist" if trained else "fresh",
        "unroll": unroll,
        "meta_loss": abs(losses["bf16"] / losses["float32"] - 1),
        "meta_gradient": float((rounded - exact).norm() / exact.norm()),
        "cosine": float(torch.cosine_similarity(rounded, exact, dim=0)),
    }


def measure_quality(number: int, horizon: int, seed: int) -> dict[str, Any]:
    """Final losses of a trained rule on test optimizees, the same ones in both precisions."""
    rule, images = pretrained.load("lstm-mnist"), load_images("mnist").test
    final = {}
    for name, precision in PRECISIONS.items():
        rule.precision = precision
        ones = Optimizees(MNISTMLP(), images, seed, "test", range(number))
        final[name] = final_losses(run_rule(rule, ones, horizon).double())
    means = {name: mean_and_half_width(losses) for name, losses in final.items()}
    difference = paired_difference(final["bf16"], final["float32"])
    return {
        "rule": "lstm-mnist",
        "optimizees": number,
        "horizon": horizon,
        "data": "the subset of MNIST in the package, its test images",
        "final_loss": {name: {"mean": float(m), "half_width": float(w)} for name, (m, w) in means.items()},
        "difference": difference._asdict(),
    }


def main() -> None:
    """Prints the tables, and writes the JSON asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--coordinates", type=int, default=16_384)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--unroll", type=int, nargs="+", default=[20, 100])
    parser.add_argument("--optimizees", type=int, default=64)
    parser.add_argument("--horizon", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    cpu.check_precision(LSTMSpec(precision="bf16"))
    document: dict[str, Any] = {"origin": origin("cpu"), "kernels": library.describe(), "seed": args.seed}
    document["origin"]["threads"] = 1
    document |= {"coordinates": args.coordinates, "turns": args.turns, "cells": [], "meta_steps": []}
    print_row = start_log(["layers", "units", "inputs", "step", "bptt"])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for layers, units, inputs in product(LAYERS, UNITS, INPUTS):
        row = measure_cell(layers, units, inputs, args.coordinates, args.turns)
        document["cells"].append(row)
        print_row([layers, units, inputs, *(f"{row[kernel]['ratio']:.2f}" for kernel in ("step", "bptt"))])
        write_json(args.json, document)
    for unroll in args.unroll:
        document["meta_steps"].append(measure_meta_step(unroll, 1, args.turns))
        write_json(args.json, document)
    torch.set_num_threads(threads)
    cases = product((False, True), (1, *args.unroll))
    document["meta_gradients"] = [measure_meta_gradient(*case, args.seed) for case in cases]
    document["quality"] = measure_quality(args.optimizees, args.horizon, args.seed)
    write_json(args.json, document)
    for table in ("kernels", "meta_steps", "meta_gradients", "quality"):
        print_table(getattr(speed_tables, f"rounded_{table}")(document))


if __name__ == "__main__":
    main()
