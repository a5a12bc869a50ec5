"""Any function of a parameter vector as a task: the shortest way to a problem of one's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from l2l_lightning.checks import check_at_least
from l2l_lightning.class_paths import dotted_path, resolve
from l2l_lightning.tasks.base import Batch, Task, check_scalar


class FunctionTask(Task):
    """Minimises f(θ) for any callable f of a vector θ [dim]: the optimizees differ in θ0 alone.

    Args:
        f: The function of θ [dim] to a scalar, fastest where torch.func.vmap can run it (no `.item()`); or
            its dotted path. Only what a dotted path names can be rebuilt from a checkpoint.
        dim: N, the length of θ.
        init: The standard deviation of θ0 ~ N(0, init²), or a function of a torch.Generator to θ0 [dim], or
            that function's dotted path.

    Raises:
        ValueError: An argument out of its range, a path that cannot be imported, or (when they are called)
            an f that is not scalar or a θ0 that is not [dim].
        TypeError: f or init is not callable, or f does not return a tensor.

    Example:
        >>> def rosenbrock(theta):
        ...     x, y = theta.unbind()
        ...     return (1 - x) ** 2 + 100 * (y - x**2) ** 2
        >>> task = FunctionTask(rosenbrock, dim=2, init=0.5)
        >>> task.losses(torch.tensor([[1.0, 1.0], [0.0, 0.0]]), ())
        tensor([0., 1.])
    """

    def __init__(
        self,
        # str first: the command line then keeps a path a path, which it can write to a configuration.
        f: str | Callable[[Tensor], Tensor],
        dim: int,
        init: float | str | Callable[[torch.Generator], Tensor] = 1.0,
    ) -> None:
        check_at_least(1, dim=dim)
        if isinstance(init, int | float):
            check_at_least(0, init=init)
        self.f = resolve(f, "f")
        self.num_coordinates = dim
        self.theta0 = float(init) if isinstance(init, int | float) else resolve(init, "init")

    def init(self, generator: torch.Generator) -> Tensor:
        """Draws θ0, [dim]."""
        shape = (self.num_coordinates,)
        if isinstance(self.theta0, float):
            return self.theta0 * torch.randn(shape, generator=generator)
        theta: Tensor = self.theta0(generator)
        if theta.shape != shape:
            raise ValueError(f"init must return θ0 of shape [dim] = {list(shape)}, got {list(theta.shape)}")
        return theta.detach().float()

    def loss(self, theta: Tensor, batch: Batch) -> Tensor:
        """Computes f(θ) of θ [dim]; the batch is ()."""
        value: Tensor = self.f(theta)
        check_scalar(value, f"f = {dotted_path(self.f)}")
        return value

    def config(self) -> dict[str, Any]:
        """Returns the constructor's arguments, functions by their dotted paths."""
        init = self.theta0 if isinstance(self.theta0, float) else dotted_path(self.theta0)
        return {"f": dotted_path(self.f), "dim": self.num_coordinates, "init": init}
