"""RNNprop of Lv, Jiang and Li: an LSTM on normalised moments, whose updates are bounded."""

from __future__ import annotations

from typing import Literal

from l2l_kernels import LSTMSpec

from l2l_lightning.rules.features import NormalisedMoments
from l2l_lightning.rules.lstm import LSTMRule


class RNNprop(LSTMRule):
    """u_t = output_scale · tanh(w_out · h_t + b_out), h_t an LSTM's output on (m̂_t, g_t) / √v̂_t.

    Neither the gradients' scale nor a large gradient reaches the update, which output_scale bounds. In the
    paper the two inputs go through a linear layer with ELU first; here the LSTM reads them as they are.

    Args:
        num_layers: L, 1 to 3 (paper: 2).
        hidden_size: H, 1 to 64 (paper: 20).
        beta: β of both moments, in [0, 1) (paper: 0.95).
        output_scale: The bound of an update (paper: 0.1).
        head_init_scale: Multiplies the output head's initial weights; its bias starts at 0.
        forget_bias: Added to the forget gates' initial biases.
        backend: Kernel backend ("triton", "cpu", "reference"); None chooses by device.
        precision: "bf16" or None, as CoordinatewiseLSTM's.

    Raises:
        ValueError: A value is out of its range or not finite, or the backend is unknown.

    Source: Lv, Jiang and Li 2017, "Learning gradient descent: better generalization and longer horizons".

    Example:
        >>> import torch
        >>> from l2l_lightning import LearnedOptimizer
        >>> model = torch.nn.Linear(10, 1)
        >>> optimizer = LearnedOptimizer(model.parameters(), rule=RNNprop(hidden_size=4))
    """

    def __init__(
        self,
        num_layers: int = 2,
        hidden_size: int = 20,
        beta: float = 0.95,
        output_scale: float = 0.1,
        head_init_scale: float = 0.1,
        forget_bias: float = 1.0,
        backend: str | None = None,
        precision: Literal["bf16"] | None = None,
    ) -> None:
        spec = LSTMSpec(num_layers, hidden_size, "features", 10.0, output_scale, 2, "tanh", precision)
        super().__init__(spec, head_init_scale, forget_bias, backend, NormalisedMoments(beta))
        self.beta = beta
