"""`python -m l2l_lightning info`: what is installed, and which kernel backends run here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from l2l_kernels import BACKEND_VARIABLE, BACKENDS
from l2l_kernels.backends import choose, why_not
from l2l_kernels.cpu import library
from rich.table import Table

from l2l_lightning.console import make_console
from l2l_lightning.provenance import commit, device_name, versions


def print_info(presets: Mapping[str, Path]) -> None:
    """Prints versions, devices with their kernel backends, and presets."""
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    console = make_console()
    console.print(f"commit {commit()}; " + ", ".join(f"{name} {v}" for name, v in versions().items()))
    table = Table("device", "name", "kernel backend", *(f"{name} runs" for name in BACKENDS))
    for device in devices:
        runs = (why_not(name, device) or "yes" for name in BACKENDS)
        table.add_row(str(device), device_name(device), choose(device), *runs)
    console.print(table)
    console.print(f"CPU kernels: {library.describe()}")
    console.print(f"Another backend: variable {BACKEND_VARIABLE}, or --model.rule.backend NAME.")
    console.print("Presets for --config: " + ", ".join(presets))
