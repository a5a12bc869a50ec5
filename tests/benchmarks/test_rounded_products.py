"""The benchmark of rounded products: what it calls a ratio, an error and a difference."""

import sys
from pathlib import Path

import pytest
import torch
from l2l_kernels import LSTMSpec, cpu
from l2l_kernels.cpu import library

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import rounded_products


def test_a_ratio_is_the_median_over_turns_of_the_first_ones_time_over_the_seconds(monkeypatch):
    """By a clock that the runs advance: 6, 6 and 12 to 2, 3 and 1."""
    clock, lasts = [0.0], {"a": iter([6, 6, 6, 6, 12]), "b": iter([2, 2, 2, 3, 1])}
    monkeypatch.setattr(rounded_products.time, "thread_time", lambda: clock[0])

    def run(name):
        clock[0] += next(lasts[name])

    found = rounded_products.in_turns({name: lambda name=name: run(name) for name in "ab"}, turns=3)
    assert found["ms"] == {"a": 6000, "b": 2000}
    assert found["ms_least"] == {"a": 6000, "b": 1000}
    assert found["ratio"] == 3
    assert found["ratio_p20_p80"] == pytest.approx([2.4, 8.4])


def test_errors_are_relative_to_float64s_norms(monkeypatch):
    spec = LSTMSpec(1, 4, "identity")
    problem = rounded_products.Problem(spec, 37)
    exact = problem.errors(spec)
    assert max(exact.values()) < 1e-5

    def doubled(*arguments):
        return tuple(2 * gradient for gradient in bptt(*arguments))

    bptt = cpu.bptt
    monkeypatch.setattr(cpu, "bptt", doubled)
    assert problem.errors(spec)["d_phi"] == pytest.approx(1, abs=1e-5)


def test_every_part_measures_both_precisions():
    if not set(library.ROUNDED_VARIANTS) <= set(library.variants(library.load())):
        pytest.skip("no AVX512_BF16")
    threads = torch.get_num_threads()
    row = rounded_products.measure_cell(1, 4, 1, N=64, turns=1)
    assert row["step"]["ns"].keys() == row["bptt"]["ns"].keys() == {"float32", "bf16"}
    for key, exact in row["errors"]["float32"].items():
        assert exact < 1e-5 < row["errors"]["bf16"][key] < 2 * 2**-8
    gradient = rounded_products.measure_meta_gradient(trained=False, unroll=2, seed=0)
    assert 1e-5 < gradient["meta_gradient"] < 2 * 2**-8
    assert gradient["cosine"] == pytest.approx(1, abs=1e-4)
    assert torch.get_num_threads() == threads
