"""Finished runs lined up by `compare RUN RUN…`, and their curves drawn by `plot`."""

import csv
import json

import pytest
import torch
import yaml

from l2l_lightning.cli import main
from l2l_lightning.comparison.curves_file import curves_text, read_curves
from l2l_lightning.comparison.result import Comparison, Result
from l2l_lightning.comparison.runs import line_up, read_run
from l2l_lightning.comparison.settings import differing, flat, plain, short_text
from l2l_lightning.comparison.statistics import Interval, final_losses, lead, sum_losses
from l2l_lightning.errors import ResultsError
from l2l_lightning.files import write_json

T, K = 12, 5


def losses(seed, scale=1.0, steps=T, count=K):
    """Of optimizees that all begin alike, whatever the optimizer."""
    start = 1 + torch.arange(count, dtype=torch.float64)
    falls = torch.rand(steps, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    curve = start * torch.exp(-scale * falls.cumsum(0))
    return torch.cat([start[None], curve[:-1]])


def write_run(folder, number=0, settings=None, adam_rate=0.02, **changes):
    """A finished run's folder, without its picture."""
    options = {"model": {"learning_rate": 0.003, "unroll": 20}} | (settings or {})
    fields = {
        **{"task": "Quadratic(dim=10)", "horizon": T, "num_optimizees": K, "data_source": "none", "seed": 0},
        **{"device": "a processor", "dtype": "float32"},
    } | changes
    sizes = {"steps": fields["horizon"], "count": fields["num_optimizees"]}
    results = {
        "learned": Result(losses(100 + number, 1.2, **sizes), 0.5, None),
        "adam": Result(losses(7, 1.0, **sizes), 0.25, adam_rate, {"beta1": 0.9}),
    }
    comparison = Comparison(**fields, results=results, settings=options)
    folder.mkdir(parents=True)
    (folder / "curves.csv").write_text(curves_text(comparison.task, comparison.losses), encoding="utf-8")
    write_json(folder / "summary.json", comparison.summary())
    return folder


def with_rate(rate, **more):
    return {"model": {"learning_rate": rate, "unroll": 20} | more}


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main(list(map(str, arguments)))
    assert stopped.value.code not in (0, None)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("error: ")
    return error


def test_runs_are_paired_named_by_what_differs_and_share_their_baselines(tmp_path, capsys):
    folders = [write_run(tmp_path / str(i), i, with_rate(rate)) for i, rate in enumerate((0.003, 0.01, 0.03))]
    out = tmp_path / "out"
    main(["compare", *map(str, folders), f"--out={out}"])
    printed = capsys.readouterr().out
    assert "learning_rate=0.01" in printed
    assert str(folders[2]) in printed
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    names = ["learning_rate=0.003", "learning_rate=0.01", "learning_rate=0.03"]
    assert list(summary["optimizers"]) == [*names, "adam"]
    assert summary["reference"] == names[0]
    assert [summary["runs"][name]["settings"]["model"]["learning_rate"] for name in names] == [
        0.003,
        0.01,
        0.03,
    ]
    assert summary["runs"][names[1]]["folder"] == str(folders[1])
    first, second, adam = losses(100, 1.2), losses(101, 1.2), losses(7)
    for name, other in ((names[1], second), ("adam", adam)):
        for measure, of in (("final_loss", final_losses), ("sum_loss", sum_losses)):
            expected = Interval.of(of(first) - of(other))
            found = summary["optimizers"][name]["reference_minus_it"][measure]
            assert [found["mean"], *found["ci95"]] == pytest.approx(expected, rel=1e-6)
            assert summary["optimizers"][name]["lead"][measure] == lead(of(first), of(other))
    assert "reference_minus_it" not in summary["optimizers"][names[0]]
    kept = read_curves(out / "curves.csv").losses
    assert list(kept) == [*names, "adam"]
    assert torch.allclose(kept[names[1]], second, rtol=1e-8)
    rows = list(csv.DictReader((out / "table.csv").open(encoding="utf-8")))
    ranked = sorted(
        [*((name, losses(100 + i, 1.2)) for i, name in enumerate(names)), ("adam", adam)],
        key=lambda of: final_losses(of[1]).mean(),
    )
    assert [row["optimizer"] for row in rows] == [name for name, _ in ranked]
    by_name = {row["optimizer"]: row for row in rows}
    assert by_name[names[1]]["model.learning_rate"] == "0.01"
    assert by_name[names[1]]["folder"] == str(folders[1])
    assert float(by_name[names[1]]["difference"]) == pytest.approx(
        float((final_losses(first) - final_losses(second)).mean()), rel=1e-6
    )
    assert by_name[names[0]]["difference"] == by_name["adam"]["model.learning_rate"] == ""
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


def label_of(*folders, **options):
    return [*line_up([read_run(folder) for folder in folders], **options).learned]


def test_labels_are_distinct(tmp_path):
    same = [write_run(tmp_path / name / "20300101-000000", 0) for name in ("a", "b")]
    assert label_of(*same) == ["a/20300101-000000", "b/20300101-000000"]
    long = {f"an_option_with_a_long_name_{i}": i for i in range(3)}
    many = [write_run(tmp_path / "c", 1), write_run(tmp_path / "d", 2, with_rate(0.1, **long))]
    assert label_of(*many) == ["c", "d"]
    adam = [write_run(tmp_path / "adam", 1), write_run(tmp_path / "e", 1)]
    assert label_of(*adam) == ["run adam", "e"]
    assert label_of(same[0]) == ["learned"]
    old = write_run(tmp_path / "old", 3, with_rate(0.1))
    summary = json.loads((old / "summary.json").read_text(encoding="utf-8"))
    for key in ("settings", "reference", "paired"):  # as runs wrote it before
        del summary[key]
    write_json(old / "summary.json", summary)
    (old / "config.yaml").write_text(yaml.safe_dump(with_rate(0.5)), encoding="utf-8")
    assert label_of(many[0], old) == ["learning_rate=0.003", "learning_rate=0.5"]


def test_baselines_that_ran_otherwise_are_shown_for_each_run(tmp_path):
    folders = [
        write_run(tmp_path / str(i), i, with_rate(0.1 * (i + 1)), adam_rate=0.02 * (i + 1)) for i in range(2)
    ]
    comparison = line_up([read_run(folder) for folder in folders])
    labels = ["learning_rate=0.1", "learning_rate=0.2"]
    assert list(comparison.results) == [*labels, *(f"adam ({label})" for label in labels)]
    assert comparison.results[f"adam ({labels[1]})"].learning_rate == 0.04


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"task": "Quadratic(dim=20)"}, "task Quadratic(dim=20), not Quadratic(dim=10)"),
        ({"seed": 3}, "seed 3, not 0"),
        ({"horizon": 15}, "horizon 15, not 12"),
        ({"num_optimizees": 4}, "num_optimizees 4, not 5"),
        ({"data_source": "digits"}, "data_source digits, not none"),
        ({"dtype": "float64"}, "dtype float64, not float32"),
    ],
)
def test_runs_on_other_optimizees_are_refused_or_shown_without_differences(change, said, tmp_path, capsys):
    first = write_run(tmp_path / "first")
    other = write_run(tmp_path / "other", 1, with_rate(0.5), **change)
    out = tmp_path / "out"
    error = fails(capsys, "compare", first, other, f"--out={out}")
    assert f"{other} cannot be paired with {first}: it has {said}" in error
    assert "--unpaired" in error
    assert not out.exists()
    comparison = line_up([read_run(first), read_run(other)], paired=False)
    assert "unpaired" in comparison.title
    assert comparison.compared == []
    assert "lead" not in str(comparison.table())
    with pytest.raises(ValueError, match="not run on the same optimizees"):
        comparison.difference("learning_rate=0.5")
    assert len([name for name in comparison.results if name.startswith("adam")]) == 2
    if "horizon" in change:
        main(["compare", str(first), str(other), f"--out={out}", "--unpaired", "--format=svg"])
        assert {path.name for path in out.iterdir()} == {
            "curves.csv",
            "curves.svg",
            "summary.json",
            "table.csv",
        }


