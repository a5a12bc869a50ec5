"""Files that somebody else wrote: nothing in them is executed, and what they make us take is bounded."""

import contextlib
import copy
import importlib
import inspect
import io
import math
import pickle
import random
import re
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from meta_training import fit, make_small, watchers

from l2l_lightning import MetaLearner, Quadratic
from l2l_lightning.cli import main
from l2l_lightning.cli.stored_options import NOT_RESUMED, SECTIONS, SINGLE, resumed_options
from l2l_lightning.tasks import FunctionTask, Mixture, SimpleSquare
from l2l_lightning.training import checkpoints
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
        "keywords": {"class_path": "lightning.pytorch.loggers.WandbLogger", "dict_kwargs": {"b": target}},
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


def test_there_is_no_other_way_in():
    for content in ELSEWHERE.values():
        with pytest.raises(CheckpointError, match=r"config\.yaml has "):
            resumed_options("config.yaml", content, ["lightning.pytorch"])


def reachable():
    """Every named argument of Lightning's classes that a trainer's option takes, by option and class."""
    options = {"profiler": "profilers", "logger": "loggers", "strategy": "strategies"}
    for option in OPTIONS:
        module = importlib.import_module(f"lightning.pytorch.{options.get(option, option.rstrip('s') + 's')}")
        for cls in (getattr(module, name) for name in module.__all__):
            if isinstance(cls, type):
                for argument in list(inspect.signature(cls.__init__).parameters.values())[1:]:
                    if argument.kind not in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD):
                        yield option, f"{module.__name__}.{cls.__name__}", argument.name


def test_no_argument_of_lightnings_classes_is_a_way_in(tmp_path):
    """With and without trust in Lightning, whatever the argument's type."""
    target = popen(tmp_path / "mark")
    found = list(reachable())
    assert len(found) > 200
    for option, path, name in found:
        for value in (target, POPEN, [target], str(target), {"rules": {"a": target}}):
            if isinstance(value, str) and name in PATHS:
                continue  # a text, and nothing else
            spec = {"class_path": path, "init_args": {name: value}}
            for trust in ((), ("lightning.pytorch",)):
                with pytest.raises(CheckpointError, match=r"subprocess\.Popen"):
                    resumed_options("config.yaml", {"trainer": {option: [spec]}}, trust)
    assert not (tmp_path / "mark").exists()


def test_what_is_defined_in_a_trusted_module_is_taken():
    """And what it has imported from elsewhere is not."""
    own = {"on_fit_start": "mine.f"}
    spec = {"class_path": "lightning.pytorch.callbacks.LambdaCallback", "init_args": own}
    with pytest.raises(CheckpointError, match=r"names mine\.f: .*--trust mine"):
        resumed_options("c", {"trainer": {"callbacks": [spec]}}, ["lightning.pytorch.callbacks"])
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger"}
    config = {"trainer": {"callbacks": [spec], "logger": logger}}
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
    names = {"accelerator": "cpu", "strategy": "ddp", "profiler": "simple", "devices": [0]}
    plain = {"trainer": names | {"max_time": {"hours": 1}}}
    assert resumed_options("c", plain) == plain


