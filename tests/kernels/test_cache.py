"""Compiled kernels on disk: what is kept, what is loaded of it, and what a compiler's end says."""

import hashlib
import os
import shutil
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from l2l_kernels.backends import BackendUnavailableError
from l2l_kernels.cpu import library

load = library.load.__wrapped__  # each time anew, as another process would
COMPILER = library.find_compiler()
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


@pytest.fixture(scope="module", autouse=True)
def source(tmp_path_factory):
    """Kernels that do nothing in place of the real ones, which take seconds to compile."""
    functions = [f"void {kind}_{variant}() {{}}" for kind in ("step", "bptt") for variant in library.VARIANTS]
    kinds = ("nominal", "nominal_sizes")
    functions += [f"void {kind}_{variant}() {{}}" for kind in kinds for variant in library.NOMINAL_VARIANTS]
    functions += ['const char* instruction_set() { return "none"; }', "#ifdef _OPENMP", "#define HAS 1"]
    functions += ["#else", "#define HAS 0", "#endif", "int has_openmp() { return HAS; }"]
    path = tmp_path_factory.mktemp("source") / "kernels.cpp"
    path.write_text("\n".join(['extern "C" {', *functions, "}"]) + "\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "SOURCES", (path,))
        yield


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv(library.CACHE_VARIABLE, str(folder))
    return folder


@pytest.fixture(scope="module")
def built(source, tmp_path_factory):
    """A folder with a good entry."""
    folder = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(library.CACHE_VARIABLE, str(folder))
        assert load() is not None
    return folder


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Puts a shell script in the compiler's place; returns a file with a line for each of its runs."""
    runs = tmp_path / "runs"

    def install(script):
        path = tmp_path / "compiler"
        path.write_text(f"#!/bin/sh\necho \"$*\" >> '{runs}'\n{script}\n", encoding="utf-8")
        path.chmod(0o755)
        monkeypatch.setenv("CXX", str(path))
        return runs

    return install


@pytest.fixture
def quiet():
    """Whatever warns, fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@needs_compiler
def test_kernels_are_compiled_once_per_cache_and_loaded_where_there_is_no_compiler(cache, monkeypatch, quiet):
    assert load() is not None
    (entry,) = cache.iterdir()
    written = entry.stat().st_mtime_ns
    assert load() is not None
    monkeypatch.setattr(library, "find_compiler", lambda: None)
    assert load() is not None
    assert [path.stat().st_mtime_ns for path in cache.iterdir()] == [written]
    assert not entry.stat().st_mode & 0o022


def flip_a_bit(entry):
    content = bytearray(entry.read_bytes())
    content[len(content) // 2] ^= 1
    entry.write_bytes(content)


DAMAGE = {
    "empty": lambda entry: entry.write_bytes(b""),
    "truncated": lambda entry: entry.write_bytes(entry.read_bytes()[:-1000]),
    "a bit": flip_a_bit,
    "longer": lambda entry: entry.write_bytes(entry.read_bytes() + b"x"),
    "writable": lambda entry: entry.chmod(0o777),
    "another name": lambda entry: entry.rename(entry.with_name(entry.name.replace("-", "-0", 2))),
}


@needs_compiler
@pytest.mark.parametrize("damage", DAMAGE)
def test_an_entry_that_is_not_as_it_was_written_is_compiled_again_once(damage, built, cache):
    shutil.copytree(built, cache)
    (entry,) = cache.iterdir()
    DAMAGE[damage](entry)
    assert load().has_openmp() in (0, 1)
    before = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert load() is not None
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == before
    assert any(path.read_bytes()[:4] == b"\x7fELF" for path in before)


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root gives files away")
def test_another_users_entry_is_not_loaded(built, cache, monkeypatch):
    shutil.copytree(built, cache)
    (entry,) = cache.iterdir()
    os.chown(entry, 12345, 12345)
    monkeypatch.setattr(library, "find_compiler", lambda: None)
    with pytest.warns(UserWarning, match="no C\\+\\+ compiler"):
        assert load() is None


@needs_compiler
def test_in_a_folder_that_others_can_write_a_private_copy_is_loaded(built, cache, monkeypatch):
    shutil.copytree(built, cache)
    cache.chmod(0o777)
    opened = []
    original = library._open
    monkeypatch.setattr(library, "_open", lambda path: opened.append(path) or original(path))
    assert load() is not None
    assert opened[0].parent != cache
    cache.chmod(0o1777)  # there, nobody can replace another's file
    assert load() is not None
    assert opened[1].parent == cache


def test_a_compiler_that_fails_is_quoted(cache, compiler):
    compiler('case "$*" in *empty.cpp*) exit 0;; esac; echo "no such vector" >&2; exit 1')
    with pytest.warns(UserWarning, match=r"(?s)compiler failed: .*no such vector"):
        assert load() is None


@needs_compiler
@pytest.mark.parametrize(
    "end", ["kill -TERM $$", "kill -KILL $$", "echo 'c++: fatal error: Killed signal' >&2; exit 1"]
)
def test_an_interrupted_compiler_is_run_again_and_leaves_nothing(end, cache, compiler):
    runs = compiler(end)
    with pytest.warns(UserWarning, match="was interrupted, twice.*next process tries again"):
        assert load() is None
    assert len(runs.read_text(encoding="utf-8").splitlines()) == 2
    assert list(cache.iterdir()) == []
    # One that is interrupted once, in the middle, compiles with OpenMP as ever.
    once = f'if [ ! -e "{cache}/../once" ]; then touch "{cache}/../once"; {end}; fi; exec {COMPILER} "$@"'
    compiler(once)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load().has_openmp()


@needs_compiler
def test_a_compiler_without_openmp_gives_one_thread_a_warning_and_an_entry_of_its_own(built, cache, compiler):
    compiler(f'case "$*" in *"-fopenmp "*) echo "no libgomp" >&2; exit 1;; esac; exec {COMPILER} "$@"')
    for _ in range(2):  # from the cache, too
        with pytest.warns(UserWarning, match="has no OpenMP"):
            assert not load().has_openmp()
    (entry,) = cache.iterdir()
    (healthy,) = built.iterdir()
    assert entry.name[:20] != healthy.name[:20]
    compiler(f'exec {COMPILER} "$@"')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load().has_openmp()


@needs_compiler
def test_a_target_that_the_processor_lacks_is_refused_before_it_is_loaded(cache, monkeypatch):
    """The machine that tries it is a stand-in whose processor says SIGILL."""
    monkeypatch.setenv(library.TARGET_VARIABLE, "native")
    python = cache.parent / "python"
    python.write_text("#!/bin/sh\nkill -ILL $$\n", encoding="utf-8")
    python.chmod(0o755)
    opened = []
    monkeypatch.setattr(library, "_open", opened.append)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(BackendUnavailableError, match="L2L_KERNELS_TARGET=native is not what this processor"):
        load()
    assert opened == []


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="POSIX permissions")
def test_the_default_folder_is_private(tmp_path, monkeypatch):
    monkeypatch.delenv(library.CACHE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = library._cache_directory()
    assert folder == tmp_path / "l2l_kernels"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o755)  # an older version's
    assert stat.S_IMODE(library._cache_directory().stat().st_mode) == 0o700
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    with pytest.raises(OSError, match="belongs to another user"):
        library._cache_directory()


def test_a_folder_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv(library.CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="L2L_KERNELS_CACHE names another folder"):
        assert load() is None


@needs_compiler
def test_a_good_entry_of_another_process_stays_where_it_is(built, cache):
    """Who compiled beside us is about to load it: without it, that process would run the reference."""
    shutil.copytree(built, cache)
    (entry,) = cache.iterdir()
    theirs = entry.read_bytes() + b"compiled a moment ago"
    stem = entry.stem.rpartition("-")[0]
    other = cache / f"{stem}-{hashlib.sha256(theirs).hexdigest()}.so"
    other.write_bytes(theirs)
    damaged = cache / f"{stem}-{hashlib.sha256(b'').hexdigest()}.so"
    damaged.write_bytes(b"not empty")
    library._build(COMPILER, cache, threads=library._has_openmp(COMPILER))
    assert other.read_bytes() == theirs
    assert not damaged.exists()


@needs_compiler
@pytest.mark.slow
def test_processes_that_begin_together_all_load_whole_kernels(cache):
    program = "from l2l_kernels.cpu import library; assert library.load() is not None"
    variables = {**os.environ, library.CACHE_VARIABLE: str(cache)}
    running = [
        subprocess.Popen([sys.executable, "-W", "error::UserWarning", "-c", program], env=variables)
        for _ in range(4)
    ]
    assert [process.wait() for process in running] == [0] * 4
    assert all(Path(path).suffix == ".so" for path in cache.iterdir())
