"""A step of LearnedOptimizer on a ResNet-18's parameters, beside AdamW's: time and memory, in one run.

    python benchmarks/optimizer_step.py [--device cuda] [--width 64] [--json FILE]

The peers are PyTorch's AdamW, foreach and fused, and LearnedOptimizer with a launch for every tensor. A ratio
is a time over that of LearnedOptimizer with float32 states. Times are the wall clock's, of steps back to back
and one wait for the device, so that what the host does for a step counts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from measuring import origin, start_table, time_ms, write_json
from torch import Tensor, nn

from l2l_lightning import LearnedOptimizer

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


def make_parameters(width: int, device: str) -> list[nn.Parameter]:
    """Parameters and gradients of the usual sizes, the same at every call."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    parameters = [nn.Parameter(0.02 * draw(shape)) for shape in resnet18_shapes(width)]
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


def check(width: int, device: str) -> None:
    """One launch and a launch for every tensor must give the same θ.

    Raises:
        RuntimeError: They do not.
    """
    thetas = []
    for name in (OURS, "learned, launch per tensor"):
        parameters = make_parameters(width, device)
        optimizer = OPTIMIZERS[name](parameters)
        for _ in range(3):
            optimizer.step()
        thetas.append(torch.cat([parameter.detach().reshape(-1) for parameter in parameters]))
    difference = float((thetas[0] - thetas[1]).abs().max())
    if not difference <= TOLERANCE:
        raise RuntimeError(f"one launch and a launch per tensor differ by {difference}: nothing is timed")


def measure(name: str, width: int, device: str) -> dict[str, float]:
    """Milliseconds of a step, and the bytes that the optimizer's state takes for a coordinate."""
    parameters = make_parameters(width, device)
    optimizer, count = OPTIMIZERS[name](parameters), STEPS[torch.device(device).type]

    def steps() -> None:
        for _ in range(count):
            optimizer.step()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)

    times = {key: value / count for key, value in time_ms(steps, "cpu").items()}
    states = (x for entries in optimizer.state.values() for x in entries.values() if x.ndim)
    total = sum(parameter.numel() for parameter in parameters)
    return times | {"state_bytes_per_coordinate": sum(x.numel() * x.itemsize for x in states) / total}


def main(arguments: list[str] | None = None) -> None:
    """Prints a row for every optimizer as soon as it is measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--width", type=int, help="channels of the first layer: 64 on a GPU, 16 on the CPU")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    device = options.device
    width = options.width or (64 if device.startswith("cuda") else 16)
    shapes = list(resnet18_shapes(width))
    coordinates = sum(torch.Size(shape).numel() for shape in shapes)
    check(width, device)
    print(f"{coordinates} coordinates in {len(shapes)} tensors, {torch.get_num_threads()} threads")
    print_row = start_table(["optimizer".ljust(26), "ms", "ratio", "ns/coordinate", "state bytes"])
    rows = {}
    for name in OPTIMIZERS:
        row = rows[name] = measure(name, width, device)
        row["ratio"] = row["ms"] / rows[OURS]["ms"]
        row["ns_per_coordinate"] = 1e6 * row["ms"] / coordinates
        cells = (f"{row['ms']:.3f}", f"{row['ratio']:.3f}", f"{row['ns_per_coordinate']:.2f}")
        print_row([name, *cells, f"{row['state_bytes_per_coordinate']:.0f}"])
    what = {"coordinates": coordinates, "tensors": len(shapes), "threads": torch.get_num_threads()}
    write_json(options.json, {"origin": origin(device), "rule": RULE, **what, "rows": rows})


if __name__ == "__main__":
    main()
