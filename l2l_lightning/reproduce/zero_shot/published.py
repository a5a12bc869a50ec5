"""What the peers did on the suite's problems, as the package has it: nobody else need tune them again."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from l2l_lightning.files import write_atomically
from l2l_lightning.reproduce.zero_shot.peers import PEERS
from l2l_lightning.reproduce.zero_shot.store import Entry, entry_from_json

FILE = Path(__file__).with_name("published.json")
DIGITS = 6
"""Significant digits of the numbers that are published."""


@cache
def published() -> dict[str, Entry]:
    """Returns the package's entries by the hash of all that determines them (see `Store`)."""
    content = json.loads(FILE.read_text(encoding="utf-8"))
    return {digest: entry_from_json(found["entry"]) for digest, found in content["entries"].items()}


def origins(digests: list[str]) -> str:
    """Says where these of the package's entries come from."""
    content = json.loads(FILE.read_text(encoding="utf-8"))
    counts = Counter(content["entries"][digest]["origin"] for digest in digests)
    return "; ".join(f"{number} of {content['origins'][index]}" for index, number in sorted(counts.items()))


def publish(folder: Path, file: Path = FILE) -> int:
    """Adds all entries of peers in a folder of `Store` to the package's; returns how many there are now.

    Ours are left out: they are what a run of the suite is for.
    """
    content: dict[str, Any] = {"origins": [], "entries": {}}
    if file.is_file():
        content = json.loads(file.read_text(encoding="utf-8"))
    origins, entries = content["origins"], content["entries"]
    for path in sorted(folder.glob("*.json")):
        kept = json.loads(path.read_text(encoding="utf-8"))
        if PEERS[kept["entry"]["peer"]].ours:
            continue
        origin = kept["origin"]
        packages = ", ".join(f"{name} {version}" for name, version in origin["versions"].items())
        text = f"commit {origin['commit']}, {origin['device']}, {origin['threads']} thread(s), {packages}"
        if text not in origins:
            origins.append(text)
        entries[path.stem] = {"origin": origins.index(text), "entry": _rounded(kept["entry"])}
    lines = [
        f'"{digest}": {json.dumps(found, ensure_ascii=False)}' for digest, found in sorted(entries.items())
    ]
    head = json.dumps(origins, ensure_ascii=False)
    write_atomically(file, f'{{"origins": {head}, "entries": {{\n' + ",\n".join(lines) + "\n}}\n")
    return len(entries)


def _rounded(value: Any) -> Any:
    """Returns JSON values with their numbers rounded."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value
