"""What a rule reads, apart from what it carries: features of gradients and of their running moments."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from l2l_lightning.rules.layout import Layout, Time


class Features(ABC):
    """Turns a gradient into the numbers x_t that a rule reads, with what else is known without φ.

    That is statistics of the gradients before it, how far the optimisation has come, and which coordinates
    belong to which tensor, of what shape.

    Features are free of φ. Along a rollout they are constants as gradients are, so that the meta-gradient's
    derivation holds unchanged (see `rollout`), and a window stores their values. Their statistics are float32
    (float64 where the gradients are) and are never rounded with the rule's state.

    A subclass sets `width` and `rows` and implements `__call__`, in operations that are finite at a gradient
    of zero with statistics of zero; it may not wait for the device. Coordinates of different tensors, and of
    different copies of the layout, must have no part in one another's features. One that needs T raises
    ValueError where `time.total` is None.
    """

    width: int
    """The rule reads this many numbers per coordinate, 1 to 32."""
    rows: int
    """There are this many statistics per coordinate, which are zero at first."""

    @abstractmethod
    def __call__(self, grad: Tensor, statistics: Tensor, time: Time, layout: Layout) -> Tensor:
        """Maps g_t [n] to x_t [width, n], and updates the statistics [rows, n] in place.

        Args:
            grad: g_t, [n], n = layout.copies · layout.num_coordinates.
            statistics: [rows, n], zero at first.
            time: t, and T where it is known.
            layout: The tensors that the coordinates belong to.
        """


class NormalisedMoments(Features):
    r"""RNNprop's two inputs, g_t and its running mean, both divided by the root of its running square.

    m_t = β m_{t-1} + (1 - β) g_t, v_t = β v_{t-1} + (1 - β) g_t², and x_t = (m̂_t, g_t) / max(√v̂_t, ε), where
    m̂_t = m_t / w_t and v̂_t = v_t / w_t with w_t = 1 - βᵗ, the sum of the weights, as Adam corrects its bias.
    x_t does not depend on the gradients' scale.

    Args:
        beta: β, in [0, 1).
        epsilon: ε, in units of the gradient.

    Raises:
        ValueError: A value is out of its range.

    Source: Lv, Jiang and Li 2017, "Learning gradient descent: better generalization and longer horizons".

    Example:
        >>> from l2l_lightning.rules import Layout, ParameterInfo, Time
        >>> features, layout = NormalisedMoments(beta=0.95), Layout((ParameterInfo("weight", (2,)),))
        >>> features(torch.tensor([2.0, 0.0]), torch.zeros(3, 2), Time(torch.zeros(()), None), layout)
        tensor([[1., 0.],
                [1., 0.]])
    """

    width = 2
    rows = 3

    def __init__(self, beta: float = 0.95, epsilon: float = 1e-8) -> None:
        if not 0 <= beta < 1:
            raise ValueError(f"beta must be in [0, 1), got {beta}")
        if not 0 < epsilon < float("inf"):
            raise ValueError(f"epsilon must be positive and finite, got {epsilon}")
        self.beta = beta
        self.epsilon = epsilon

    def __call__(self, grad: Tensor, statistics: Tensor, time: Time, layout: Layout) -> Tensor:
        """(m̂_t, g_t) / max(√v̂_t, ε), [2, n]; the statistics are m, v and w, [3, n]."""
        news = torch.stack([grad, grad * grad, torch.ones_like(grad)])
        statistics.lerp_(news, 1 - self.beta)
        mean, square, weight = statistics.unbind()
        # Clamped before the root, whose derivative at zero would make second orders NaN.
        scale = (square / weight).clamp(min=self.epsilon**2).sqrt()
        return torch.stack([mean / weight, grad]) / scale
