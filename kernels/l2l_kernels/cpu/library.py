"""Compiles the C++ sources for this machine when first needed, keeps the result on disk, and loads it.

So the instruction set (AVX-512, AVX2, SSE2, NEON) is the running machine's, not that of the machine where a
wheel was built, and installing needs no compiler.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path

from l2l_kernels.backends import BackendUnavailableError

SOURCES = tuple(Path(__file__).with_name(name) for name in ("kernels.cpp", "nominal.cpp"))
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fno-strict-aliasing",  # tiles are read as vectors and as numbers
    "-fopenmp-simd",  # needs no library: loops may add in the order of vectors
    "-fPIC",
    "-shared",
)
THREADS = "-fopenmp"
"""Linux's libgomp.so.1 is the one that PyTorch has loaded already, so both use one pool of threads."""
CACHE_VARIABLE = "L2L_KERNELS_CACHE"
TARGET_VARIABLE = "L2L_KERNELS_TARGET"
"""The compiler's name for another instruction set than the machine's own: x86-64-v3 is AVX2, for example."""


_ENTRY = re.compile(r"cpu-[0-9a-f]{16}-[0-9a-f]{64}\.so")
"""The name of compiled kernels: `_stem`, and the contents' digest."""


class Spec(ctypes.Structure):
    """The Spec of kernels.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("layers", "hidden", "log_sign", "width", "tanh_output")),
        *((name, ctypes.c_double) for name in ("p", "output_scale")),
    )


STEP_ARGUMENTS = (ctypes.c_int64, ctypes.POINTER(Spec), ctypes.c_int64, *[ctypes.c_void_p] * 5)
BPTT_ARGUMENTS = (ctypes.c_int64, ctypes.POINTER(Spec), *[ctypes.c_int64] * 2, *[ctypes.c_void_p] * 7)
VARIANTS = ("float32_float32", "float32_bfloat16", "float64_float64")
"""The dtype of the arithmetic, then that of the stored state."""
ROUNDED_VARIANTS = ("float32_float32_bf16", "float32_bfloat16_bf16")
"""Of products whose operands are rounded to bfloat16: compiled where the processor has AVX512_BF16."""
NOMINAL_ARGUMENTS = (*[ctypes.c_int64] * 2, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 2)
NOMINAL_ARGUMENTS += (*[ctypes.c_void_p] * 2,)
NOMINAL_ARGUMENTS += (ctypes.c_double, ctypes.c_void_p)
NOMINAL_SIZES_ARGUMENTS = (ctypes.c_int64, *[ctypes.c_void_p] * 5)
NOMINAL_VARIANTS = ("float32", "float64")


def find_compiler() -> str | None:
    """Returns the C++ compiler: the variable CXX, or the first of c++, g++ and clang++ on the path."""
    candidates = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    return next((path for name in candidates if name and (path := shutil.which(name))), None)


class _InterruptedError(Exception):
    """A compiler was stopped, which says nothing of the compiler or of the source."""


@cache
def load() -> ctypes.CDLL | None:
    """Returns the compiled kernels; None, after one warning that says why, if they cannot be compiled.

    Raises:
        BackendUnavailableError: The variable L2L_KERNELS_TARGET names a target that this processor is not.
    """
    compiler = find_compiler()
    reason = "no C++ compiler was found (set CXX, or install g++ or clang++)"
    try:
        if (library := _find_or_build(compiler)) is not None:
            if not library.has_openmp():
                who = compiler or "the compiler that they came from"
                message = f"l2l_kernels: the CPU kernels use one thread: {who} has no OpenMP"
                warnings.warn(message, stacklevel=2)
            return library
    except subprocess.CalledProcessError as error:
        reason = f"{compiler} failed: {error.stderr.strip()[-1000:]}"
    except _InterruptedError as error:
        reason = f"{compiler} was interrupted, twice: {error}. The next process tries again"
    except OSError as error:
        reason = f"{error} ({CACHE_VARIABLE} names another folder)"
    warnings.warn(f"l2l_kernels: the reference runs on the CPU, several times slower: {reason}", stacklevel=2)
    return None


def describe() -> str:
    """Says in words what the kernels run on; compiles them if need be.

    Example:
        >>> describe()  # doctest: +SKIP
        'AVX-512, OpenMP'
    """
    library = load()
    if library is None:
        return "not compiled: the reference runs"
    instruction_set: bytes = library.instruction_set()
    return instruction_set.decode() + (", OpenMP" if library.has_openmp() else ", one thread")


def _find_or_build(compiler: str | None) -> ctypes.CDLL | None:
    """Finds the kernels in the cache, or compiles them into it: with OpenMP if the compiler has it."""
    folder = _cache_directory()
    for threads in (True, False):
        library = _find(folder, threads)
        if library is None and compiler is not None and (not threads or _has_openmp(compiler)):
            _build(compiler, folder, threads)
            library = _find(folder, threads)
            if library is None:
                raise OSError(f"what was compiled into {folder} is gone again, or not as it was written")
        if library is not None:
            return library
    return None


def _stem(threads: bool) -> str:
    """Returns what an entry's name begins with: a digest of source, flags and machine, for any compiler."""
    texts = [source.read_text(encoding="utf-8") for source in SOURCES]
    parts = [*texts, *_flags(threads), _machine()]
    return f"cpu-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}-"


