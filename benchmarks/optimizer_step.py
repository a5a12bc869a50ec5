"""A step of LearnedOptimizer on a ResNet-18's parameters, beside AdamW's: time and memory, in one run.

    python benchmarks/optimizer_step.py [--device cuda] [--width 64] [--json FILE] [--only zero-shot]

The peers are PyTorch's AdamW, foreach and fused, and LearnedOptimizer with a launch for every tensor. A ratio
is a time over that of LearnedOptimizer with float32 states. Times are the wall clock's, of steps back to back
and one wait for the device, so that what the host does for a step counts.

ZeroShot without orthogonalisation is timed in turns with both AdamWs and, where they are installed, Prodigy
and Schedule-Free; with it, in turns with Muon, after them. All on the same parameters, on one tensor of as
many, which has nothing to pack, and on 10⁶ and 10⁷ in four square matrices. A ratio is there the median over
turns of a time over the fused AdamW's, and least/least the ratio of the least times, which others on the
machine disturb less. Moved are the bytes that ZeroShot's step reads and writes, beside those of a copy.
Expected, as 36 bytes are moved where AdamW moves 28: 1.3 and the host's work without orthogonalisation, and
less than foreach takes; with it, that on the CPU nearly all of the time is matrix products.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import speed_tables
import torch
from measuring import copy_gb_per_s, print_table, start_log, time_ms, write_json
from torch import Tensor, nn
from torch.utils.benchmark import timer

from l2l_lightning import LearnedOptimizer
from l2l_lightning.provenance import origin
from l2l_lightning.rules import ZeroShot

RULE = "lstm-mnist"
OURS = "learned"
STEPS = {"cuda": 20, "cpu": 1}
"""Steps back to back, by the type of the device."""
TOLERANCE = 1e-5
"""Of θ after a few steps, between one launch and a launch for every tensor."""


def resnet18_shapes(width: int) -> Iterator[tuple[int, ...]]:
    """The shapes of torchvision's ResNet-18, whose first layer has `width` channels (64 there)."""

    def convolution(inputs: int, outputs: int, kernel: int) -> Iterator[tuple[int, ...]]:
        yield outputs, inputs, kernel, kernel
        yield from ((outputs,), (outputs,))  # the batch norm's

    yield from convolution(3, width, 7)
    inputs = width
    for outputs in (width, 2 * width, 4 * width, 8 * width):
        for block in range(2):
            yield from convolution(inputs, outputs, 3)
            yield from convolution(outputs, outputs, 3)
            if block == 0 and inputs != outputs:
                yield from convolution(inputs, outputs, 1)
            inputs = outputs
    yield 1000, inputs
    yield (1000,)


def four_squares(coordinates: int) -> list[tuple[int, ...]]:
    """Four square matrices of about so many coordinates together."""
    return [(round((coordinates / 4) ** 0.5),) * 2] * 4


def make_parameters(shapes: Iterable[tuple[int, ...]], device: str) -> list[nn.Parameter]:
    """Parameters and gradients of the usual sizes, the same at every call."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    parameters = [nn.Parameter(0.02 * draw(shape)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = 1e-3 * draw(tuple(parameter.shape))
    return parameters


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    OURS: lambda params: LearnedOptimizer(params, RULE),
    "learned, bfloat16 state": lambda params: LearnedOptimizer(params, RULE, state_dtype=torch.bfloat16),
    "learned, launch per tensor": lambda params: LearnedOptimizer([{"params": [p]} for p in params], RULE),
    "AdamW, foreach": lambda params: torch.optim.AdamW(params, foreach=True),
    "AdamW, fused": lambda params: torch.optim.AdamW(params, fused=True),
}


PLAIN, ORTHOGONAL, FUSED = "ZeroShot(orthogonal=False)", "ZeroShot", "AdamW, fused"
COMPACT = "ZeroShot(orthogonal=False, compact=True)"
IN_TURNS: dict[str, Callable[[list[nn.Parameter]], Any]] = {
    PLAIN: lambda params: LearnedOptimizer(params, ZeroShot(orthogonal=False), total_steps=10**6),
    COMPACT: lambda params: LearnedOptimizer(
        params, ZeroShot(orthogonal=False, compact=True), total_steps=10**6
    ),
    ORTHOGONAL: lambda params: LearnedOptimizer(params, ZeroShot(), total_steps=10**6),
    "AdamW, foreach": OPTIMIZERS["AdamW, foreach"],
    FUSED: OPTIMIZERS[FUSED],
}


class FlatMuon:
    """PyTorch's Muon of what has two dimensions or more, as matrices [outputs, rest]: it takes no others."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        weights = [p for p in params if p.ndim > 1]
        self.matrices = [nn.Parameter(p.detach().flatten(1)) for p in weights]
        for matrix, weight in zip(self.matrices, weights, strict=True):
            matrix.grad = None if weight.grad is None else weight.grad.flatten(1)
        self.step = torch.optim.Muon(self.matrices).step


