"""Files that somebody else wrote: nothing in them is executed, and what they make us take is bounded."""

import contextlib
import copy
import importlib
import inspect
import io
import math
import pickle
import random
import sys
import typing
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from meta_training import fit

from l2l_lightning import CoordinatewiseLSTM, MetaLearner, Quadratic
from l2l_lightning.cli.stored_options import NOT_RESUMED, SECTIONS, SINGLE, resumed_options
from l2l_lightning.training import checkpoints
from l2l_lightning.training.callbacks import CollapseGuard, PhiAveraging
from l2l_lightning.training.checkpoints import CheckpointError
from l2l_lightning.trust import PATHS, foreign_references

POPEN = "lightning.pytorch.strategies.launchers.subprocess_script.subprocess.Popen"


def popen(mark):
    return {"class_path": POPEN, "init_args": {"args": f"touch {mark}", "shell": True}}


# The configuration beside a checkpoint.

OPTIONS = ("accelerator", "strategy", "profiler", "logger", "callbacks", "plugins")
"""Trainer options that take objects."""


def spellings(mark):
    """Ways to have an option of a class's or any type call something, by name."""
    target = popen(mark)
    return {
        "class": target,
        "path": POPEN,
        "YAML in a text": str(target),
        "a list": [target],
        "a list of paths": [POPEN],
        "a short name": "WandbLogger",
        "torch": {"class_path": "torch.nn.os.system", "init_args": {}},
        "the package": "l2l_lightning.tasks.base.importlib.import_module",
        "a file": "./evil.yaml",
        "without a class": {"args": "touch x"},
        "inside": {"class_path": "lightning.pytorch.strategies.DDPStrategy", "init_args": {"a": target}},
        "keywords": {
            "class_path": "lightning.pytorch.loggers.WandbLogger",
            "dict_kwargs": {"name": target},
        },
    }


