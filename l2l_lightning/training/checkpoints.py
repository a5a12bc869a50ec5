"""Checkpoint files: written with a digest, whole or not at all, and read as plain numbers or refused.

A file is what torch.save writes, a zip archive, with the SHA-256 of all its bytes as the archive's comment.
Reading executes nothing: the digest is verified before anything is parsed, torch's restricted unpickler knows
tensors and plain values only, and what they say is checked before anybody uses it. Anybody can compute a
digest, so that nothing is believed for having one: what reading takes is bounded by the file's size.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import math
import os
import pickletools
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._pytree import tree_leaves

from l2l_lightning.class_paths import from_class_config
from l2l_lightning.errors import CheckpointError
from l2l_lightning.files import replacing
from l2l_lightning.rules import Rule
from l2l_lightning.trust import foreign_references

VERSION = 2
"""Of what MetaLearner adds to Lightning's checkpoints; 1 is the same without a digest."""

SECTION = "l2l_lightning"
"""Where in a checkpoint MetaLearner's own entries are."""

MAX_DEPTH = 64
"""Of lists and dicts in one another; ours have 12."""

MAX_BITS = 64
"""Of a whole number."""

_MAY_CALL = {
    "collections OrderedDict",
    "torch Size",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor_v2",
} | {
    f"torch {kind}Storage" for kind in ("BFloat16", "Bool", "Byte", "Double", "Float", "Half", "Int", "Long")
}
"""What torch.save writes for plain values and dense tensors. Its unpickler would call more, such as a
bytearray of any size."""

_MARK = b"l2l_lightning sha256 "
_SEAL_LENGTH = len(_MARK) + 64


class CheckpointFiles(TorchCheckpointIO):
    """Lightning's reading and writing of checkpoints, by `read` and `write`."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Writes with a digest, atomically."""
        if storage_options is not None:
            raise TypeError("storage_options is not supported: a checkpoint is a file on a local disk")
        write(checkpoint, path)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = None,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Reads what `write` wrote, onto the CPU.

        Raises:
            CheckpointError: As `read`, or weights_only=False, which would execute what a file says.
        """
        if weights_only is False:
            raise CheckpointError(
                f"{path}: weights_only (--weights_only) must not be false: a checkpoint is plain numbers, "
                "and nothing in it is ever executed"
            )
        return read(path)


def write(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Writes a checkpoint and its digest; an interruption leaves the old file or the new one.

    Raises:
        CheckpointError: The path is not one of a local disk.
        OSError: It cannot be written.

    Example:
        >>> write(trainer._checkpoint_connector.dump_checkpoint(), "last.ckpt")  # doctest: +SKIP
    """
    if "://" in str(path):
        raise CheckpointError(f"{path}: checkpoints are written to local disks only (--checkpoint.dirpath)")
    path = Path(path)
    with replacing(path, path.with_name(f".{path.name}.partial")) as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:
            # What torch makes of a disk that is full.
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
        # An archive ends with the length of its comment, which torch leaves empty.
        file.seek(-2, io.SEEK_END)
        file.write(_SEAL_LENGTH.to_bytes(2, "little"))
        file.write(_MARK + _digest(file, file.tell()))