def test_runs_on_one_data_set_in_two_places_are_paired_and_by_other_first_losses_not(tmp_path):
    folders = [write_run(tmp_path / place, 0, data_source=f"MNIST at /{place} (6 images)") for place in "ab"]
    assert len(label_of(*folders)) == 2
    path = folders[1] / "curves.csv"
    kept = read_curves(path)
    path.write_text(
        curves_text(kept.task, {name: 2 * value for name, value in kept.losses.items()}), encoding="utf-8"
    )
    with pytest.raises(ResultsError, match="it has other first losses"):
        label_of(*folders)


def test_what_is_no_finished_run_is_named_in_one_line(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    nothing, empty, begun, mixture, odd, apart = (tmp_path / name for name in "nebmoa")
    for folder in (empty, begun, odd):
        folder.mkdir()
    (begun / "config.yaml").touch()
    member = write_run(mixture / "member-2")
    write_run(apart)
    (apart / "curves.csv").write_bytes((run / "curves.csv").read_bytes().replace(b"adam", b"nadam"))
    out = f"--out={tmp_path / 'out'}"
    for folder, said in {
        nothing: "does not exist",
        empty: "is not the folder of a finished run",
        begun: f"has not come to its comparison: finish it with fit --run_folder {begun}",
        mixture: f"name one member's folder, such as {member}",
        run / "curves.csv": "is a file, not a run's folder",
        apart: "curves.csv beside it is of another comparison",
    }.items():
        assert said in fails(capsys, "compare", run, folder, out)
    for damage in ("{", "[]", '{"optimizers": 3}', "[" * 100_000, (run / "summary.json").read_text()[:-40]):
        (odd / "summary.json").write_text(damage)
        assert f"{odd / 'summary.json'} is not a comparison's summary, or is damaged" in fails(
            capsys, "compare", odd, out
        )
    assert "is given twice" in fails(capsys, "compare", run, run, out)
    assert "lists the options" in fails(capsys, "compare", run, "--ckpt_path=last.ckpt")
    assert "no optimizer lion: choose from" in fails(capsys, "compare", run, out, "--optimizers", "lion")
    assert "or begin with the folders of finished runs" in fails(capsys, "compare", "--out=x")
    assert not (tmp_path / "out").exists()


def test_no_folder_is_written_over_but_an_earlier_comparison_of_runs(tmp_path, capsys):
    folders = [write_run(tmp_path / str(i), i, with_rate(0.1 * i)) for i in range(2)]
    before = (folders[0] / "curves.csv").read_bytes()
    for taken in (folders[0], tmp_path):
        assert f"--out {taken} holds something else" in fails(capsys, "compare", *folders, f"--out={taken}")
    assert (folders[0] / "curves.csv").read_bytes() == before
    out = tmp_path / "out"
    for optimizers in ([], ["--optimizers", "adam"]):
        main(["compare", *map(str, folders), f"--out={out}", "--format=svg", *optimizers])
    assert (out / "curves.svg").is_file()


def test_settings_by_the_names_of_their_options():
    task = {"class_path": "l2l_lightning.tasks.Quadratic", "init_args": {"dim": 10}, "dict_kwargs": {"x": 1}}
    nested = {"seed_everything": 3, "model": {"task": task, "horizon": [1, 2]}, "trainer": {}}
    assert flat(nested) == {
        **{"seed_everything": 3, "model.task": "l2l_lightning.tasks.Quadratic", "model.task.dim": 10},
        **{"model.task.x": 1, "model.horizon": [1, 2], "trainer": {}},
    }
    folders = {
        "trainer": {"default_root_dir": "x", "logger": {"class_path": "a.B"}},
        "wandb_tags": ["x"],
        "out": "y",
    }
    assert differing([folders | {"seed_everything": 0}, {"seed_everything": 1}]) == [
        {"seed_everything": 0},
        {"seed_everything": 1},
    ]
    assert (
        short_text({"seed_everything": 0, "model.task": "a.b.Cat", "x.on": None})
        == "seed=0, task=Cat, on=None"
    )
    assert (
        short_text({"horizon": [100, 200], "x.path": "./some file.txt"})
        == "horizon=[100, 200], path=./some file.txt"
    )
    assert json.dumps(plain({"a": float("nan"), "b": {1}, "c": torch.float32}), allow_nan=False)


@pytest.mark.parametrize("suffix", ["png", "SVG"])
def test_a_run_is_drawn_from_its_curves_alone_the_same_every_time(suffix, tmp_path, capsys):
    folder = write_run(tmp_path / "run")
    (folder / "summary.json").unlink()
    out = tmp_path / "new" / f"picture.{suffix}"
    main(
        [
            "plot",
            str(folder),
            f"--out={out}",
            "--optimizers",
            "learned",
            "--title",
            "A run",
            "--scale",
            "linear",
        ]
    )
    assert str(out) in capsys.readouterr().out
    first = out.read_bytes()
    main(
        [
            "plot",
            str(folder / "curves.csv"),
            f"--out={out}",
            "--optimizers=learned",
            "--title=A run",
            "--scale=linear",
        ]
    )
    assert out.read_bytes() == first


def test_what_plot_cannot_draw_is_named_in_one_line(tmp_path, capsys):
    folder = write_run(tmp_path / "run")
    (tmp_path / "foreign.csv").write_text("step,value\n1,2\n")
    for arguments, said in {
        (folder, "--out=x.jpg"): "--out x.jpg: a picture's name must end in one of .png, .pdf, .svg",
        (folder, "--out=x"): "must end in one of .png, .pdf, .svg",
        (tmp_path / "foreign.csv",): "its first line has no column optimizer, seed, loss",
        (tmp_path,): f"there is no curves.csv in {tmp_path}",
        (tmp_path / "nothing",): "there is no file",
        (folder, "--optimizers=lion"): "there is no optimizer lion: choose from learned, adam",
        (folder, "--scale=cubic"): "scale",
        (): "lists the options",
    }.items():
        assert said in fails(capsys, "plot", *arguments)
    write_run(tmp_path / "m" / "member-1")
    assert f"such as {tmp_path / 'm' / 'member-1'}" in fails(capsys, "plot", tmp_path / "m")
    negative = {"adam": torch.tensor([[1.0, 2.0], [-1.0, -2.0]])}
    (tmp_path / "negative.csv").write_text(curves_text("task", negative))
    assert "use --scale linear" in fails(capsys, "plot", tmp_path / "negative.csv", "--scale=log")
