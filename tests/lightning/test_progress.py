"""What a run says of how far it is, by a clock of the tests' own."""

import itertools
import re

import pytest
from meta_training import make_small

from l2l_lightning import MetaData, MetaTrainer
from l2l_lightning.progress import ProgressLines, duration
from l2l_lightning.training.progress import MetaStepBar, MetaStepLines


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "1 s"), (89.4, "89 s"), (90, "2 min"), (5399, "90 min"), (5400, "1.5 h"), (360000, "100.0 h")],
)
def test_a_time_is_in_the_unit_that_one_would_say_it_in(seconds, text):
    assert duration(seconds) == text


def test_lines_are_half_a_minute_apart_and_the_first_comes_soon(capsys):
    now = [0.0]
    lines, printed = ProgressLines(clock=lambda: now[0]), []
    for second in range(100):
        now[0] = float(second)
        lines.report(lambda: "x", done=second, total=200)
        if capsys.readouterr().out:
            printed.append(second)
    assert printed == [5, 35, 65, 95]


def test_the_time_left_is_at_the_rate_since_the_start(capsys):
    now = [50.0]
    lines = ProgressLines(clock=lambda: now[0])
    now[0] = 70.0
    lines.report(lambda: "half of a half", done=5, total=20)
    assert capsys.readouterr().out == "half of a half, about 60 s left\n"  # 4 s each, 15 to go


def fit_in_lines(folder, num_rollouts=2):
    clock = itertools.count(0, 31)  # half a minute passes whenever it is looked at
    options = {"max_epochs": 1, "inference_mode": False, "accelerator": "cpu", "logger": False}
    options |= {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    trainer = MetaTrainer(
        **options,
        default_root_dir=folder,
        val_check_interval=2,
        callbacks=[MetaStepLines(clock=lambda: float(next(clock)))],
    )
    trainer.fit(make_small(), MetaData(num_rollouts=num_rollouts))
    return trainer


def test_a_fit_without_a_terminal_says_the_meta_step_the_validation_and_the_time(tmp_path, capsys):
    trainer = fit_in_lines(tmp_path)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("meta-step")]
    total = trainer.global_step
    assert [re.match(r"meta-step (\d+) of (\d+)", line).groups() for line in lines] == [
        (str(step), str(total)) for step in (*range(1, total + 1), total)
    ]
    assert all(re.search(r", about \d+ \w+ left$", line) for line in lines[:-2])
    assert re.search(r", in \d+ min$", lines[-1])
    final, initial = (float(trainer.callback_metrics[f"val/{name}_loss"]) for name in ("final", "initial"))
    words = f"validation loss {final:.3g} ({initial:.3g} before the first inner step)"
    assert words in lines[-1]


def test_the_bar_says_that_it_counts_meta_steps():
    assert MetaStepBar()._get_train_description(0).strip() == "meta-steps"
