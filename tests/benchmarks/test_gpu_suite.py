"""The GPU suite and its stages, on the CPU at tiny sizes, where little more than torch can be imported."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
ABSENT = ["wandb", "jsonargparse", "lightning", "rich", "matplotlib", "hypothesis", "jax", "torchmetrics"]
"""What a machine image with torch, triton, numpy and pytest lacks."""


WITHOUT = f"""
import sys
from importlib import metadata
for name in {ABSENT}:
    sys.modules[name] = None
known = metadata.distribution
def distribution(name):
    if name == "l2l-lightning":
        raise metadata.PackageNotFoundError(name)
    return known(name)
metadata.distribution = distribution
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A process's variables: without those modules, without this package's metadata, and without git."""
    folder = tmp_path_factory.mktemp("absent")
    (folder / "sitecustomize.py").write_text(WITHOUT)
    (folder / "git").write_text("#!/bin/sh\nexit 127\n")
    (folder / "git").chmod(0o755)
    variables = {key: value for key, value in os.environ.items() if key not in ("OUT", "L2L_DATA")}
    return variables | {
        "PYTHONPATH": str(folder),
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
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
    stages = ["smoke", "kernel_throughput", "optimizer_step", "gpu_tests", "meta_step", "time_to_quality"]
    summary = load(suite, "suite")
    assert summary["all_passed"] is True
    assert [stage["name"] for stage in summary["stages"]] == stages
    assert all(stage["status"] == 0 for stage in summary["stages"])
    assert (suite / "gpu_suite.log").is_file()
    log = (suite / "gpu_suite.log").read_text()
    assert "evolution: works" in log
    assert "BROKEN" not in log
    summary_lines = log[log.rindex("kernel_throughput:") :].splitlines()
    assert 6 < len(summary_lines) <= 60
    assert not any("nothing was left" in line or "not to be read" in line for line in summary_lines[:-3])
    for name in ("tests", "kernel_throughput", "optimizer_step", "meta_step", "time_to_quality"):
        origin = load(suite, name)["origin"]
        assert {"cores", "instruction_set", "processor", "threads", "cuda", "date"} <= origin.keys()
        assert {"python", "torch", "triton", "numpy"} <= origin["versions"].keys()
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


STAND_IN = """#!/bin/sh
name=$(basename "$1" .py)
case "$name" in "$BREAKS") exit 3;; esac
while [ $# -gt 0 ]; do [ "$1" = --json ] && echo '{"rows": []}' > "$2"; shift; done
case "$name" in "$HANGS") echo "hangs in $name"; exec sleep 5;; esac
exit 0
"""
STAGES = ["gpu_smoke", "kernel_throughput", "optimizer_step", "gpu_tests", "meta_step", "time_to_quality"]


@pytest.fixture
def stand_in(environment, tmp_path):
    """Starts the suite with an interpreter that only leaves a JSON, and breaks or hangs in a stage."""
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)

    def start(**variables):
        given = {"PYTHON": str(python), "L2L_SUITE_DEVICE": "cpu", "OUT": str(tmp_path / "out")}
        given |= {"BREAKS": "", "HANGS": ""} | variables
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        suite = ROOT / "benchmarks" / "gpu_suite.sh"
        return subprocess.Popen([suite], env=environment | given, start_new_session=True, **pipes)

    return start


def test_a_stage_that_breaks_stops_no_other(stand_in, tmp_path):
    process = stand_in(BREAKS="meta_step")
    process.communicate()
    assert process.returncode == 1
    summary = json.loads((tmp_path / "out" / "gpu_suite.json").read_text())
    assert (summary["all_passed"], summary["ended"]) == (False, True)
    assert [stage["status"] for stage in summary["stages"]] == [0, 0, 0, 0, 3, 0]


@pytest.mark.parametrize("killed_in", STAGES)
def test_whatever_kills_it_leaves_what_has_been_measured(killed_in, stand_in, tmp_path):
    """With SIGKILL, as a machine's limit does, in the middle of every stage: its own JSON is there, too."""
    process, out = stand_in(HANGS=killed_in), tmp_path / "out"
    log = out / "gpu_suite.log"
    while not (log.is_file() and f"hangs in {killed_in}" in log.read_text()):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    ended = STAGES[: STAGES.index(killed_in)]
    names = {f"gpu_{name.removeprefix('gpu_')}.json" for name in (*ended, killed_in)} - {"gpu_smoke.json"}
    assert {path.name for path in out.glob("gpu_*.json")} - {"gpu_suite.json"} == names
    if ended:
        summary = json.loads((out / "gpu_suite.json").read_text())
        assert [stage["name"] for stage in summary["stages"]] == [
            n.replace("gpu_smoke", "smoke") for n in ended
        ]
        assert summary["ended"] is False


def test_a_sweep_times_the_pairs_that_agree_and_only_those(environment, tmp_path):
    # In Triton's interpreter, whose products of transposed bfloat16 tiles are wrong: no figure for them.
    path = tmp_path / "sweep.json"
    sizes = ["--step-sizes", "16", "--bptt-sizes", "16", "--unroll", "1"]
    command = [sys.executable, ROOT / "benchmarks" / "kernel_throughput.py", "--sweep", "--json", path]
    variables = environment | {"TRITON_INTERPRET": "1"}
    variables["PYTHONPATH"] += os.pathsep + str(ROOT / "kernels")
    subprocess.run([*command, "--device", "cpu", "--backend", "triton", *sizes], env=variables, check=True)
    rows = json.loads(path.read_text())["rows"]
    assert {(row["block"], row["num_warps"]) for row in rows if row["kernel"] == "bptt"} >= {(16, 4), (64, 4)}
    for row in rows:
        assert row["agrees"] == ("ms" in row) == ("share_of_copy" in row)
    assert all(row["agrees"] for row in rows if row["precision"] != "bf16")
