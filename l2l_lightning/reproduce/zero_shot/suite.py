"""All that is missing, computed by several processes of one thread each, the longest first."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import cache

import torch
from torch import nn

from l2l_lightning.errors import ReproductionError
from l2l_lightning.reproduce.zero_shot.peers import get_peer
from l2l_lightning.reproduce.zero_shot.problem import PROBLEMS
from l2l_lightning.reproduce.zero_shot.runs import start
from l2l_lightning.reproduce.zero_shot.store import Store

Job = tuple[str, str]
"""A problem and a peer."""

TIMED_STEPS = 3
"""Training steps of each problem that are timed, to begin with the longest."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Computes with one thread, and with subnormal numbers flushed to 0, as whole runs do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def complete(store: Store, jobs: Sequence[Job], workers: int, report: Callable[[str], None]) -> None:
    """Makes every entry that the store lacks; a failure or an interruption loses those that were being made.

    Args:
        store: Where they are kept.
        jobs: All that are wanted.
        workers: Processes of one thread each; 1 works in this process, in `one_thread`. More than one import
            the script that was started anew: it must register problems and peers of its own at its top level,
            and do the rest under `if __name__ == "__main__"`.
        report: Told how far it is.

    Raises:
        ReproductionError: A peer's package is missing, which shows before anything is computed, or a process
            was killed.
    """
    missing = [job for job in jobs if store.read(*job) is None]
    report(f"{len(jobs) - len(missing)} of {len(jobs)} results are there")
    for name in dict.fromkeys(peer for _, peer in missing):
        peer = get_peer(name)
        peer.make(nn.Linear(1, 1), 1, **({"rate": 1.0} if peer.tuned else {}))
    missing.sort(key=_order)
    done = map(_with_store(store), missing) if workers == 1 else _in_processes(store, missing, workers)
    for number, (problem, name) in enumerate(done, 1):
        report(f"{number} of {len(missing)} results that were missing: {name} on {problem}")


def _order(job: Job) -> tuple[bool, float]:
    """Sorts the longest to the front, and behind all others what goes on from another's search."""
    problem, peer = job
    optimizer = get_peer(peer)
    return optimizer.search_of is not None, -step_seconds(problem) * (4 if optimizer.tuned else 1)


@cache
def step_seconds(name: str) -> float:
    """Returns about how long all training steps of a problem take, in seconds."""
    problem = PROBLEMS[name]()
    with torch.random.fork_rng(devices=[]):
        module, generator = start(problem, 0)
    began = 0.0
    for step in range(TIMED_STEPS + 1):
        if step == 1:
            began = time.perf_counter()
        problem.loss(module, problem.batch(generator)).backward()  # type: ignore[no-untyped-call]
    return (time.perf_counter() - began) / TIMED_STEPS * problem.steps


def _with_store(store: Store) -> Callable[[Job], Job]:
    def work(job: Job) -> Job:
        store.entry(*job)
        return job

    return work


def _in_processes(store: Store, jobs: Sequence[Job], workers: int) -> Iterator[Job]:
    before = set(multiprocessing.active_children())
    # Spawned: where autograd has run, there are threads that a forked process would wait for.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, max(len(jobs), 1)), context, _begin) as pool:
        try:
            for future in as_completed([pool.submit(_work, store, job) for job in jobs]):
                yield future.result()
        except BrokenProcessPool as error:
            raise ReproductionError(
                "a process of the suite was killed, perhaps as memory ran out: the same command goes on, "
                "with fewer processes by --workers"
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in set(multiprocessing.active_children()) - before:
                process.terminate()  # it may have minutes to go, and what is there is whole
            raise


def _begin() -> None:
    """Prepares a process: Ctrl-C is its parent's, without whom it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _work(store: Store, job: Job) -> Job:
    with one_thread():
        store.entry(*job)
    return job
