"""`info` lists what the package has cached, with its size; `--clear-cache` removes it and nothing else."""

import json

import pytest
from l2l_kernels.cpu import library

from l2l_lightning.cli import main
from l2l_lightning.cli.caches import caches


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """The folders of all caches, each with a file of ours of 1,000,000 bytes or so, and one of the user's."""
    library.load()  # or compiles, once and for all, before the folder is another
    kernels, hub = tmp_path / "kernels", tmp_path / "hub"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(library.CACHE_VARIABLE, str(kernels))
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    for folder in (kernels, tmp_path / "tuning", tmp_path / "runs/tuning"):
        folder.mkdir(parents=True)
        (folder / "notes.json").write_text('{"mine": 1}')
    search = json.dumps({"search": {}, "fingerprint": "x" * 999_900, "origin": {}})
    for folder in (tmp_path / "tuning", tmp_path / "runs/tuning"):
        (folder / "sgd-0123456789ab.json").write_text(search)
    rule = hub / "models--me--rule/snapshots/0123/rule.safetensors"
    rule.parent.mkdir(parents=True)
    rule.write_bytes(bytes(2_000_000))
    return {"kernels": kernels, "tuning": tmp_path / "tuning", "runs": tmp_path / "runs/tuning", "hub": rule}


@pytest.fixture
def compiled(folders):
    """A kernel's file as the library names it."""
    path = folders["kernels"] / f"cpu-{'0' * 16}-{'0' * 64}.so"
    path.write_bytes(bytes(3_000_000))
    return path


def test_info_lists_every_cache_with_its_size(folders, compiled, capsys):
    main(["info"])
    lines = [line.strip() for line in capsys.readouterr().out.partition("Caches (")[2].splitlines()[1:]]
    assert lines == [
        f"compiled CPU kernels: 1 in {folders['kernels']}, 3.00 MB",
        "tuned baselines: 1 in runs/tuning, 1.00 MB",
        "tuned baselines: 1 in tuning, 1.00 MB",
        f"rules from the hub: 1 in {folders['hub'].parents[3]}, 2.00 MB "
        "(the command `hf cache rm` removes them)",
    ]


def test_clear_cache_removes_ours_and_leaves_the_users_and_the_hubs(folders, compiled, capsys):
    main(["info", "--clear-cache"])
    printed = capsys.readouterr().out
    assert printed.count("removed: ") == 3
    assert printed.count("left: rules from the hub") == 1
    assert not compiled.exists()
    for name in ("kernels", "tuning", "runs"):
        assert [path.name for path in folders[name].iterdir()] == ["notes.json"]
    assert folders["hub"].is_file()
    assert [len(cache.files) for cache in caches()] == [0, 0, 0, 1]


def test_a_folder_that_is_left_empty_goes_too_and_a_second_time_does_nothing(folders, compiled, capsys):
    (folders["kernels"] / "notes.json").unlink()
    main(["info", "--clear-cache"])
    assert not folders["kernels"].exists()
    main(["info", "--clear-cache"])
    assert f"compiled CPU kernels: 0 in {folders['kernels']}, 0.00 MB" in capsys.readouterr().out