def peers() -> dict[str, Callable[[list[nn.Parameter]], Any]]:
    """Those of other packages that are installed: pip install -e '.[peers]'."""
    found: dict[str, Callable[[list[nn.Parameter]], Any]] = {}
    with suppress(ImportError):
        from prodigyopt import Prodigy

        found["Prodigy"] = Prodigy
    with suppress(ImportError):
        from schedulefree import AdamWScheduleFree

        def schedule_free(params: list[nn.Parameter]) -> torch.optim.Optimizer:
            optimizer = AdamWScheduleFree(params)
            optimizer.train()
            return optimizer

        found["Schedule-Free AdamW"] = schedule_free
    return found


BYTES_MOVED = 36
"""A coordinate: θ and three statistics in and out, and the gradient in, in float32."""
MATRIX_PRODUCTS = (ORTHOGONAL, "Muon")
SQUARES = (10**6, 10**7)
TURNS, SECONDS = 200, 10.0
"""An optimizer has this many turns, fewer if it has taken longer than so many seconds, and three at least."""


def check(width: int, device: str) -> None:
    """One launch and a launch for every tensor must give the same θ.

    Raises:
        RuntimeError: They do not.
    """
    thetas = []
    for name in (OURS, "learned, launch per tensor"):
        parameters = make_parameters(resnet18_shapes(width), device)
        optimizer = OPTIMIZERS[name](parameters)
        for _ in range(3):
            optimizer.step()
        thetas.append(torch.cat([parameter.detach().reshape(-1) for parameter in parameters]))
    difference = float((thetas[0] - thetas[1]).abs().max())
    if not difference <= TOLERANCE:
        raise RuntimeError(f"one launch and a launch per tensor differ by {difference}: nothing is timed")


def measure(name: str, width: int, device: str) -> dict[str, float]:
    """Milliseconds of a step, and the bytes that the optimizer's state takes for a coordinate."""
    parameters = make_parameters(resnet18_shapes(width), device)
    optimizer, count = OPTIMIZERS[name](parameters), STEPS[torch.device(device).type]

    def steps() -> None:
        for _ in range(count):
            optimizer.step()

    # The wall clock's: PyTorch's timer waits for the device before it reads it.
    times = {key: value / count for key, value in time_ms(steps, "cpu").items()}
    states = (x for entries in optimizer.state.values() for x in entries.values() if x.ndim)
    total = sum(parameter.numel() for parameter in parameters)
    return times | {"state_bytes_per_coordinate": sum(x.numel() * x.itemsize for x in states) / total}


