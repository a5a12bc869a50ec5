"""What the throughput benchmark counts, and what it and the meta-step refuse to report."""

import argparse
import itertools
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import kernel_throughput
import meta_step
from kernel_throughput import Case
from l2l_kernels import LSTMSpec, backends
from l2l_kernels.triton import configs

BOUNDS = {"copy_gb_per_s": 1.0, "tflops": {"float32": 1.0}, "device": "none"}


def test_the_bytes_and_flops_of_a_step_and_of_a_window():
    # 2 layers x (h, c) x 20 units x 4 bytes, in and out; θ in and out; the gradient in.
    # 80 gates x (2 inputs + 20), 80 x (20 + 20), and the head's 20: two FLOPs each.
    counted = kernel_throughput.work(Case("step", 1, 1, "float32", "tf32"))
    assert counted == (320 + 320 + 4 + 4 + 4, 2 * (80 * 22 + 80 * 40 + 20)) == (652, 9960)
    assert kernel_throughput.work(Case("step", 1, 1, "bfloat16", "tf32")) == (332, 9960)
    spec = LSTMSpec(num_layers=1, hidden_size=3, preprocessing="identity")
    assert kernel_throughput.work(Case("step", 1, 1, "float32", "tf32"), spec) == (60, 2 * (12 * 4 + 3))
    for dtype, state in (("float32", 320), ("bfloat16", 160)):
        # 21 states, 20 gradients and cotangents of 4 bytes in, the first state's cotangent (float32) out.
        bytes_, flops = kernel_throughput.work(Case("bptt", 1, 20, dtype, "tf32"))
        assert 20 * bytes_ == pytest.approx(21 * state + 20 * 8 + 320)
        gates = weight_gradients = 80 * 22 + 80 * 40
        cotangents = 80 * 20 + 80 * 40  # none for the first layer's input, the gradient
        assert flops == 2 * (gates + weight_gradients + cotangents + 2 * 20)


class Wrong:
    """A backend whose updates and gradients are all zero."""

    @staticmethod
    def step_(theta, grad, state, new_state, phi, spec):
        new_state.zero_()

    @staticmethod
    def bptt(grads, history, d_updates, d_final_state, phi, spec):
        return torch.zeros_like(phi), torch.full_like(history[0], torch.nan)


@pytest.mark.parametrize(
    "case", [Case("step", 64, 1, "float32", "float32"), Case("bptt", 64, 2, "float32", "float32")]
)
@pytest.mark.parametrize("backend", [Wrong, backends.load("reference")], ids=["wrong", "right"])
def test_a_configuration_that_disagrees_gets_no_throughput(case, backend):
    problem = kernel_throughput.Problem(*case[:4], "cpu")
    row = kernel_throughput.measure(case, problem, backend, "cpu", BOUNDS)
    assert row["agrees"] == (backend is not Wrong)
    assert {"ms", "gb_per_s", "tflops"}.isdisjoint(row) == (backend is Wrong)
    assert len(kernel_throughput.cells(row)) == len(kernel_throughput.COLUMNS)


def test_a_configuration_that_cannot_run_says_why():
    case = Case("step", 64, 1, "float32", "float32")
    row = kernel_throughput.measure(case, kernel_throughput.Problem(*case[:4], "cpu"), None, "cpu", BOUNDS)
    assert row["failure"].startswith("AttributeError")
    assert "ms" not in row


class Launches:
    """The reference, which looks up its configuration as the Triton kernels do on one family of devices."""

    def __init__(self, family, fails=False):
        self.family, self.fails = family, fails
        self.used, self.precisions = set(), set()

    def launch(self, constants, options):
        limits = options.get("maxnreg"), 1 if constants.get("GATES", "all") == "all" else 2
        lanes = "GATES" not in constants and "HP" not in constants
        self.used.add(configs.Config(constants["BLOCK"], options["num_warps"], limits[0], lanes, limits[1]))
        self.precisions |= {constants["PRECISION"]} if "PRECISION" in constants else set()
        if self.fails:
            raise RuntimeError("out of resource")

    def step_(self, *arguments):
        self.launch(*configs.step_config(kernel_throughput.SPEC, self.family))
        backends.load("reference").step_(*arguments)

    def bptt(self, *arguments):
        for layer in (1, 0):
            self.launch(*configs.bptt_config(kernel_throughput.SPEC, layer, self.family))
        return backends.load("reference").bptt(*arguments)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("kernel", ["step", "bptt"])
def test_a_sweep_launches_what_its_result_names_on_every_family_and_puts_it_back(kernel, fails):
    arguments = argparse.Namespace(sweep=True, step_sizes=[16], bptt_sizes=[32], unroll=2)
    swept = [case for case in kernel_throughput.cases(arguments, []) if case.kernel == kernel]
    assert len(set(swept)) == len(swept) > 6
    problem = kernel_throughput.Problem(*swept[0][:4], "cpu")
    before = getattr(configs, f"{kernel}_config"), getattr(configs.precisions, kernel)
    cases = (swept[0], swept[-1], swept[0]._replace(config=None))
    for family, case in itertools.product(configs.Family.__args__, cases):
        backend = Launches(family, fails)
        row = kernel_throughput.measure(case, problem, backend, "cpu", BOUNDS)
        assert row["agrees"] != fails
        assert backend.precisions <= {configs.dot_precision(case.precision, family)}
        named = configs.Config(*(row[name] for name in configs.Config._fields))
        assert backend.used == {named}
        assert case.config in (None, named)
        assert before == (getattr(configs, f"{kernel}_config"), getattr(configs.precisions, kernel))


def report(loss=1.0, gradient=(1.0, 2.0), ms=2.0):
    numbers = {"loss": torch.tensor(loss).numpy(), "gradient": torch.tensor(gradient).numpy()}
    return {"ms": ms, **numbers, "peak_mib": 10.0, "working_mib": 5.0, "device_mib": None}


def test_a_ratio_is_the_peers_time_over_ours_and_a_gpus_is_held_against_the_targets():
    row = meta_step.compare({"ours": report(), "autograd": report(ms=5.0)}, "cpu")
    assert row["ratio"] == {"autograd": 2.5}
    assert row["meets_target"] == {}
    row = meta_step.compare({"ours": report(), "plain": report(ms=50.0), "jax": report(ms=3.0)}, "cuda")
    assert row["meets_target"] == {"plain": True, "jax": False}


@pytest.mark.parametrize(
    "peer",
    [
        report(loss=1.01),
        report(gradient=(1.0, 2.1)),
        report(gradient=(1.0, float("nan"))),
        {"failure": "exit status 1"},
    ],
    ids=["loss", "gradient", "NaN", "failed"],
)
def test_there_is_no_ratio_to_a_peer_that_disagrees_or_failed(peer):
    row, failed = meta_step.compare({"ours": report(), "jax": peer}, "cpu"), "failure" in peer
    assert row["ratio"] == {}
    assert row["failures"] == ({"jax": "exit status 1"} if failed else {})
    assert row["disagreement"].keys() == (set() if failed else {"jax"})
    assert row["ms"].keys() == ({"ours"} if failed else {"ours", "jax"})
