"""The GPU suite and its stages, on the CPU at tiny sizes, where little more than torch can be imported."""

import json
import math
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
ABSENT = ["wandb", "jsonargparse", "lightning", "rich", "matplotlib", "hypothesis", "jax", "torchmetrics"]
"""What a machine image with torch, triton, numpy and pytest lacks."""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The variables of a process in which those modules cannot be imported."""
    folder = tmp_path_factory.mktemp("absent")
    (folder / "sitecustomize.py").write_text(
        f"import sys\nfor name in {ABSENT}:\n    sys.modules[name] = None\n"
    )
    variables = {key: value for key, value in os.environ.items() if key not in ("OUT", "L2L_DATA")}
    return variables | {
        "PYTHONPATH": str(folder),
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # those of absent modules
    }


@pytest.fixture(scope="module")
def suite(environment, tmp_path_factory):
    """The folder that the suite fills."""
    out = tmp_path_factory.mktemp("suite")
    before = sorted((ROOT / "benchmarks" / "results").glob("gpu_*"))
    result = subprocess.run(
        [ROOT / "benchmarks" / "gpu_suite.sh", out],
        env=environment | {"L2L_SUITE_DEVICE": "cpu", "L2L_COMMIT": "abc"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert sorted((ROOT / "benchmarks" / "results").glob("gpu_*")) == before
    return out


def load(suite, name):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads((suite / f"gpu_{name}.json").read_text(), parse_constant=refuse)


def assert_positive(row, *names):
    for name in names:
        assert math.isfinite(row[name]), name
        assert row[name] > 0, name


def test_the_suite_runs_every_stage_to_its_end_and_says_where_numbers_come_from(suite):
    stages = ["gpu_tests", "kernel_throughput", "meta_step", "time_to_quality"]
    summary = load(suite, "suite")
    assert summary["all_passed"] is True
    assert [stage["name"] for stage in summary["stages"]] == stages
    assert all(stage["status"] == 0 for stage in summary["stages"])
    assert (suite / "gpu_suite.log").is_file()
    for name in ("tests", *stages[1:]):
        origin = load(suite, name)["origin"]
        assert {"cores", "python", "torch", "triton", "cuda", "date"} <= origin.keys()
        assert (origin["commit"], origin["driver"]) == ("abc", None)
        assert origin["device"]
    report = load(suite, "tests")
    assert report["counts"].keys() == {"skipped"}
    assert len(report["tests"]) == report["counts"]["skipped"] > 0
    assert any("test_triton_gpu.py" in test["test"] for test in report["tests"])


def test_throughput_has_figures_and_errors_within_the_tolerances(suite):
    report = load(suite, "kernel_throughput")
    assert_positive(report["bounds"], "copy_gb_per_s")
    assert_positive(report["bounds"]["tflops"], "float32")
    assert {(row["kernel"], row["state_dtype"]) for row in report["rows"]} == {
        (kernel, dtype) for kernel in ("step", "bptt") for dtype in ("float32", "bfloat16")
    }
    for row in report["rows"]:
        assert row["agrees"]
        assert all(0 <= row["errors"][name] < row["tolerances"][name] for name in row["errors"])
        assert_positive(row, "ms", "ms_p20", "ms_p80", "ms_per_1e9", "gb_per_s", "share_of_copy")
        assert_positive(row, "tflops", "share_of_matrix_rate")
        assert row["ms_p20"] <= row["ms"] <= row["ms_p80"]


def test_meta_step_has_times_memory_and_a_ratio(suite):
    (row,) = load(suite, "meta_step")["rows"]
    assert row["failures"] == {}
    for name in ("ours", "plain", "autograd"):
        assert_positive({key: row[key][name] for key in ("ms", "peak_mib", "working_mib")}, "ms", "peak_mib")
        assert 0 < row["working_mib"][name] < row["peak_mib"][name]
    assert_positive(row["ratio"], "plain", "autograd")
    assert max(row["disagreement"].values()) < 1e-3


def test_time_to_quality_has_a_curve(suite):
    report = load(suite, "time_to_quality")
    assert report["seed"] == 0
    assert_positive(report["adam"], "learning_rate", "sum_of_losses")
    curve = report["curve"]
    assert len(curve) >= 2
    assert curve[0]["meta_step"] == 0
    assert curve[-1]["meta_step"] > 0
    assert curve[-1]["seconds"] >= report["budget_s"]
    assert all(a["seconds"] < b["seconds"] for a, b in pairwise(curve))
    for point in curve:
        assert_positive(point, "sum_of_losses")
    below = [p["seconds"] for p in curve if p["sum_of_losses"] < report["adam"]["sum_of_losses"]]
    assert report["reached_s"] == (below[0] if below else None)


def test_a_stage_that_breaks_stops_no_other(environment, tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$1" in *meta_step.py) exit 3;; esac\nexit 0\n')
    python.chmod(0o755)
    result = subprocess.run(
        [ROOT / "benchmarks" / "gpu_suite.sh"],
        env=environment | {"PYTHON": str(python), "L2L_SUITE_DEVICE": "cpu", "OUT": str(tmp_path / "out")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    summary = json.loads((tmp_path / "out" / "gpu_suite.json").read_text())
    assert summary["all_passed"] is False
    assert [stage["status"] for stage in summary["stages"]] == [0, 0, 3, 0]


def test_a_sweep_times_the_pairs_that_agree_and_only_those(environment, tmp_path):
    # In Triton's interpreter, whose products of transposed bfloat16 tiles are wrong: no figure for them.
    path = tmp_path / "sweep.json"
    sizes = ["--step-sizes", "16", "--bptt-sizes", "16", "--unroll", "1"]
    command = [sys.executable, ROOT / "benchmarks" / "kernel_throughput.py", "--sweep", "--json", path]
    variables = environment | {"TRITON_INTERPRET": "1"}
    variables["PYTHONPATH"] += os.pathsep + str(ROOT / "kernels")
    subprocess.run([*command, "--device", "cpu", "--backend", "triton", *sizes], env=variables, check=True)
    rows = json.loads(path.read_text())["rows"]
    assert {(row["block"], row["num_warps"]) for row in rows if row["kernel"] == "bptt"} >= {(16, 4), (32, 8)}
    for row in rows:
        assert row["agrees"] == ("ms" in row) == ("share_of_copy" in row)
    assert all(row["agrees"] for row in rows if row["precision"] != "bf16")
