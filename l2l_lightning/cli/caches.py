"""What this package keeps on disk to be faster the next time: where it is, how much, and its removal."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from l2l_kernels.cpu import library

from l2l_lightning.comparison.tuning_cache import kept_searches
from l2l_lightning.pretrained.hub import cached_rules

TUNING = (Path("runs/tuning"), Path("tuning"))
"""Where the command line, and a MetaTrainer in Python, keep searches unless they are told to elsewhere."""


@dataclass(frozen=True)
class Cache:
    """A folder with files that can be made, or fetched, again.

    Args:
        what: What they are.
        folder: Where they are; other files in it are nobody's here.
        files: They themselves.
        removed_by: Another program's command that removes them; None: `clear` does.
    """

    what: str
    folder: Path
    files: list[Path]
    removed_by: str | None = None

    def describe(self) -> str:
        """Says how many files of how many bytes there are, and where."""
        size = sum(path.stat().st_size for path in self.files)
        hint = f" ({self.removed_by} removes them)" if self.removed_by else ""
        return f"{self.what}: {len(self.files)} in {self.folder}, {size / 1e6:.2f} MB{hint}"


def caches() -> list[Cache]:
    """Returns the caches: compiled kernels, the searches of this folder's runs, what the hub has sent."""
    found = []
    with contextlib.suppress(OSError):  # no home directory: nothing is kept
        found.append(Cache("compiled CPU kernels", library.cache_folder(), library.cached_kernels()))
    found += [Cache("tuned baselines", folder, kept_searches(folder)) for folder in TUNING if folder.is_dir()]
    if rules := cached_rules():
        folder = rules[0].parents[3]  # FOLDER/models--USER--NAME/snapshots/COMMIT/FILE
        found.append(Cache("rules from the hub", folder, rules, "the command `hf cache rm`"))
    return found


def clear(cache: Cache) -> list[Path]:
    """Removes a cache's files, and its folder if that is left empty; returns those that are still there.

    Who uses them at this moment goes on: what is loaded stays loaded, and what is missing is made anew.
    """
    kept = []
    for path in cache.files:
        try:
            path.unlink(missing_ok=True)
        except OSError:  # another user's, or, on Windows, in use
            kept.append(path)
    if cache.files:
        with contextlib.suppress(OSError):  # not empty
            cache.folder.rmdir()
    return kept