ELSEWHERE = {
    "a dotted key": {"trainer.strategy": {"class_path": POPEN}},
    "a dotted key in a section": {"trainer": {"strategy.class_path": POPEN}},
    "an appending key": {"trainer": {"callbacks+": {"class_path": POPEN}}},
    "a section from a file": {"trainer": "./evil.yaml"},
    "another configuration": {"config": "./evil.yaml"},
    "an unknown section": {"optimizer": {"class_path": POPEN}},
    "a private key": {"trainer": {"__path__": POPEN}},
    "a plain option": {"trainer": {"max_epochs": {"class_path": POPEN, "init_args": {"args": ["touch"]}}}},
    "a plain section": {"early_stopping": {"monitor": [{"class_path": POPEN}]}},
    "a single option": {"wandb": {"class_path": POPEN}},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("trust", [(), ("lightning.pytorch", "lightning.fabric")], ids=["", "trusting"])
def test_an_option_that_takes_objects_takes_none_from_a_file(option, trust, tmp_path):
    """With Lightning trusted, what is not defined in Lightning is refused all the same."""
    mark = tmp_path / "mark"
    for value in spellings(mark).values():
        with pytest.raises(CheckpointError, match=r"config\.yaml (names|has) .*--trust"):
            resumed_options("config.yaml", {"trainer": {option: value}}, trust)
    assert not mark.exists()


@pytest.mark.parametrize("where", ELSEWHERE)
def test_there_is_no_other_way_in(where):
    with pytest.raises(CheckpointError, match=r"config\.yaml has "):
        resumed_options("config.yaml", ELSEWHERE[where], ["lightning.pytorch"])


def takes_objects(annotation):
    """Whether a parameter can be given an object of some class: it has another type than plain values."""
    plain = (int, float, bool, str, bytes, Path, type(None))
    if annotation in plain or typing.get_origin(annotation) is typing.Literal:
        return False
    return not (typing.get_args(annotation) and not any(map(takes_objects, typing.get_args(annotation))))


def reachable():
    """Every parameter of Lightning's loggers, callbacks, strategies, plugins, profilers and accelerators."""
    for kind in ("accelerators", "callbacks", "loggers", "plugins", "profilers", "strategies"):
        module = importlib.import_module(f"lightning.pytorch.{kind}")
        for name in module.__all__:
            cls = getattr(module, name)
            if isinstance(cls, type):
                for parameter in list(inspect.signature(cls.__init__).parameters.values())[1:]:
                    if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                        yield kind, f"{module.__name__}.{name}", parameter


def test_no_argument_of_lightnings_classes_is_a_way_in(tmp_path):
    """With and without trust in Lightning: an argument's type is not asked."""
    mark, count, objects = tmp_path / "mark", 0, 0
    for kind, path, parameter in reachable():
        option = (
            kind if kind in ("callbacks", "plugins") else kind.rstrip("s").replace("strategie", "strategy")
        )
        objects += takes_objects(parameter.annotation)
        for value in (popen(mark), POPEN, [popen(mark)], str(popen(mark))):
            if isinstance(value, str) and parameter.name in PATHS:
                continue  # a text, and nothing else
            spec = {"class_path": path, "init_args": {parameter.name: value}}
            for trust in ((), ("lightning.pytorch",)):
                with pytest.raises(CheckpointError, match=r"subprocess\.Popen"):
                    resumed_options("config.yaml", {"trainer": {option: [spec]}}, trust)
                count += 1
    assert count > 1000
    assert objects > 40
    assert not mark.exists()


def test_what_is_defined_in_a_trusted_module_is_taken():
    """And what it has imported from elsewhere is not."""
    spec = {
        "class_path": "lightning.pytorch.callbacks.LambdaCallback",
        "init_args": {"on_fit_start": "mine.f"},
    }
    with pytest.raises(CheckpointError, match=r"names mine\.f: .*--trust mine"):
        resumed_options("c", {"trainer": {"callbacks": [spec]}}, ["lightning.pytorch.callbacks"])
    config = {
        "trainer": {"callbacks": [spec], "logger": {"class_path": "lightning.pytorch.loggers.CSVLogger"}}
    }
    trust = ["lightning.pytorch.callbacks", "lightning.pytorch.loggers.CSVLogger", "mine.f"]
    assert resumed_options("c", config, trust) == config
    assert foreign_references("statistics.mean", ["statistics"]) == []
    assert foreign_references("statistics.math.sqrt", ["statistics"]) == ["statistics.math.sqrt"]
    assert foreign_references("json.decoder.JSONDecoder", ["json"]) == []  # a part of a package


def test_what_a_run_writes_is_taken_whole(tiny_fit):
    config = yaml.safe_load((tiny_fit() / "config.yaml").read_text(encoding="utf-8"))
    assert set(config) - set(NOT_RESUMED) == {*SECTIONS, *SINGLE}
    taken = resumed_options("config.yaml", config)
    assert taken == {key: value for key, value in config.items() if key not in NOT_RESUMED}
    names = {
        "accelerator": "cpu",
        "strategy": "ddp",
        "profiler": "simple",
        "max_time": {"hours": 1},
        "devices": [0],
    }
    assert resumed_options("c", {"trainer": names}) == {"trainer": names}


def test_a_configuration_that_repeats_itself_is_read_in_time():
    lines = ["trainer:", "  callbacks:", "    - &a0 [x, x]"]
    lines += [f"    - &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    with pytest.raises(CheckpointError, match=r"has trainer\.callbacks"):
        resumed_options("c", yaml.safe_load("\n".join(lines)))


# Checkpoints.


def make_model(task=None):
    rule = CoordinatewiseLSTM(num_layers=1, hidden_size=2, preprocessing="identity")
    return MetaLearner(
        task or Quadratic(dim=2), rule, horizon=4, unroll=2, num_tasks=2, num_validation_optimizees=2
    )


def callbacks(folder):
    stopping = EarlyStopping("meta_loss", patience=3, check_on_train_epoch_end=True)
    best = ModelCheckpoint(folder / "kept", monitor="meta_loss", every_n_train_steps=1)
    return [PhiAveraging(0.5), CollapseGuard(), stopping, best]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A run that was cut in its second rollout, and its folder."""
    folder = tmp_path_factory.mktemp("written")
    trainer = fit(make_model(), folder, *callbacks(folder), max_steps=3, num_rollouts=4, limit_val_batches=0)
    path = folder / "run" / "checkpoints" / "cut.ckpt"
    trainer.save_checkpoint(path)
    return path, folder


@pytest.fixture
def sealed(written, tmp_path):
    """Writes a changed checkpoint with its digest: whoever changes it can compute that."""

    def write(change):
        content = copy.deepcopy(checkpoints.read(written[0]))
        change(content)
        checkpoints.write(content, tmp_path / "changed.ckpt")
        return tmp_path / "changed.ckpt"

    return write


TASK = {
    "class": {"class_path": POPEN, "init_args": {"args": "touch", "shell": True}},
    "torch's imports": {"class_path": "torch.nn.os.system", "init_args": {}},
    "the package's imports": {
        "class_path": "l2l_lightning.tasks.base.importlib.import_module",
        "init_args": {},
    },
    "another class of the package": {"class_path": "l2l_lightning.cli.main", "init_args": {}},
    "a short name": {"class_path": "Quadratic", "init_args": {}},
    "function": {
        "class_path": "l2l_lightning.tasks.FunctionTask",
        "init_args": {"f": "torch.nn.functional.importlib.import_module", "dim": 2},
    },
    "YAML": {
        "class_path": "l2l_lightning.tasks.ModuleTask",
        "init_args": {"module": f"{{class_path: {POPEN}, init_args: {{args: touch}}}}"},
    },
    "member": {"class_path": "l2l_lightning.tasks.Mixture", "init_args": {"tasks": [{"class_path": POPEN}]}},
    "member's path": {"class_path": "l2l_lightning.tasks.Mixture", "init_args": {"tasks": [POPEN]}},
}


@pytest.mark.parametrize("where", TASK)
def test_a_task_of_anything_but_the_packages_is_refused(where, sealed, fails):
    path = sealed(lambda c: c["l2l_lightning"]["model"].update(task=TASK[where]))
    with pytest.raises(CheckpointError, match=r"changed\.ckpt names .*--trust"):
        MetaLearner.from_checkpoint(path)
    assert "--trust" in fails("compare", f"--ckpt_path={path}")


def test_a_file_that_a_task_names_is_not_read_as_one(sealed, fails, tmp_path, monkeypatch):
    mark = tmp_path / "mark"
    monkeypatch.chdir(tmp_path)
    Path("evil").write_text(yaml.safe_dump(popen(mark)), encoding="utf-8")
    mixture = {"class_path": "l2l_lightning.tasks.Mixture", "init_args": {"tasks": ["evil"]}}
    path = sealed(lambda c: c["l2l_lightning"]["model"].update(task=mixture))
    assert fails("compare", f"--ckpt_path={path}").count("\n") == 1
    assert not mark.exists()


def test_a_command_runs_nothing_of_a_file(written, fails, tmp_path):
    """From end to end, as somebody who was given a run's folder goes on with it."""
    path, _ = written
    config, mark = path.parent.parent / "config.yaml", tmp_path / "mark"
    strategy = {"class_path": "lightning.pytorch.strategies.DDPStrategy", "init_args": {}}
    strategy["init_args"]["ddp_comm_state"] = popen(mark)
    for content in ({"trainer": {"strategy": strategy}}, {"trainer.strategy": strategy}, *ELSEWHERE.values()):
        config.write_text(yaml.safe_dump(content), encoding="utf-8")
        try:
            printed = fails(
                "fit", f"--ckpt_path={path}", "--wandb=off", f"--trainer.default_root_dir={tmp_path}"
            )
        finally:
            config.unlink()
        assert printed.startswith(f"error: {config} ")
        assert printed.count("\n") == 1
    assert not mark.exists()


def deflated(path):
    """The checkpoint compressed, with a long entry more, under a digest of its own."""
    content = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
        new.writestr("archive/data/99", bytes(50 * 2**20))
    return content.getvalue()


def repacked(path, change=lambda name, content: content, also=()):
    """The checkpoint's archive with other entries."""
    content = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(content, "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, change(entry.filename, old.read(entry)))
        for name, more in also:
            new.writestr(name, more)
    return content.getvalue()


def seal(content):
    content = content[:-2] + (len(b"l2l_lightning sha256 ") + 64).to_bytes(2, "little")
    import hashlib

    return content + b"l2l_lightning sha256 " + hashlib.sha256(content).hexdigest().encode()


def pickled(call, *arguments):
    class Reduced:
        def __reduce__(self):
            return call, arguments

    return pickle.dumps({"l2l_lightning": Reduced()}, protocol=2)


def archives(path):
    """Files with a valid digest, by what is wrong with them."""
    in_place = lambda data: lambda name, content: data if name.endswith("/data.pkl") else content  # noqa: E731
    whole = repacked(path)
    return {
        "compressed": deflated(path),
        "two pickles": repacked(path, also=[("archive/other/data.pkl", b"N.")]),
        "an entry twice": repacked(path, also=[("archive/data/0", bytes(96))]),
        "a pickle before the archive": pickle.dumps({"a": 1}, protocol=2) + whole,
        "a huge bytearray": repacked(path, in_place(pickled(bytearray, 10**10))),
        "a class of torch": repacked(path, in_place(pickled(torch.Tensor, 3))),
        "a function": repacked(path, in_place(pickled(eval, "1"))),
        "no pickle": repacked(path, in_place(b"\x00\x01")),
        "cut pickle": repacked(path, lambda name, c: c[:-20] if name.endswith("/data.pkl") else c),
    }


def test_an_archive_that_torch_would_not_write_is_refused(written, tmp_path):
    for content in archives(written[0]).values():
        path = tmp_path / "changed.ckpt"
        path.write_bytes(seal(content))
        with pytest.raises(CheckpointError, match=r"changed\.ckpt is not a checkpoint"):
            checkpoints.read(path)


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def doubled(times):
    value = [0]
    for _ in range(times):
        value = [value, value]
    return value


def quantised():
    with contextlib.suppress(RuntimeError):
        return torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8)
    return torch.ones(2).to_sparse()  # builds without quantisation


CONTENTS = {
    "expanded": lambda: torch.ones(1).expand(10**12),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "compressed sparse": lambda: torch.eye(3).to_sparse_csr(),
    "meta": lambda: torch.ones(2, device="meta"),
    "quantised": quantised,
    "deep": lambda: nested(200),
    "doubled": lambda: doubled(60),
    "repeated tensor": lambda: [torch.ones(5000)] * 5000,
    "large number": lambda: 2**200,
    "large negative number": lambda: -(10**600),
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_what_unfolds_beyond_the_file_or_is_not_dense_is_refused(kind, sealed):
    for place in ("state_dict", "callbacks", "rollouts", "unknown"):
        with pytest.raises(CheckpointError, match=r"changed\.ckpt"):
            checkpoints.read(sealed(lambda c, place=place: c.update({place: CONTENTS[kind]()})))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed_everything": 2**40}, "seed_everything"),
        ({"seed_everything": -1}, "seed_everything"),
        ({"meta_steps": 0}, "meta_steps"),
        ({"meta_steps": "x"}, "meta_steps"),
    ],
)
def test_settings_that_no_run_can_have_are_refused(change, message, sealed):
    with pytest.raises(CheckpointError, match=message):
        checkpoints.read(sealed(lambda c: c["l2l_lightning"].update(change)))


def test_a_path_that_no_file_system_takes_is_named(tmp_path):
    for path in ("x" * 5000, "a/" * 3000, str(tmp_path), "nul\0.ckpt"):
        with pytest.raises(CheckpointError, match="no checkpoint at"):
            checkpoints.read(path)


HOSTILE = [None, "os.system", math.nan, -1, [], {}, torch.zeros(3)]


def places(value, prefix=()):
    """Every entry of nested dicts and lists, by its keys."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*prefix, key)
        yield from places(inner, (*prefix, key))


def replaced(content, place, value):
    content = copy.deepcopy(content)
    part = content
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    return content


def test_a_checkpoint_with_any_entry_replaced_is_refused_or_read(written, tmp_path):
    """Of every entry one hostile value, drawn; `slow` goes on from what is read."""
    draw, path = random.Random(0), tmp_path / "changed.ckpt"
    original = checkpoints.read(written[0])
    refused = 0
    for place in list(places(original)):
        checkpoints.write(replaced(original, place, draw.choice(HOSTILE)), path)
        with contextlib.suppress(CheckpointError):
            checkpoints.read(path)
            continue
        refused += 1
    assert refused > 100


@pytest.mark.slow
def test_a_run_goes_on_from_a_checkpoint_with_any_entry_replaced_or_refuses(written, tmp_path):
    path, folder = tmp_path / "changed.ckpt", written[1]
    original = checkpoints.read(written[0])
    names = ("loops", "callbacks", "optimizer_states", "lr_schedulers", "rollouts", "l2l_lightning")
    unnamed = []
    for place in places({name: original[name] for name in names}):
        for value in HOSTILE:
            checkpoints.write(replaced(original, place, value), path)
            try:
                options = {"num_rollouts": 4, "limit_val_batches": 0, "ckpt_path": path}
                fit(make_model(), tmp_path / "again", *callbacks(folder), **options)
            except CheckpointError:
                continue
            except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
                # While it is being restored; the command line then names --ckpt_path.
                frames = [frame.filename for frame in inspect.getinnerframes(error.__traceback__)]
                if not any("checkpoint_connector" in name for name in frames):
                    unnamed.append((place, value, repr(error)))
    assert unnamed == []


def test_a_hostile_checkpoint_ends_a_command_in_one_line(sealed, fails, tmp_path):
    """What Lightning itself refuses while it restores a run."""
    path = sealed(lambda c: c.update(averaging_state={"n_averaged": "x"}))
    options = [
        "--averaging.decay=0.5",
        "--wandb=off",
        "--trainer.accelerator=cpu",
        "--trainer.val_check_interval=2",
    ]
    printed = fails("fit", f"--ckpt_path={path}", f"--trainer.default_root_dir={tmp_path}", *options)
    assert "--ckpt_path" in printed.splitlines()[-1]
    assert "Traceback" not in printed
    assert "evil" not in sys.modules
