"""Compiles kernels.cpp for this machine when first needed, keeps the result on disk, and loads it.

So the instruction set (AVX-512, AVX2, SSE2, NEON) is the running machine's, not that of the machine where a
wheel was built, and installing needs no compiler.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fno-strict-aliasing",  # tiles are read as vectors and as numbers
    "-fPIC",
    "-shared",
)
THREADS = "-fopenmp"
"""Linux's libgomp.so.1 is the one that PyTorch has loaded already, so both use one pool of threads."""
CACHE_VARIABLE = "L2L_KERNELS_CACHE"
TARGET_VARIABLE = "L2L_KERNELS_TARGET"
"""The compiler's name for another instruction set than the machine's own: x86-64-v3 is AVX2, for example."""


class Spec(ctypes.Structure):
    """kernels.cpp's Spec."""

    _fields_ = (
        ("layers", ctypes.c_int64),
        ("hidden", ctypes.c_int64),
        ("log_sign", ctypes.c_int64),
        ("p", ctypes.c_double),
        ("output_scale", ctypes.c_double),
    )


STEP_ARGUMENTS = (ctypes.c_int64, ctypes.POINTER(Spec), ctypes.c_int64, *[ctypes.c_void_p] * 5)
BPTT_ARGUMENTS = (ctypes.c_int64, ctypes.POINTER(Spec), *[ctypes.c_int64] * 2, *[ctypes.c_void_p] * 7)
VARIANTS = ("float32_float32", "float32_bfloat16", "float64_float64")
"""Dtype of the arithmetic, then of the stored state."""


def find_compiler() -> str | None:
    """The C++ compiler: variable CXX, or the first of c++, g++ and clang++ on the path."""
    candidates = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    return next((path for name in candidates if name and (path := shutil.which(name))), None)


@cache
def load() -> ctypes.CDLL | None:
    """The compiled kernels; None, after one warning that says why, where they cannot be compiled."""
    compiler = find_compiler()
    reason = "no C++ compiler was found (set CXX, or install g++ or clang++)"
    if compiler:
        try:
            return _open(_compile(compiler))
        except subprocess.CalledProcessError as error:
            reason = f"{compiler} failed: {error.stderr.strip()[-1000:]}"
        except OSError as error:
            reason = str(error)
    warnings.warn(f"l2l_kernels: the reference runs on the CPU, several times slower: {reason}", stacklevel=2)
    return None


def describe() -> str:
    """What the kernels run on, in words; compiles them if need be.

    Example:
        >>> describe()  # doctest: +SKIP
        'AVX-512, OpenMP'
    """
    library = load()
    if library is None:
        return "not compiled: the reference runs"
    instruction_set: bytes = library.instruction_set()
    return instruction_set.decode() + (", OpenMP" if library.has_openmp() else ", one thread")


def _open(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.instruction_set.restype = ctypes.c_char_p
    for variant in VARIANTS:
        for name, arguments in (("step", STEP_ARGUMENTS), ("bptt", BPTT_ARGUMENTS)):
            function = getattr(library, f"{name}_{variant}")
            function.argtypes, function.restype = arguments, None
    return library


def _compile(compiler: str) -> Path:
    """Path of the compiled kernels, compiled (a few seconds) unless this machine's are in the cache."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    flags = (*FLAGS, _target())
    identity = "\0".join([SOURCE.read_text(), version, *flags, THREADS, _machine()])
    name = f"cpu-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    path = _cache_directory() / name
    if not path.exists():
        # Built under another name, then renamed: processes that start together never load half a file.
        with tempfile.TemporaryDirectory(dir=path.parent) as directory:
            built = Path(directory) / name
            command = [compiler, *flags, str(SOURCE), "-o", str(built)]
            if subprocess.run([*command, THREADS], capture_output=True, check=False).returncode:
                subprocess.run(command, capture_output=True, text=True, check=True)
                message = f"l2l_kernels: the CPU kernels use one thread: {compiler} has no OpenMP"
                warnings.warn(message, stacklevel=2)
            built.replace(path)
    return path


def _cache_directory() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    directory = Path(os.environ.get(CACHE_VARIABLE) or Path(home) / "l2l_kernels")
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _target() -> str:
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return f"-m{'arch' if x86 else 'cpu'}={os.environ.get(TARGET_VARIABLE) or 'native'}"


def _machine() -> str:
    """What "native" stands for: a home directory, and so the cache, may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
