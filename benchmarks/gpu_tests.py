"""The tests that need a GPU, dealt out to several processes, with every outcome in one JSON file.

    python benchmarks/gpu_tests.py [--processes 16] [--limit-s 150] [--json FILE]

Most of their time goes into compiling kernels, one core each. Only test files that have such tests are
collected, so that what the others import need not be installed. A failure, a crash or a limit that passes is
recorded and the other tests go on; the exit status says whether all passed or were skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from measuring import write_json

from l2l_lightning.provenance import origin

TESTS = Path(__file__).resolve().parent.parent / "tests"


class Share:
    """A pytest plugin: keeps every count-th test, and writes each one's name, then its outcome, to a file."""

    def __init__(self, index: int, count: int, output: Path) -> None:
        self.index = index
        self.count = count
        self.output = output

    def write(self, **record: object) -> None:
        """Adds a line of JSON to the file."""
        with self.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    @pytest.hookimpl(trylast=True)  # after -m has deselected the others
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Deselects the other processes' tests."""
        items[:] = items[self.index :: self.count]
        for item in items:
            self.write(test=item.nodeid, outcome="not run")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be collected is a failure; one that needs a package not installed is skipped."""
        if report.failed and self.index == 0:  # the other processes meet the same
            why = str(report.longrepr)[-2000:]
            absent = re.search(r"ModuleNotFoundError: (?!.*l2l_)(.*)", why)
            outcome = "skipped" if absent else "failed"
            self.write(test=report.nodeid, outcome=outcome, why=absent[1] if absent else why)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Writes what the test's call gave, or what its set-up or tear-down gave if that is no success."""
        if report.when == "call" or report.outcome != "passed":
            why = {} if report.passed else {"why": str(report.longrepr)[-2000:]}
            self.write(test=report.nodeid, outcome=report.outcome, seconds=report.duration, **why)
            if report.failed:  # now: the limit may pass
                print(f"failed: {report.nodeid}\n{why['why']}", file=sys.stderr, flush=True)


def run_share(index: int, count: int, output: Path) -> None:
    """What each process does; its exit status says whether pytest worked, the records what the tests gave."""
    files = [
        str(path)
        for path in sorted(TESTS.rglob("test_*.py"))
        if re.search(r"\bmark\.gpu\b", path.read_text(encoding="utf-8"))
    ]
    # pyproject.toml, which declares the marker, is in the root. A conftest.py is for the command line's tests
    # and imports all that it needs; a cache would be shared between the processes.
    options = ["-m", "gpu", "--continue-on-collection-errors", "--tb=short", f"--rootdir={TESTS.parent}"]
    options += ["--noconftest", "-p", "no:cacheprovider"]
    status = pytest.main([*options, *files], plugins=[Share(index, count, output)])
    broken = (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.INTERNAL_ERROR, pytest.ExitCode.INTERRUPTED)
    raise SystemExit(int(status) if status in broken else 0)


def main() -> None:
    """Runs the shares side by side, prints and writes what became of every test."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--processes", type=int, default=min(16, len(os.sched_getaffinity(0))))
    parser.add_argument("--limit-s", type=float, default=150)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.share is not None:
        run_share(args.share, args.processes, args.output)

    start = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        outputs = [Path(directory) / f"{index}.jsonl" for index in range(args.processes)]
        command = [sys.executable, __file__, "--processes", str(args.processes)]
        processes = [
            subprocess.Popen(
                [*command, "--share", str(index), "--output", str(output)],
                cwd=TESTS.parent,
                # One thread each: they share the cores, and their references are computed on them.
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=subprocess.DEVNULL,  # what it prints is in the records
            )
            for index, output in enumerate(outputs)
        ]
        for process in processes:
            try:
                process.wait(max(args.limit_s - (time.monotonic() - start), 0.0))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        statuses = [process.returncode for process in processes]
        records = [
            json.loads(line)
            for output in outputs
            if output.exists()
            for line in output.read_text(encoding="utf-8").splitlines()
        ]
    tests = {record["test"]: record for record in records}  # the last of a test's records
    counts = Counter(record["outcome"] for record in tests.values())
    for record in tests.values():
        if record["outcome"] != "passed" and record["test"].endswith(".py"):  # a file that was not collected
            print(f"{record['outcome']}: {record['test']}: {record['why']}")
        elif record["outcome"] not in ("passed", "skipped"):
            print(f"{record['outcome']}: {record['test']}")
    print(f"{dict(counts)} in {time.monotonic() - start:.0f} s; exit statuses {statuses}")
    document = {
        "origin": origin("cuda" if torch.cuda.is_available() else "cpu"),
        "seconds": time.monotonic() - start,
        "counts": dict(counts),
        "exit_statuses": statuses,
        "tests": list(tests.values()),
    }
    write_json(args.json, document)
    if any(statuses) or not counts.keys() <= {"passed", "skipped"}:
        raise SystemExit("not all tests passed")


if __name__ == "__main__":
    main()
