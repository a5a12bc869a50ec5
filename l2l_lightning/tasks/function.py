"""Any function of a parameter vector as a task: the shortest way to a problem of one's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from l2l_lightning.references import dotted_path, resolve
from l2l_lightning.tasks.base import Batch, Task
from l2l_lightning.tasks.checks import check_at_least, check_scalar


class FunctionTask(Task):
    """Minimises f(θ) for a callable f on a parameter vector θ [dim]: the optimizees differ in θ0 alone.

    Args:
        f: θ [dim] to a scalar, fastest where torch.func.vmap can run it (no `.item()`); or its dotted path.
            Only what a dotted path names can be rebuilt from a checkpoint.
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
        self.f = resolve(f, "f")
        self.num_coordinates = dim
        self.init_std: float | None = None
        self.draw_init: Callable[[torch.Generator], Tensor] | None = None
        if isinstance(init, int | float):
            check_at_least(0, init=init)
            self.init_std = float(init)
        else:
            self.draw_init = resolve(init, "init")

    def init(self, generator: torch.Generator) -> Tensor:
        """θ0, [dim]."""
        shape = (self.num_coordinates,)
        if self.draw_init is None:
            assert self.init_std is not None
            return self.init_std * torch.randn(shape, generator=generator)
        theta = self.draw_init(generator)
        if theta.shape != shape:
            raise ValueError(f"init must return θ0 of shape [dim] = {list(shape)}, got {list(theta.shape)}")
        return theta.detach().float()

    def loss(self, theta: Tensor, batch: Batch) -> Tensor:
        """f(θ)."""
        value: Tensor = self.f(theta)
        check_scalar(value, f"f = {dotted_path(self.f)}")
        return value

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, functions by their dotted paths."""
        init = self.init_std if self.draw_init is None else dotted_path(self.draw_init)
        return {"f": dotted_path(self.f), "dim": self.num_coordinates, "init": init}
