"""What the rounding of matrix products costs in accuracy: the 2×20 LSTM's step and backward against float64.

Emulated on the CPU: operands are rounded as tensor cores round them, products accumulate in float32. The step
runs a rollout on given gradients, the backward the same window from the float64 history.

python benchmarks/product_precision.py --json benchmarks/results/product_precision.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from l2l_kernels import LSTMSpec, reference
from measuring import print_table, write_json
from speed_tables import rounded_products
from torch import Tensor
from torch.overrides import TorchFunctionMode

from l2l_lightning.provenance import origin

SPEC = LSTMSpec(num_layers=2, hidden_size=20)
N = 2000
Product = Callable[[Tensor, Tensor], Tensor]


def tf32_truncated(x: Tensor) -> Tensor:
    """The 10 leading bits of the mantissa."""
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


def tf32_nearest(x: Tensor) -> Tensor:
    """10 bits of mantissa, ties away from zero."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def bf16(x: Tensor) -> Tensor:
    """7 bits of mantissa."""
    return x.bfloat16().float()


def tf32x3(a: Tensor, b: Tensor) -> Tensor:
    """As the kernels' dot: the low halves' product, of the order of 2^-22, is left out."""
    a_high, b_high = tf32_truncated(a), tf32_truncated(b)
    a_low, b_low = tf32_truncated(a - a_high), tf32_truncated(b - b_high)
    return a_low @ b_high + a_high @ b_low + a_high @ b_high


PRODUCTS: dict[str, Product] = {
    "float32": lambda a, b: a @ b,
    "tf32x3": tf32x3,
    "tf32, to nearest": lambda a, b: tf32_nearest(a) @ tf32_nearest(b),
    "tf32, truncated": lambda a, b: tf32_truncated(a) @ tf32_truncated(b),
    "bf16": lambda a, b: bf16(a) @ bf16(b),
}


class Rounded(TorchFunctionMode):
    """Computes the products of two matrices with `product`; `exact` columns of [x | h] stay float32.

    The step multiplies the first layer's inputs without matrix products, the backward does not.
    """

    def __init__(self, product: Product, exact: int = 0) -> None:
        self.product, self.exact = product, exact

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in (torch.Tensor.matmul, torch.Tensor.__matmul__) or args[0].ndim < 2:
            return func(*args, **(kwargs or {}))
        a, b = (x.contiguous() for x in args)
        k = self.exact if a.shape[1] == self.exact + SPEC.hidden_size else 0
        with torch._C.DisableTorchFunction():
            rounded = self.product(a[:, k:].contiguous(), b[k:].contiguous())
            return rounded + a[:, :k] @ b[:k] if k else rounded


def rollout(grads: Tensor, phi: Tensor, state_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(θ [N], history [T+1, L, 2, H, N]) of the updates from θ = 0; states are stored as state_dtype."""
    theta, state = grads.new_zeros(N), torch.zeros(*SPEC.state_shape, N, dtype=state_dtype)
    history = [state]
    for grad in grads:
        theta, state = reference.step(theta, grad, state, phi, SPEC)
        history.append(state)
    return theta, torch.stack(history)


def error(actual: Tensor, expected: Tensor) -> float:
    """‖a − b‖ / ‖b‖."""
    return float((actual.double() - expected).norm() / expected.norm())


def measure(T: int, seed: int) -> list[dict[str, Any]]:
    """One row for each way to multiply and to store the state."""
    generator = torch.Generator().manual_seed(seed)
    phi = 0.3 * torch.randn(SPEC.num_parameters, generator=generator)
    scales = 10 ** torch.empty(N).uniform_(-6, 1, generator=generator)
    grads = scales * torch.randn(T, N, generator=generator)
    d_updates = torch.randn(T, N, generator=generator)

    theta, history = rollout(grads.double(), phi.double(), torch.float64)
    arguments = grads.double(), history, d_updates.double(), None, phi.double(), SPEC
    d_phi, d_state = reference.bptt(*arguments)
    rows = []
    for state_dtype in (torch.float32, torch.bfloat16):
        for name, product in PRODUCTS.items():
            with Rounded(product, exact=SPEC.num_inputs):
                actual_theta, actual_history = rollout(grads, phi, state_dtype)
            with Rounded(product):
                actual = reference.bptt(grads, history.float().to(state_dtype), d_updates, None, phi, SPEC)
            rows.append(
                {
                    "steps": T,
                    "products": name,
                    "state": str(state_dtype).removeprefix("torch."),
                    "theta": error(actual_theta, theta),
                    "final_state": error(actual_history[-1], history[-1]),
                    "d_phi": error(actual[0], d_phi),
                    "d_initial_state": error(actual[1], d_state),
                }
            )
    return rows


def main() -> None:
    """Prints the errors of the longest rollout, and writes the JSON asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 100])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()
    rows = [row for T in arguments.steps for row in measure(T, arguments.seed)]
    document = {
        "origin": origin("cpu"),
        "emulated": True,
        "seed": arguments.seed,
        "coordinates": N,
        "errors": rows,
    }
    print_table(rounded_products(document))
    write_json(arguments.json, document)


if __name__ == "__main__":
    main()
