"""What long commands say while they run: how far they are, what is good, and how long it will still take."""

import math

import pytest
from lightning.pytorch import Callback
from meta_training import fit, make_small

from l2l_lightning import ComparisonSettings, MetaData, MetaTrainer
from l2l_lightning.progress import LINE_EVERY, WorkProgress, duration
from l2l_lightning.training.progress import ProgressLines


class Clock:
    """A time that stands still until a test moves it."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Slow(Callback):
    """Has every meta-step and every validation take so many seconds of a clock."""

    def __init__(self, clock, step, validation):
        self.clock, self.step, self.validation = clock, step, validation

    def on_train_batch_start(self, trainer, model, batch, batch_idx):
        self.clock.now += self.step * batch.length

    def on_validation_batch_start(self, *_):
        self.clock.now += self.validation


def lines_of(folder, capsys, *, step=1.0, validation=0.0, model=None, every=LINE_EVERY, **options):
    clock = Clock()
    callbacks = [Slow(clock, step, validation), ProgressLines(every, clock=clock)]
    capsys.readouterr()
    fit(model or make_small(), folder, *callbacks, **options)
    return [line for line in capsys.readouterr().out.splitlines() if "eta-" in line]


def test_a_meta_training_says_how_long_it_takes_and_every_30_seconds_how_far_it_is(tmp_path, capsys):
    """200 windows of two inner steps, a second each; five validations of ten seconds."""
    options = {"num_rollouts": 100, "val_check_interval": 40, "validation": 10.0}
    first, *others = lines_of(tmp_path, capsys, **options)
    # After the first meta-step, which is not counted, and two more.
    assert first == (
        "Meta-training: 200 meta-steps, about 7 min on this machine without its validations."
    )  # 197 of them are left, of two seconds
    steps = [int(line.split()[1]) for line in others]
    assert steps == [18, 33, 43, 58, 73, 83, 98, 113, 123, 138, 153, 163, 178, 193]
    assert others[0] == "meta-step 18 of 200, about 6 min left without its validations"
    assert "validation loss" in others[2]
    assert "(least " in others[2]
    assert ", at θ0 " in others[2]
    # 102 meta-steps of two seconds and three validations of ten.
    assert others[6].endswith(", about 4 min left")
    assert others[-1].endswith(", about 20 s left")


def test_windows_of_other_lengths_take_other_times(tmp_path, capsys):
    """The first half has 40 windows of one step, the second 10 of four: half of the time is in each."""
    model = make_small(unroll=[1, 4], task=None)
    lines = lines_of(tmp_path, capsys, step=30.0, model=model, num_rollouts=20, limit_val_batches=0)
    at = {int(line.split()[1]): line for line in lines[1:]}
    assert at[40].endswith("meta-step 40 of 50, about 20 min left")
    assert at[45].endswith("meta-step 45 of 50, about 10 min left")


def test_beside_a_bar_only_the_estimate_is_said_and_of_a_short_run_nothing(tmp_path, capsys):
    assert len(lines_of(tmp_path / "bar", capsys, every=math.inf, step=100.0)) == 1
    assert lines_of(tmp_path / "short", capsys, step=0.1) == []


def test_a_run_that_is_cut_counts_what_it_will_run(tmp_path, capsys):
    (line,) = lines_of(tmp_path, capsys, every=math.inf, num_rollouts=50, max_steps=8, limit_val_batches=0)
    assert line == "Meta-training: 8 meta-steps, about 10 s on this machine."
    (line,) = lines_of(
        tmp_path, capsys, every=math.inf, num_rollouts=50, accumulate_grad_batches=4, limit_val_batches=0
    )
    assert line.startswith("Meta-training: 25 meta-steps, ")


def test_work_without_a_terminal_is_a_line_now_and_then(capsys):
    clock = Clock()
    with WorkProgress(30, "runs", clock=clock) as progress:
        progress.report("first")
        for _ in range(10):
            clock.now += 12
            progress.count()
        progress.report("second")
        progress.expect(100)
        progress.report("too soon")
        clock.now += LINE_EVERY
        progress.report("third")
    assert capsys.readouterr().out.splitlines() == [
        "0 of 30 runs: first",
        "10 of 30 runs: second; at this pace about 4 min left",
        "10 of 110 runs: third; at this pace about 25 min left",
    ]


def test_short_work_and_other_processes_say_nothing(capsys):
    clock = Clock()
    with WorkProgress(3, "runs", 5.0, clock=clock) as short, WorkProgress(3, "runs", quiet=True) as other:
        other.report("not the first process")
        clock.now += 4
        short.report("too soon")
        assert capsys.readouterr().out == ""
        clock.now += 1
        short.report("now")
    assert capsys.readouterr().out == "0 of 3 runs: now\n"


@pytest.mark.parametrize("seconds", [1, 12, 59, 61, 3599, 3601, 86399, 10**6])
def test_durations_are_near_the_time(seconds):
    words = duration(seconds).removeprefix("about ").removeprefix("less than ").split()
    units = {"s": 1, "min": 60, "h": 3600}
    said = sum(int(number) * units[unit] for number, unit in zip(words[::2], words[1::2], strict=True))
    assert abs(said - seconds) <= max(0.1 * seconds, 9)


@pytest.mark.parametrize("shows", [True, False])
def test_searches_and_comparisons_say_how_far_they_are(shows, tmp_path, capsys, monkeypatch):
    clock = Clock()

    def later():
        clock.now += 40.0
        return clock.now

    monkeypatch.setattr(
        "l2l_lightning.training.trainer.WorkProgress", lambda *options: WorkProgress(*options, clock=later)
    )
    trainer = MetaTrainer(logger=False, default_root_dir=tmp_path, accelerator="cpu")
    trainer.shows_progress = shows
    settings = ComparisonSettings(2, 2, baselines=["sgd", "momentum"])
    trainer.compare(make_small(), MetaData(), settings, out=str(tmp_path / "out"))
    printed = capsys.readouterr().out
    assert ("runs: tuning momentum (momentum 0.95), learning rate " in printed) is shows
    assert (" of 3 optimizers: comparing, momentum runs on 2 optimizees; at this pace " in printed) is shows
