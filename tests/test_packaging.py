"""What is installed: all of the packages' files, metadata that an index takes, extras with a reason each."""

import itertools
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import l2l_lightning
from l2l_lightning.extras import EXTRAS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NOT_IN_THE_SDIST = re.compile(r"^\.git|^dist/")


def tracked(*folders):
    """The files that git knows, which are all that may be released."""
    done = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", *folders], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("not a checkout of git's")
    return {name for name in done.stdout.decode().split("\0") if name}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, and the wheel that is built of it, as they would be released."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not re.search(r"(?i)deprecat|absent from|not found", done.stdout + done.stderr)
    return folder


@pytest.mark.slow
def test_the_wheel_holds_the_packages_whole_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert found == {name.removeprefix("kernels/") for name in tracked("l2l_lightning", "kernels")}


@pytest.mark.slow
def test_the_sdist_holds_what_builds_and_tests_it(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        files = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    expected = {name for name in tracked() if not NOT_IN_THE_SDIST.search(name)}
    assert expected - files == set()
    assert {name for name in files - expected if ".egg-info/" not in name} == {"PKG-INFO", "setup.cfg"}


@pytest.mark.slow
def test_an_index_takes_both(built):
    pytest.importorskip("twine")
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, built.iterdir())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_the_unpacked_wheel_runs_elsewhere_and_the_command_says_its_own_name(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    (command,) = metadata.Distribution.at(next(site.glob("*.dist-info"))).entry_points
    assert (command.name, command.value) == ("l2l", "l2l_lightning.__main__:main")
    module, function = command.value.split(":")
    script = tmp_path / "l2l"  # as pip writes it
    script.write_text(f"import sys\nfrom {module} import {function}\nsys.exit({function}())\n")
    environment = {
        "PYTHONPATH": str(site),
        "PATH": "",
        "HOME": str(tmp_path),
        "L2L_KERNELS_BACKEND": "reference",
    }
    for arguments, said in (
        ("info", f"l2l-lightning {l2l_lightning.__version__}, "),
        ("--help", "usage: l2l COMMAND"),
        ("fit --help", "usage: l2l "),
        ("fit --nonsense", "(l2l fit --help lists the options)"),
        (f"fit {TINY}", "learned"),
    ):
        done = subprocess.run(
            [sys.executable, str(script), *arguments.split()],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment,
            check=False,
        )
        assert said in done.stdout + done.stderr
        assert str(ROOT) not in done.stdout + done.stderr


TINY = (
    "--data.num_rollouts=1 --model.horizon=2 --model.unroll=2 --wandb=off --comparison.baselines=[sgd] "
    "--comparison.num_optimizees=2 --comparison.num_tuning_optimizees=2 --trainer.accelerator=cpu"
)


def requirements(lines):
    return {requirement.name: requirement for requirement in map(Requirement, lines)}


def test_the_extras_that_messages_name_bring_the_packages():
    packages = {"dog": "dog-optimizer", "sklearn": "scikit-learn"}
    brought_by = {"PIL": "torchvision"}
    for extra, modules in EXTRAS.items():
        brings = requirements(PROJECT["optional-dependencies"][extra])
        for module in modules:
            assert {module, packages.get(module), brought_by.get(module)} & set(brings), module


def test_every_dependency_has_its_reason():
    text = (ROOT / "docs/dependencies.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `([^`\[]+)`", text, flags=re.MULTILINE))
    lines = itertools.chain(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    assert named == set(requirements(lines)) - {"l2l-lightning"}
    for extra in PROJECT["optional-dependencies"]:
        assert f"[{extra}]" in text


def test_the_core_requires_what_a_rule_needs_and_no_more():
    core = {"torch", "numpy", "safetensors", "PyYAML", "filelock"}
    assert set(requirements(PROJECT["dependencies"])) == core


def test_the_versions_that_are_claimed_begin_with_the_lowest_that_installs():
    claimed = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if ":: Python :: 3." in line]
    assert PROJECT["requires-python"] == f">={claimed[0]}"
    assert claimed == [f"3.{minor}" for minor in range(11, 11 + len(claimed))]