def measure_in_turns(shapes: list[tuple[int, ...]], device: str, turns: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a step of each, and its ratios to the fused AdamW's of the same turn."""
    chosen = IN_TURNS | peers()
    if hasattr(torch.optim, "Muon") and any(len(shape) > 1 for shape in shapes):
        chosen |= {"Muon": FlatMuon}
    optimizers = {name: make(make_parameters(shapes, device)) for name, make in chosen.items()}
    count = STEPS[torch.device(device).type]
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    # Matrix products by themselves: they would leave nothing in the caches for the others.
    plain = [name for name in optimizers if name not in MATRIX_PRODUCTS]
    for names in (plain, [name for name in optimizers if name in MATRIX_PRODUCTS]):
        for _ in range(turns + 1):
            for name in names:
                if len(times[name]) > 3 and sum(times[name]) > 1e3 * SECONDS / count:
                    continue
                start = timer()
                for _ in range(count):
                    optimizers[name].step()
                times[name].append(1e3 * (timer() - start) / count)
    rows = {}
    for name, (_, *warm) in times.items():
        pairs = zip(warm, times[FUSED][1:], strict=False)
        rows[name] = {
            "ms": statistics.median(warm),
            "ms_least": min(warm),
            "ratio": statistics.median(ours / theirs for ours, theirs in pairs),
            "least_over_least": min(warm) / min(times[FUSED][1:]),
        }
    size = sum(torch.Size(shape).numel() for shape in shapes)
    rows[PLAIN]["gb_per_s"] = 1e-6 * BYTES_MOVED * size / rows[PLAIN]["ms_least"]
    share = 1 - rows[PLAIN]["ms_least"] / rows[ORTHOGONAL]["ms_least"]
    rows[ORTHOGONAL]["share_of_orthogonalisation"] = share
    return rows


def compare_in_turns(
    width: int, device: str, squares: Sequence[int], turns: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Prints and returns the rows of ZeroShot and AdamW, by what they move."""
    result, copied = {}, copy_gb_per_s(device)
    resnet = list(resnet18_shapes(width))
    name, one = f"ResNet-18 of width {width}", "one tensor of as many"
    sets = {name: resnet, one: [(sum(torch.Size(shape).numel() for shape in resnet),)]}
    sets |= {f"{n:,} in four matrices": four_squares(n) for n in squares}
    for name, shapes in sets.items():
        print(f"\n{name}: {sum(torch.Size(shape).numel() for shape in shapes)} coordinates")
        print_row = start_log(["optimizer".ljust(40), "ms", "least ms", "ratio", "least/least"])
        result[name] = measure_in_turns(shapes, device, turns)
        for optimizer, row in result[name].items():
            print_row([optimizer, *(f"{row[key]:.3f}" for key in list(row)[:4])])
        share = result[name][ORTHOGONAL]["share_of_orthogonalisation"]
        print(f"orthogonalisation's share of ZeroShot's step: {share:.1%}")
        moved = result[name][PLAIN]["gb_per_s"]
        print(f"without it {moved:.1f} GB/s are moved, {moved / copied:.0%} of what a copy moves")
    row, alone = result[f"ResNet-18 of width {width}"][PLAIN], result[one][PLAIN]
    row["host_and_packing"] = row["ms_least"] / alone["ms_least"] - 1
    print(f"beyond the kernel, for {len(resnet)} tensors: {row['host_and_packing']:.1%}")
    return result


def compare_launches(width: int, device: str, coordinates: int) -> dict[str, dict[str, float]]:
    """Prints a row for every one of OPTIMIZERS as soon as it is measured, and returns them."""
    check(width, device)
    print_row = start_log(["optimizer".ljust(26), "ms", "ratio", "ns/coordinate", "state bytes"])
    rows: dict[str, dict[str, float]] = {}
    for name in OPTIMIZERS:
        row = rows[name] = measure(name, width, device)
        row["ratio"] = row["ms"] / rows[OURS]["ms"]
        row["ns_per_coordinate"] = 1e6 * row["ms"] / coordinates
        cells = (f"{row['ms']:.3f}", f"{row['ratio']:.3f}", f"{row['ns_per_coordinate']:.2f}")
        print_row([name, *cells, f"{row['state_bytes_per_coordinate']:.0f}"])
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Prints all tables, and writes the JSON asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--width", type=int, help="channels of the first layer: 64 on a GPU, 16 on the CPU")
    parser.add_argument(
        "--squares", type=int, nargs="+", default=SQUARES, help="coordinates of four matrices"
    )
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--only", choices=["zero-shot"], help="leave out the LSTM's rows")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    device = options.device
    width = options.width or (64 if device.startswith("cuda") else 16)
    shapes = list(resnet18_shapes(width))
    coordinates = sum(torch.Size(shape).numel() for shape in shapes)
    print(f"{coordinates} coordinates in {len(shapes)} tensors, {torch.get_num_threads()} threads")
    rows = {} if options.only else compare_launches(width, device, coordinates)
    in_turns = compare_in_turns(width, device, options.squares, options.turns)
    what = {"coordinates": coordinates, "tensors": len(shapes), "threads": torch.get_num_threads()}
    document = {"origin": origin(device), "rule": RULE, **what, "rows": rows, "in_turns": in_turns}
    if rows:
        print_table(speed_tables.optimizer_step(document))
    print_table(speed_tables.zero_shot_step(document))
    write_json(options.json, document)


if __name__ == "__main__":
    main()
