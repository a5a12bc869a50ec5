"""One of everything that a GPU does here, each on its own: what breaks says so with its whole traceback.

    python benchmarks/gpu_smoke.py [--device cuda]
    ncu … python benchmarks/gpu_smoke.py --kernels 4194304

The first thing to run on a new machine: it takes seconds, and tells what the longer stages would meet.
--kernels launches every fused kernel once, on so many coordinates, for a profiler.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import traceback
from collections.abc import Callable

import torch
from kernel_throughput import STATE_TOLERANCE, TOLERANCE, Problem, configured
from kernel_throughput import Case as Launch
from l2l_kernels import backends

from l2l_lightning import LearnedOptimizer
from l2l_lightning.data import load_images
from l2l_lightning.rollout.optimizees import Optimizees
from l2l_lightning.rollout.perturbed import PerturbedRollout
from l2l_lightning.rollout.rollout import Rollout, run_rule
from l2l_lightning.rules import CoordinatewiseLSTM, ZeroShot
from l2l_lightning.tasks import MNISTMLP, Quadratic, SmallProblem

SIZES = (4096, 4098)
"""Numbers of coordinates: Triton compiles another kernel for one that 16 divides."""


def device_info(device: str) -> None:
    """Prints what the driver and torch say of the device."""
    print(torch.__version__, torch.version.cuda or torch.version.hip, sys.version.split()[0])
    if device.startswith("cuda"):
        print(torch.cuda.get_device_properties(device))
        subprocess.run(["nvidia-smi"], check=False)


def kernel(name: str, size: int, device: str) -> None:
    """Holds a kernel to the float64 reference."""
    backend = backends.choose(torch.device(device))
    precision = {"step": "tf32x3", "bptt": "tf32"}[name] if backend == "triton" else "float32"
    case = Launch(name, size, {"step": 1, "bptt": 3}[name], "float32", precision)
    with configured(case, {}):
        errors = Problem(*case[:4], device).errors(backends.load(backend))
    tolerance = max(TOLERANCE[precision], STATE_TOLERANCE["float32"])
    print({key: f"{value:.1e}" for key, value in errors.items()})
    assert max(errors.values()) < tolerance, f"{errors} beyond {tolerance}"


def optimizer_step(orthogonal: bool, device: str) -> None:
    """Three steps of the default optimizer lower a loss."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(9, 7), torch.nn.Tanh(), torch.nn.Linear(7, 5)).to(device)
    optimizer = LearnedOptimizer(module.parameters(), ZeroShot(orthogonal=orthogonal), total_steps=20)
    inputs = torch.randn(32, 9, device=device)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = module(inputs).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses


def window(task_name: str, device: str) -> None:
    """A window and its meta-gradient, recorded where that can be; twice, so that it is replayed."""
    task = Quadratic() if task_name == "quadratic" else MNISTMLP()
    images = load_images("mnist").train.to(device) if task.dataset else None
    rule = CoordinatewiseLSTM().to(device)
    recorded = True if device.startswith("cuda") else None
    rollout = Rollout(rule, Optimizees(task, images, 0, "train", range(2), device), cuda_graphs=recorded)
    for _ in range(2):
        rollout.window(5).meta_loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in rule.parameters())


def evaluation(device: str) -> None:
    """A rollout without a meta-gradient, of which stretches are recorded."""
    ones = Optimizees(Quadratic(), None, 0, "validation", range(2), device)
    recorded = True if device.startswith("cuda") else None
    assert run_rule(CoordinatewiseLSTM().to(device), ones, 50, cuda_graphs=recorded).isfinite().all()


def evolution(device: str) -> None:
    """Two optimizees of a small problem, each under a φ of its own."""
    rule = ZeroShot().to(device)
    phis = {name: torch.stack([value, 1.1 * value]) for name, value in rule.named_parameters()}
    ones = Optimizees(SmallProblem("image_perceptron"), None, 0, "train", range(2), device)
    assert PerturbedRollout(rule, ones, 5).window(phis, 5).isfinite().all()


def checks(device: str) -> dict[str, Callable[[], None]]:
    """Everything, by name."""
    found: dict[str, Callable[[], None]] = {"device": lambda: device_info(device)}
    for name in ("step", "bptt"):
        for size in SIZES:
            found[f"{name}, {size} coordinates"] = lambda name=name, size=size: kernel(name, size, device)
    for orthogonal in (False, True):
        found[f"optimizer, orthogonal={orthogonal}"] = lambda o=orthogonal: optimizer_step(o, device)
    for task in ("quadratic", "mnist"):
        found[f"window, {task}"] = lambda task=task: window(task, device)
    return found | {"evaluation": lambda: evaluation(device), "evolution": lambda: evolution(device)}


def launch_kernels(coordinates: int, device: str) -> None:
    """Launches the step, a window's backward on a quarter of the coordinates, and the default step, once."""
    backend = backends.load(backends.choose(torch.device(device)))
    Problem("step", coordinates, 1, "float32", device).run(backend)
    Problem("bptt", coordinates // 16, 20, "float32", device).run(backend)
    parameter = torch.nn.Parameter(torch.zeros(coordinates, device=device))
    parameter.grad = torch.randn_like(parameter)
    LearnedOptimizer([parameter], ZeroShot(orthogonal=False), total_steps=10).step()


def main() -> None:
    """Does all of it, whatever breaks; the exit status says whether anything did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--kernels", type=int, metavar="COORDINATES", help="launch each once, and no more")
    args = parser.parse_args()
    if args.kernels:
        launch_kernels(args.kernels, args.device)
        return
    broken = []
    for name, check in checks(args.device).items():
        start = time.perf_counter()
        try:
            check()
        except Exception:
            traceback.print_exc()
            broken.append(name)
        outcome = "BROKEN" if name in broken else "works"
        print(f"{name}: {outcome}, {time.perf_counter() - start:.1f} s", flush=True)
    if broken:
        raise SystemExit(f"broken: {', '.join(broken)}")


if __name__ == "__main__":
    main()