def read(path: str | Path) -> dict[str, Any]:
    """A checkpoint of a MetaLearner, on the CPU, checked from end to end.

    A file of version 1, which has no digest, is read with a warning: its CRC-32 checksums are verified.

    Raises:
        CheckpointError: There is no such file; it is damaged, of another program or of a newer version of
            this one; or an entry is missing, or of another kind or shape than the settings in it say, or not
            finite.

    Example:
        >>> read("last.ckpt")["global_step"]  # doctest: +SKIP
        2800
    """
    path = Path(path)
    if not os.path.isfile(path):  # which a name that is too long is not; Path.is_file raises
        raise CheckpointError(f"no checkpoint at {path}: give the path of a .ckpt file with --ckpt_path")
    try:
        file = path.open("rb")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read (--ckpt_path): {error.strerror}") from error
    with file:
        sealed = _verify_seal(path, file)
        try:
            _check_archive(file, sealed)
            file.seek(0)
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
            _check_contents(checkpoint, file.seek(0, io.SEEK_END))
            if not (isinstance(checkpoint, dict) and SECTION in checkpoint):
                raise ValueError("it has no settings of a MetaLearner")
        except Exception as error:  # whatever the damage happens to provoke
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise CheckpointError(
                f"{path} is not a checkpoint of this program (--ckpt_path), or is damaged: {reason}"
            ) from error
    try:
        _check_version(checkpoint[SECTION])
        _check_settings(checkpoint[SECTION])
        _check_weights(checkpoint)
        _check_optimizer(checkpoint)
        _check_rollouts(checkpoint)
        _check_position(checkpoint)
    except _WrongError as error:
        raise CheckpointError(f"{path} {error}") from error
    except (AttributeError, LookupError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        # Of a kind that no check expected.
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{path} holds something else than this program writes: {reason}") from error
    if not sealed:
        if checkpoint[SECTION]["version"] != 1:
            raise CheckpointError(
                f"{path} lacks its digest: it is damaged, or was rewritten by another program (--ckpt_path)"
            )
        warnings.warn(
            f"{path} was written by an older version of this program, without a digest: only its CRC-32 "
            "checksums were verified",
            stacklevel=2,
        )
    loaded: dict[str, Any] = checkpoint
    return loaded


def check_trusted(path: str | Path, checkpoint: dict[str, Any], trust: Sequence[str] = ()) -> None:
    """Refuses a checkpoint whose task or rule is code of neither this package nor torch.

    Args:
        path: For the message.
        checkpoint: What `read` gave.
        trust: Modules, or functions, of the user's that may be imported.

    Raises:
        CheckpointError: It names code that is not trusted; the message says how to.
    """
    model = checkpoint[SECTION]["model"]
    refuse_foreign(path, {"task": model["task"], "rule": model["rule"]}, trust)


def foreign_modules(config: Any, trust: Sequence[str] = ()) -> list[str]:
    """Modules of what a configuration may not name of its own accord: what --trust would have to say.

    Example:
        >>> foreign_modules({"task": {"init_args": {"f": "my_problem.rosenbrock"}}})
        ['my_problem']
    """
    found = {path.rpartition(".")[0].partition(".<")[0] for path in foreign_references(config, trust)}
    return sorted(found - {""})


def refuse_foreign(path: object, config: Any, trust: Sequence[str]) -> None:
    """Raises CheckpointError if a file's configuration names code that it may not and that is not trusted."""
    if foreign := foreign_references(config, trust):
        modules = foreign_modules(config, trust)
        raise CheckpointError(
            f"{path} names {', '.join(foreign)}: code that is not this package's, and that is not imported "
            f"on a file's word. If you trust it: --trust {','.join(modules)}, in Python trust={modules}"
        )


class _WrongError(Exception):
    """What is wrong with a checkpoint, to follow its name."""


def _verify_seal(path: Path, file: BinaryIO) -> bool:
    """Whether the file has a digest, which is then right."""
    content = file.seek(0, io.SEEK_END) - _SEAL_LENGTH
    if content < 0:
        return False
    file.seek(content)
    seal = file.read()
    if not seal.startswith(_MARK):
        return False
    if seal != _MARK + _digest(file, content):
        raise CheckpointError(
            f"{path} is damaged: its contents do not have the digest that it was written with"
        )
    return True


def _digest(file: BinaryIO, length: int) -> bytes:
    """SHA-256 of a file's first bytes, after which it is positioned; in hexadecimal."""
    file.seek(0)
    digest = hashlib.sha256()
    while length:
        chunk = file.read(min(length, 2**20))
        digest.update(chunk)
        length -= len(chunk)
    return digest.hexdigest().encode()


def _check_archive(file: BinaryIO, sealed: bool) -> None:
    """Raises if a file is not an archive as torch writes them, or its pickle calls what torch.save does not.

    Without a digest, the contents must have their CRC-32.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    if file.read(4) != b"PK\x03\x04":
        raise ValueError("it is not an archive")
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        # torch compresses nothing: an entry that is larger than the file is no entry of torch's.
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("it is compressed")
        if sum(entry.file_size for entry in entries) > size:
            raise ValueError("its entries are larger than the file")
        # Else one reader could find other contents than another.
        if entries[0].header_offset or len({entry.filename for entry in entries}) < len(entries):
            raise ValueError("its entries are not in order")
        if not sealed and (bad := archive.testzip()) is not None:
            raise ValueError(f"the checksum of {bad} is wrong")
        (pickled,) = (entry for entry in entries if entry.filename.rpartition("/")[2] == "data.pkl")
        for operation, argument, _ in pickletools.genops(archive.read(pickled)):
            if "GLOBAL" in operation.name and argument not in _MAY_CALL:
                raise ValueError(f"it asks for {argument}")


def _check_contents(checkpoint: Any, size: int) -> None:
    """Raises if a checkpoint holds more than plain values and dense tensors, or more than its file's bytes.

    A pickle can repeat a part, and a tensor its numbers, any number of times: it costs when they are copied.
    """
    values = numbers = size
    rest = [(checkpoint, 0)]
    while rest:
        part, depth = rest.pop()
        values -= 1
        if isinstance(part, Tensor):
            if part.layout != torch.strided or part.device.type != "cpu" or part.is_quantized:
                raise ValueError(f"it holds a tensor that is not dense ({part.layout}, {part.device})")
            numbers -= part.nbytes
        elif isinstance(part, dict | list | tuple | set):
            inner = [*part, *part.values()] if isinstance(part, dict) else part
            rest += ((one, depth + 1) for one in inner)
        elif isinstance(part, int) and part.bit_length() > MAX_BITS:
            raise ValueError("it holds a whole number of more than 64 bits")
        if min(values, numbers) < 0 or len(rest) > size or depth > MAX_DEPTH:
            raise ValueError("it unfolds to more than its size")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise _WrongError(message)


def _check_version(section: Any) -> None:
    version: Any = section.get("version") if isinstance(section, dict) else None
    _require(type(version) is int and version >= 1, f"says that its version is {version!r} (--ckpt_path)")
    _require(
        version <= VERSION,
        f"was written by a newer version of this program: it has version {version}, and this one reads up to "
        f"{VERSION}. Update l2l-lightning",
    )


def _check_settings(section: dict[str, Any]) -> None:
    # Here, for a MetaLearner reads checkpoints.
    from l2l_lightning.training.data_module import MetaData, check_data_settings
    from l2l_lightning.training.meta_learner import MetaLearner, check_settings

    seed: Any = section.get("seed_everything")
    _require(type(seed) is int, "lacks its seed (seed_everything)")
    _require(0 <= seed < 2**32, f"has the seed {seed} (seed_everything), not one in [0, 2^32)")
    steps: Any = section.get("meta_steps", 1)
    _require(type(steps) is int and steps > 0, f"has the length {steps!r} (meta_steps)")
    for name, cls, elsewhere, check in (
        ("model", MetaLearner, {"seed": seed, "start_from": None}, check_settings),
        ("data", MetaData, {}, check_data_settings),
    ):
        settings: Any = section.get(name)
        _require(isinstance(settings, dict), f"lacks the settings of its {name}")
        parameters = dict(list(inspect.signature(cls.__init__).parameters.items())[1:])  # but for self
        required = {key for key, p in parameters.items() if p.default is p.empty}
        if missing := required - settings.keys():
            raise _WrongError(f"lacks {', '.join(f'{name}.{key}' for key in sorted(missing))}")
        if unknown := settings.keys() - (parameters.keys() - elsewhere.keys()):
            text = ", ".join(sorted(f"{name}.{key}" for key in unknown))
            raise _WrongError(f"has settings that this version does not know: {text}")
        _check_plain(settings, name)
        # An older version's may lack an argument: it is at its default.
        defaults = {key: p.default for key, p in parameters.items()}
        values = defaults | settings | elsewhere
        try:
            check(**{key: values[key] for key in inspect.signature(check).parameters})
        except (TypeError, ValueError) as error:
            raise _WrongError(f"has settings of its {name} that cannot be: {error}") from error
    for name in ("task", "rule"):
        config = section["model"][name]
        _require(
            isinstance(config, dict)
            and config.keys() <= {"class_path", "init_args"}
            and isinstance(config.get("class_path"), str)
            and isinstance(config.get("init_args", {}), dict),
            f"does not say which {name} it is of (model.{name})",
        )


def _check_plain(value: Any, name: str) -> None:
    """Refuses a setting that JSON could not hold."""
    if type(value) is dict:
        for key, part in value.items():
            _require(type(key) is str, f"has a setting without a name in {name}")
            _check_plain(part, f"{name}.{key}")
    elif type(value) in (list, tuple):
        for part in value:
            _check_plain(part, name)
    else:
        plain = value is None or type(value) in (bool, int, float, str)
        _require(plain and not (type(value) is float and not math.isfinite(value)), f"has {name}={value!r}")


def _check_weights(checkpoint: dict[str, Any]) -> None:
    rule = _make_rule(checkpoint)
    expected = None if rule is None else {f"rule.{key}": value for key, value in rule.state_dict().items()}
    for name in ("state_dict", "current_model_state"):
        if name == "current_model_state" and name not in checkpoint:
            continue  # without averaging there is one φ only
        found: Any = checkpoint.get(name)
        _require(isinstance(found, dict) and len(found) > 0, f"lacks the rule's weights ({name})")
        for key, value in found.items():
            _require(isinstance(key, str), f"has weights without a name in {name}")
            _require(isinstance(value, Tensor), f"has no tensor in {name} under {key}")
            _require(value.is_floating_point(), f"has {value.dtype} in {name} under {key}")
        if expected is not None:
            if missing := expected.keys() - found.keys():
                raise _WrongError(f"lacks {', '.join(sorted(missing))} in {name}")
            if left_over := found.keys() - expected.keys():
                raise _WrongError(
                    f"has weights in {name} that its rule has not: {', '.join(sorted(left_over))}"
                )
            for key, value in found.items():
                _require(
                    value.shape == expected[key].shape,
                    f"has {key} of the shape {list(value.shape)} in {name}, its rule "
                    f"{list(expected[key].shape)}",
                )
        for key, value in found.items():
            _require(
                bool(value.isfinite().all()), f"holds a number that is not finite, in {name} under {key}"
            )


def _make_rule(checkpoint: dict[str, Any]) -> Rule | None:
    """The checkpoint's rule without weights; None for one of the user's own, which is not imported here."""
    config = checkpoint[SECTION]["model"]["rule"]
    if foreign_references(config):
        return None
    try:
        with torch.device("meta"):
            rule: Rule = from_class_config(config, Rule)
    except (TypeError, ValueError) as error:
        raise _WrongError(f"describes no rule (model.rule): {error}") from error
    return rule


def _check_optimizer(checkpoint: dict[str, Any]) -> None:
    """Adam's moments have the weights' shapes; a checkpoint of weights alone has none."""
    if "optimizer_states" not in checkpoint:
        return
    message = "holds a state of the meta-optimizer that does not fit its weights (optimizer_states)"
    try:
        (state,) = checkpoint["optimizer_states"]
        (group,) = state["param_groups"]
        weights = list(checkpoint["state_dict"].values())
        indices = list(range(len(group["params"])))
        fits = (
            group["params"] == indices and len(indices) == len(weights) and set(state["state"]) <= {*indices}
        )
        (scheduler,) = checkpoint["lr_schedulers"]
        numbers = [group["lr"], *scheduler["base_lrs"], *scheduler["_last_lr"]]
        numbers += [scheduler["last_epoch"], scheduler.get("_step_count", 0)]
        fits = fits and all(type(number) in (int, float) and math.isfinite(number) for number in numbers)
        # Its entries become the scheduler's attributes.
        fits = fits and not any(callable(getattr(LambdaLR, key, None)) for key in scheduler)
        fits = fits and not any(scheduler["lr_lambdas"])
        fits = fits and all(len(scheduler[key]) == 1 for key in ("base_lrs", "_last_lr", "lr_lambdas"))
        fits = fits and all(_is_like(group[key], value) for key, value in _ADAM.items() if key in group)
        for index, moments in state["state"].items():
            for key, value in moments.items():
                shape = weights[index].shape if key != "step" else torch.Size([])
                fits = fits and value.shape == shape and bool(value.isfinite().all())
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise _WrongError(message) from error
    _require(fits, message)


_ADAM = torch.optim.Adam([torch.zeros(1)]).defaults


def _is_like(value: Any, model: Any) -> bool:
    """Whether a value is of a model's kind: a finite number, a switch or None, or a tuple of them."""
    if isinstance(model, tuple):
        return (
            isinstance(value, list | tuple) and len(value) == len(model) and all(map(_is_like, value, model))
        )
    if model is None or isinstance(model, bool):
        return value is None or isinstance(value, bool)
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_rollouts(checkpoint: dict[str, Any]) -> None:
    """Every process's rollout in progress, or None: K optimizees, one random stream for each."""
    message = "holds a rollout in progress that does not fit its settings (rollouts)"
    count = checkpoint[SECTION]["model"].get("num_tasks")
    try:
        rollouts = checkpoint["rollouts"]
        fits = isinstance(rollouts, list) and len(rollouts) > 0
        # All processes are in the same window, or between two rollouts.
        fits = fits and len({rollout is None for rollout in rollouts}) == 1
        for rollout in rollouts:
            if rollout is None:
                continue
            theta = rollout["optimizees"]["theta"]
            generators = rollout["optimizees"]["generators"]
            # Version 1 had no masks.
            masked = rollout.setdefault("masked", torch.zeros(len(theta), dtype=torch.bool))
            fits = (
                fits
                and theta.is_floating_point()
                and theta.dim() == 2
                and all(_fits(rollout.get(name, []), len(theta)) for name in ("state", "statistics"))
                and len(theta) == len(generators) == len(rollout["optimizees"]["instances"])
                and (count is None or len(theta) == count)
                and masked.dtype == torch.bool
                and masked.shape == theta.shape[:1]
                and type(rollout["steps_done"]) is int
                and rollout["steps_done"] == rollouts[0]["steps_done"] >= 0
            )
            for generator in generators:
                torch.Generator().set_state(generator)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise _WrongError(message) from error
    _require(fits, message)


def _fits(carried: Any, count: int) -> bool:
    """Whether what a rollout carries is of so many optimizees; an older version's is one tensor."""
    return all(
        part.is_floating_point() and part.shape[-1] % count == 0
        for part in (carried if isinstance(carried, list) else [carried])
    )


def _check_position(checkpoint: dict[str, Any]) -> None:
    """Where in the run the checkpoint was written."""
    message = "does not say where in its run it was written (loops)"
    try:
        fits = type(checkpoint["global_step"]) is int and checkpoint["global_step"] >= 0
        fits = fits and type(checkpoint["epoch"]) is int and checkpoint["epoch"] >= 0
        fits = fits and isinstance(checkpoint.get("callbacks", {}), dict)
        fit_loop = checkpoint["loops"]["fit_loop"]
        for key in ("epoch_progress", "epoch_loop.batch_progress"):
            fits = fits and type(fit_loop[key]["current"]["completed"]) is int
        # All of it counts something, or says whether something is over.
        fits = fits and all(
            type(leaf) in (bool, int) and leaf >= 0 for leaf in tree_leaves(checkpoint["loops"])
        )
        fits = fits and position(checkpoint) >= 0
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise _WrongError(message) from error
    _require(fits, message)


def position(checkpoint: dict[str, Any]) -> int:
    """Windows of the run's current epoch that had begun when the checkpoint was written."""
    loaders = checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader", [])
    return int(loaders[0]["next"]) if loaders else 0