def test_a_configuration_that_repeats_itself_is_read_in_time():
    lines = ["trainer:", "  callbacks:", "    - &a0 [x, x]"]
    lines += [f"    - &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    with pytest.raises(CheckpointError, match=r"has trainer\.callbacks"):
        resumed_options("c", yaml.safe_load("\n".join(lines)))


@pytest.mark.parametrize(
    "content", ["trainer: [", "- 1\n", "!!python/object/apply:os.system [true]", b"\xff\xfe"]
)
def test_a_configuration_that_is_none_is_named(content, checkpoint, fails):
    config = checkpoint.parent.parent / "config.yaml"
    config.write_bytes(content if isinstance(content, bytes) else content.encode())
    try:
        printed = fails("fit", f"--ckpt_path={checkpoint}", "--wandb=off")
    finally:
        config.unlink()
    assert f"error: {config}, which a resumed run reads, is not" in printed
    assert printed.count("\n") == 1


def test_a_command_runs_nothing_of_a_configuration(checkpoint, fails, tmp_path):
    """From end to end, as somebody who was given a run's folder goes on with it."""
    config, mark = checkpoint.parent.parent / "config.yaml", tmp_path / "mark"
    strategy = {"class_path": "lightning.pytorch.strategies.DDPStrategy", "init_args": {}}
    strategy["init_args"]["ddp_comm_state"] = popen(mark)
    for content in ({"trainer": {"strategy": strategy}}, {"trainer.strategy": strategy}, *ELSEWHERE.values()):
        config.write_text(yaml.safe_dump(content), encoding="utf-8")
        options = [f"--ckpt_path={checkpoint}", "--wandb=off", f"--trainer.default_root_dir={tmp_path}"]
        try:
            printed = fails("fit", *options)
        finally:
            config.unlink()
        assert printed.startswith(f"error: {config} ")
        assert printed.count("\n") == 1
    assert not mark.exists()


# Code that a checkpoint names.


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A module whose import leaves a mark; returns the mark's path."""
    mark = tmp_path / "mark"
    (tmp_path / "evil_module.py").write_text(
        f"from pathlib import Path\nPath({str(mark)!r}).touch()\n"
        "from l2l_lightning import CoordinatewiseLSTM, Quadratic\n"
        "class Task(Quadratic): pass\n"
        "class Rule(CoordinatewiseLSTM): pass\n"
        "def f(theta): return theta.square().sum()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield mark
    sys.modules.pop("evil_module", None)


def named(name, class_path, **init_args):
    config = {"class_path": class_path, "init_args": init_args}
    return lambda c: c["l2l_lightning"]["model"].update({name: config})


FUNCTION, MODULE = "l2l_lightning.tasks.FunctionTask", "l2l_lightning.tasks.ModuleTask"
MIXTURE = "l2l_lightning.tasks.Mixture"
NAMED = {
    "task": named("task", "evil_module.Task"),
    "rule": named("rule", "evil_module.Rule", num_layers=1, hidden_size=2, preprocessing="identity"),
    "f": named("task", FUNCTION, f="evil_module.f", dim=2),
    "init": named("task", FUNCTION, f="torch.nn.functional.relu", dim=2, init="evil_module.f"),
    "nested": named("task", FUNCTION, f="evil_module.<locals>.f", dim=2),
    "module": named("task", MODULE, module="evil_module.f"),
    "sample": named("task", MODULE, module="torch.nn.Linear", sample="evil_module.f"),
    "member": named("task", MIXTURE, tasks=[{"class_path": "evil_module.Task", "init_args": {}}]),
    "member's path": named("task", MIXTURE, tasks=[POPEN]),
    "elsewhere in the package": named("task", FUNCTION, f="l2l_lightning.cli.main", dim=2),
    "standard library": named("task", FUNCTION, f="os.system", dim=2),
    "class": named("task", POPEN, args="touch", shell=True),
    "torch's imports": named("task", "torch.nn.os.system"),
    "the package's imports": named("task", "l2l_lightning.tasks.base.importlib.import_module"),
    "a short name": named("task", "Quadratic"),
    "YAML": named("task", MODULE, module=f"{{class_path: {POPEN}, init_args: {{args: touch}}}}"),
}


@pytest.mark.parametrize("where", NAMED)
def test_code_that_a_checkpoint_names_is_not_imported(where, rewrite, evil, fails):
    path = rewrite(NAMED[where])
    message = r"changed\.ckpt names .*: code that is not this package's.*--trust .*trust="
    with pytest.raises(CheckpointError, match=message):
        MetaLearner.from_checkpoint(path)
    for command in ("test", "compare", "fit"):
        assert re.search(message, fails(command, f"--ckpt_path={path}", "--wandb=off"))
    assert not evil.exists()
    assert "evil_module" not in sys.modules


@pytest.mark.parametrize("path", ["evil_module./X", "0evil_module.Rule", "./evil_module.Rule"])
def test_what_is_no_dotted_path_is_not_imported(path, rewrite, evil, tmp_path):
    """An import would take more than Python's names."""
    (tmp_path / "0evil_module.py").write_bytes((tmp_path / "evil_module.py").read_bytes())
    for where in ("task", "rule"):
        changed = rewrite(named(where, path))
        for trust in ([], ["evil_module", "0evil_module"]):
            with pytest.raises(CheckpointError, match=re.escape(path)):
                MetaLearner.from_checkpoint(changed, trust=trust)
    assert not evil.exists()


OBJECT = {"class_path": POPEN, "init_args": {"args": "touch", "shell": True}}


@pytest.mark.parametrize(
    "value",
    ["evil_module.f", "os.system", f"{{class_path: {POPEN}, init_args: {{args: touch}}}}", OBJECT, [OBJECT]],
    ids=["module", "standard library", "YAML", "class", "list"],
)
@pytest.mark.parametrize("name", ["train", "test"])
def test_code_that_a_checkpoint_names_as_its_data_is_not_imported(name, value, rewrite, evil, fails):
    path = rewrite(lambda c: c["l2l_lightning"]["data"].update({name: value}))
    for command in ("test", "fit"):
        printed = fails(command, f"--ckpt_path={path}", "--wandb=off")
        assert re.search(
            r"changed\.ckpt (names .*--trust|.*cannot be used: data: .* must be a dotted)", printed
        )
        assert printed.count("\n") == 1
    assert not evil.exists()
    assert "evil_module" not in sys.modules


def test_code_that_is_trusted_is_imported(rewrite, evil, tmp_path, capsys):
    path = rewrite(NAMED["task"])
    with pytest.raises(CheckpointError, match=r"names evil_module\.Task"):
        MetaLearner.from_checkpoint(path, trust=["evil"])  # a module's name, not how one begins
    assert type(MetaLearner.from_checkpoint(path, trust=["evil_module"]).task).__name__ == "Task"
    path = rewrite(NAMED["f"])
    arguments = [f"--ckpt_path={path}", f"--trainer.default_root_dir={tmp_path}", "--trainer.accelerator=cpu"]
    for trust in ("--trust=other,evil_module", "--trust=evil_module.f"):  # a module, or one function
        main(["test", *arguments, trust])
        assert "test/final_loss" in capsys.readouterr().out


@pytest.mark.parametrize(
    "task",
    [FunctionTask(torch.nn.functional.gelu, dim=1), Mixture([Quadratic(dim=2), SimpleSquare(dim=2)])],
    ids=["function of torch", "mixture"],
)
def test_torchs_functions_and_the_packages_tasks_need_no_trust(task, tmp_path):
    path = tmp_path / "ours.ckpt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FunctionTask, "loss", lambda self, theta, batch: self.f(theta).sum())
        fit(make_small(task), tmp_path, limit_val_batches=0).save_checkpoint(path)
    assert MetaLearner.from_checkpoint(path).task.config() == task.config()


def test_a_file_that_a_task_names_is_not_read_as_one(rewrite, fails, tmp_path, monkeypatch):
    mark = tmp_path / "mark"
    monkeypatch.chdir(tmp_path)
    Path("evil").write_text(yaml.safe_dump(popen(mark)), encoding="utf-8")
    path = rewrite(named("task", MIXTURE, tasks=["evil"]))
    assert fails("compare", f"--ckpt_path={path}").count("\n") == 1
    assert not mark.exists()


# Files that are no checkpoints.


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("something was unpickled",)


def pickled(call, *arguments):
    class Reduced:
        def __reduce__(self):
            return call, arguments

    return pickle.dumps({"l2l_lightning": Reduced()}, protocol=2)


def saved(content, **options):
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def repacked(path, change=lambda name, content: content, also=(), compression=zipfile.ZIP_STORED):
    """The checkpoint's archive with other entries."""
    content = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(content, "w", compression) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, change(entry.filename, old.read(entry)))
        for name, more in also:
            new.writestr(name, more)
    return content.getvalue()


def files(path):
    """Files by what is wrong with them."""

    def in_place(data):
        return repacked(path, lambda name, content: data if name.endswith("/data.pkl") else content)

    bomb = [("archive/data/99", bytes(50 * 2**20))]
    trainer = Trainer(max_steps=1, accelerator="cpu", logger=False, enable_progress_bar=False)
    trainer.fit(BoringModel())
    return {
        "empty": b"",
        "text": b"learning_rate: 0.1\n" * 50,
        "pickle": pickle.dumps(Bomb()),
        "pickle as torch writes it": saved({"state_dict": Bomb()}),
        "old format of torch": saved({"state_dict": Bomb()}, _use_new_zipfile_serialization=False),
        "weights of another model": saved(torch.nn.Linear(3, 2).state_dict()),
        "tensor": saved(torch.ones(3)),
        "checkpoint of another module": saved(trainer._checkpoint_connector.dump_checkpoint()),
        "compressed": repacked(path, also=bomb, compression=zipfile.ZIP_DEFLATED),
        "two pickles": repacked(path, also=[("archive/other/data.pkl", b"N.")]),
        "an entry twice": repacked(path, also=[("archive/data/0", bytes(96))]),
        "a pickle before the archive": pickle.dumps({"a": 1}, protocol=2) + path.read_bytes(),
        "a huge bytearray": in_place(pickled(bytearray, 10**10)),
        "a class of torch": in_place(pickled(torch.Tensor, 3)),
        "a function": in_place(pickled(eval, "1")),
        "no pickle": in_place(b"\x00\x01"),
    }


@pytest.mark.filterwarnings("ignore")
def test_a_file_that_no_run_has_written_is_refused(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "changed.ckpt"
    for content in files(checkpoint).values():
        path.write_bytes(content)
        message = r"changed\.ckpt is not a checkpoint of this program.*--ckpt_path"
        with pytest.raises(CheckpointError, match=message):
            MetaLearner.from_checkpoint(path)


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
def test_what_unfolds_beyond_the_file_or_is_not_dense_is_refused(kind, rewrite):
    for place in ("state_dict", "unknown"):
        with pytest.raises(CheckpointError, match=r"changed\.ckpt"):
            checkpoints.read(rewrite(lambda c, place=place: c.update({place: CONTENTS[kind]()})))


# Entries of a checkpoint.

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


def test_a_checkpoint_with_any_entry_replaced_is_refused_or_read(checkpoint, tmp_path):
    """Of every entry one hostile value, drawn; `slow` goes on from what is read."""
    draw, path = random.Random(0), tmp_path / "changed.ckpt"
    original = checkpoints.read(checkpoint)
    entries = {name: original[name] for name in ("state_dict", "current_model_state", "l2l_lightning")}
    refused = 0
    for place in places(entries):
        checkpoints.write(replaced(original, place, draw.choice(HOSTILE)), path)
        with contextlib.suppress(CheckpointError):
            MetaLearner.from_checkpoint(path)
            continue
        refused += 1
    assert refused > 25


@pytest.mark.slow
def test_a_run_goes_on_from_a_checkpoint_with_any_entry_replaced_or_refuses(checkpoint, tmp_path):
    path, folder = tmp_path / "changed.ckpt", checkpoint.parents[2]
    original = checkpoints.read(checkpoint)
    names = ("loops", "callbacks", "optimizer_states", "lr_schedulers", "rollouts", "l2l_lightning")
    unnamed = []
    for place in places({name: original[name] for name in names}):
        for value in HOSTILE:
            checkpoints.write(replaced(original, place, value), path)
            try:
                options = {"num_rollouts": 4, "limit_val_batches": 0, "ckpt_path": path}
                fit(make_small(), tmp_path / "again", *watchers(folder), **options)
            except CheckpointError:
                continue
            except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
                # While it is being restored; the command line then names --ckpt_path.
                frames = [frame.filename for frame in inspect.getinnerframes(error.__traceback__)]
                if not any("checkpoint_connector" in name for name in frames):
                    unnamed.append((place, value, repr(error)))
    assert unnamed == []


def test_a_hostile_checkpoint_ends_a_command_in_one_line(rewrite, fails, tmp_path):
    """What Lightning itself refuses while it restores a run."""
    path = rewrite(lambda c: c.update(averaging_state={"n_averaged": "x"}))
    options = ["--averaging.decay=0.5", "--wandb=off", "--trainer.val_check_interval=2"]
    printed = fails("fit", f"--ckpt_path={path}", f"--trainer.default_root_dir={tmp_path}", *options)
    assert "--ckpt_path" in printed.splitlines()[-1]
    assert "Traceback" not in printed
