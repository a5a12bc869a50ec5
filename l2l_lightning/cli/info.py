"""The command `info`: what is installed, which kernel backends run here, and what is cached."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from l2l_kernels import BACKEND_VARIABLE, BACKENDS
from l2l_kernels.backends import choose, why_not
from l2l_kernels.cpu import library

from l2l_lightning.cli.caches import caches, clear
from l2l_lightning.cli.parser import CommandParser
from l2l_lightning.configs import presets
from l2l_lightning.program import program
from l2l_lightning.provenance import commit, device_name, versions


def main(arguments: Sequence[str]) -> None:
    """Prints versions, devices with their kernel backends, presets and caches; or removes the caches."""
    parser = CommandParser("info", "Says what is installed, which kernels run here, and what is cached.")
    parser.add_argument(
        "--clear-cache", action="store_true", help="remove the caches, of which each file can be made again"
    )
    if parser.parse_args(arguments).clear_cache:
        _clear_caches()
        return
    print(", ".join(f"{name} {version}" for name, version in versions().items()) + f"; commit {commit()}")
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for device in devices:
        print(f"{device} ({device_name(device)}): kernel backend {choose(device)}")
        for name in BACKENDS:
            print(f"  {name}: {why_not(name, device) or 'runs'}")
    print(f"CPU kernels: {library.describe()}")
    print(f"Another backend: variable {BACKEND_VARIABLE}, or --model.rule.backend NAME.")
    print("Presets for --config: " + ", ".join(presets()))
    print(f"Caches ({program()} info --clear-cache removes them):")
    for cache in caches():
        print(f"  {cache.describe()}")


def _clear_caches() -> None:
    for cache in caches():
        if cache.removed_by:
            print(f"left: {cache.describe()}")
            continue
        print(f"removed: {cache.describe()}")
        for path in clear(cache):
            print(f"  but for {path}, which is in use or another user's")