def _find(folder: Path, threads: bool) -> ctypes.CDLL | None:
    """Loads a good entry of the cache, if there is one."""
    for path in sorted(folder.glob(f"{_stem(threads)}*.so")):
        try:
            if (content := _read_good(path)) is not None:
                _check_target(path)
                return _open(path) if _is_ours_alone(folder) else _open_copy(content)
        except OSError:  # unreadable, or no library
            continue
    return None


def _read_good(path: Path) -> bytes | None:
    """Returns an entry's contents if they are whole and only its user or root could have written them.

    Whole contents have the digest that the name ends with: they were complete when it was given.

    Raises:
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        status, content = os.fstat(file.fileno()), file.read()
    mine = not hasattr(os, "getuid") or status.st_uid in (0, os.getuid())
    whole = path.stem.endswith("-" + hashlib.sha256(content).hexdigest())
    return content if mine and whole and not status.st_mode & 0o022 else None


def _is_ours_alone(folder: Path) -> bool:
    """Tells whether nobody else can replace a file between a look at it and its use."""
    mode = folder.stat().st_mode
    return not mode & 0o022 or bool(mode & stat.S_ISVTX)


def _open_copy(content: bytes) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "kernels.so"
        path.write_bytes(content)
        return _open(path)


def _open(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.instruction_set.restype = ctypes.c_char_p
    for variant in variants(library):
        for name, arguments in (("step", STEP_ARGUMENTS), ("bptt", BPTT_ARGUMENTS)):
            function = getattr(library, f"{name}_{variant}")
            function.argtypes, function.restype = arguments, None
    for variant in NOMINAL_VARIANTS:
        for name, arguments in (("nominal", NOMINAL_ARGUMENTS), ("nominal_sizes", NOMINAL_SIZES_ARGUMENTS)):
            function = getattr(library, f"{name}_{variant}")
            function.argtypes, function.restype = arguments, None
    return library


def variants(library: ctypes.CDLL) -> tuple[str, ...]:
    """Returns what ends the names of the kernels that a library has."""
    return VARIANTS + tuple(name for name in ROUNDED_VARIANTS if hasattr(library, f"step_{name}"))


def _check_target(path: Path) -> None:
    """Raises BackendUnavailableError unless kernels for a named target run in a process of their own."""
    target = os.environ.get(TARGET_VARIABLE)
    if not target:
        return
    program = (
        "import ctypes, struct, sys\n"
        "library, spec = ctypes.CDLL(sys.argv[1]), struct.pack('5q2d', 1, 4, 1, 1, 1, 10.0, 0.1)\n"
        "memory = [(ctypes.c_double * 20000)() for _ in range(7)]\n"
        "one, size = ctypes.c_int64(1), ctypes.c_int64(64)\n"
        "for kind in filter(lambda kind: hasattr(library, 'step_' + kind), sys.argv[2:]):\n"
        "    getattr(library, 'step_' + kind)(one, spec, size, *memory[:5])\n"
        "    getattr(library, 'bptt_' + kind)(one, spec, size, one, *memory)\n"
    )
    command = [sys.executable, "-c", program, str(path), *VARIANTS, *ROUNDED_VARIANTS]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        raise BackendUnavailableError(
            f"{TARGET_VARIABLE}={target} is not what this processor can run: unset it, or name an "
            "instruction set that it has (x86-64-v3 is AVX2)"
        )


def _build(compiler: str, folder: Path, threads: bool) -> None:
    """Compiles the kernels, which takes seconds, into the cache, where a file is whole and on the disk.

    Bad entries go. A good one stays: another process may have made it just now and be about to load it.
    """
    with tempfile.TemporaryDirectory(dir=folder) as directory:
        built = Path(directory) / "built.so"
        _run([compiler, *_flags(threads), *map(str, SOURCES), "-o", str(built)])
        with built.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        built.chmod(0o644)
        for old in folder.glob(f"{_stem(threads)}*.so"):
            with contextlib.suppress(OSError):  # of another owner
                if _read_good(old) is None:
                    old.unlink()
        built.replace(folder / f"{_stem(threads)}{digest}.so")
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _has_openmp(compiler: str) -> bool:
    """Tells whether a program of one line compiles with OpenMP."""
    with tempfile.TemporaryDirectory() as directory:
        source, target = Path(directory) / "empty.cpp", Path(directory) / "empty.so"
        source.write_text("int nothing() { return 0; }\n", encoding="utf-8")
        try:
            _run([compiler, "-fPIC", "-shared", THREADS, str(source), "-o", str(target)])
        except subprocess.CalledProcessError:
            return False
    return True


def _run(command: list[str]) -> None:
    """Runs a compiler, twice if it is interrupted.

    Raises:
        CalledProcessError: It failed, and has said why.
        _InterruptedError: A signal ended it: somebody's, or the system's for want of memory.
    """
    for _ in range(2):
        done = subprocess.run(
            command, capture_output=True, text=True, encoding="utf-8", errors="replace", check=False
        )
        # A compiler's driver reports how its own processes ended.
        words = re.search(r"(?i)killed|terminated|signal|internal compiler error|out of memory", done.stderr)
        if done.returncode >= 0 and not (done.returncode and words):
            done.check_returncode()
            return
    raise _InterruptedError(done.stderr.strip()[-200:] or f"signal {-done.returncode}")


def cache_folder() -> Path:
    """Returns where compiled kernels are kept, the variable's folder or the default one, made or not.

    Raises:
        OSError: There is no variable, and no home directory.
    """
    if given := os.environ.get(CACHE_VARIABLE):
        return Path(given)
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:  # no home directory
        raise OSError(f"{error}: there is no folder to keep compiled kernels in") from error
    return home / "l2l_kernels"


def cached_kernels() -> list[Path]:
    """Returns the files in the cache's folder that this module has written, and none of anybody else's.

    They can be removed at any time: a process that has loaded one keeps it, another one compiles it anew.
    """
    try:
        paths = sorted(cache_folder().iterdir())
    except OSError:  # there is no such folder, or none that can be read
        return []
    return [path for path in paths if _ENTRY.fullmatch(path.name) and path.is_file()]


def _cache_directory() -> Path:
    """Returns the cache's folder, where the default one is one that nobody else can open.

    Raises:
        OSError: It cannot be made or written, or the default one is another user's.
    """
    directory = cache_folder()
    if os.environ.get(CACHE_VARIABLE):
        directory.mkdir(parents=True, exist_ok=True)
        return directory
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if hasattr(os, "getuid"):
        if directory.stat().st_uid != os.getuid():
            raise OSError(f"{directory} belongs to another user")
        if directory.stat().st_mode & 0o077:
            directory.chmod(0o700)  # an older version's
    return directory


def _flags(threads: bool) -> tuple[str, ...]:
    kind = "arch" if platform.machine().lower() in ("x86_64", "amd64") else "cpu"
    target = f"-m{kind}={os.environ.get(TARGET_VARIABLE) or 'native'}"
    return (*FLAGS, target, *([THREADS] if threads else []))


def _machine() -> str:
    """Returns what "native" stands for: unlike machines may share a home directory, and so the cache."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
