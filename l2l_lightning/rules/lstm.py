"""The coordinatewise LSTM of Andrychowicz et al., on the fused operators."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import torch
from l2l_kernels import BACKENDS, LSTMSpec, bptt, choose, cpu, reference, step_
from torch import Tensor, nn

from l2l_lightning.checks import check_choice, check_finite, check_positive
from l2l_lightning.rules.base import Step, UpdateRule
from l2l_lightning.rules.features import Features


class LSTMRule(UpdateRule):
    """An LSTM on every coordinate, with shared weights and the fused kernels: what its kinds have in common.

    u_t = output_scale · out(w_out · h_t + b_out), h_t the top layer's output on x_t. State [L, 2, H, n]; see
    `l2l_kernels.LSTMSpec` for the maths and `l2l_kernels.reference` for the code.

    Args:
        spec: The LSTM's shape and constants.
        head_init_scale: Multiplies the output head's initial weights; its bias starts at 0. A rule that
            starts with small updates trains; one that starts with large ones goes to chance and stays.
        forget_bias: Added to the forget gates' initial biases: the rule starts with a longer memory.
        backend: Kernel backend ("triton", "cpu", "reference"); None chooses by device.
        features: What the LSTM reads, with the spec's preprocessing "features" and its width; else None.

    Raises:
        ValueError: A value is not finite, the backend is unknown, or the features are not the spec's.
        TypeError: A value is no number.
    """

    def __init__(
        self,
        spec: LSTMSpec,
        head_init_scale: float,
        forget_bias: float,
        backend: str | None,
        features: Features | None = None,
    ) -> None:
        super().__init__()
        check_finite(head_init_scale=head_init_scale, forget_bias=forget_bias)
        if backend is not None and backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
        if (spec.preprocessing == "features") != (features is not None):
            raise ValueError(f"features of the width {spec.width} are what {spec} reads, got {features}")
        self.spec = spec
        self.num_layers, self.hidden_size = spec.num_layers, spec.hidden_size
        self.output_scale = spec.output_scale
        self.head_init_scale = head_init_scale
        self.forget_bias = forget_bias
        self.backend = backend
        self.features = features
        self.state_shape = spec.state_shape
        H = spec.hidden_size
        # Registered in the order of φ's flat layout.
        for layer in range(spec.num_layers):
            K = spec.layer_inputs(layer) + H
            self.register_parameter(f"weight_{layer}", nn.Parameter(torch.empty(4 * H, K)))
            self.register_parameter(f"bias_{layer}", nn.Parameter(torch.empty(4 * H)))
        self.head_weight = nn.Parameter(torch.empty(H))
        self.head_bias = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    @property
    def precision(self) -> Literal["bf16"] | None:
        """How the kernels round the operands of products with the layers' weights: the spec's; settable."""
        return self.spec.precision

    @precision.setter
    def precision(self, precision: Literal["bf16"] | None) -> None:
        self.spec = dataclasses.replace(self.spec, precision=precision)

    def kernels_on(self, device: torch.device) -> str:
        """Returns the name of the backend that runs on a device.

        Raises:
            BackendUnavailableError: The one asked for cannot run there, or not with this precision.
        """
        name = choose(device, self.backend)
        if name == "cpu":
            cpu.check_precision(self.spec, self.head_bias.dtype)
        return name

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws φ anew: U(±1/√H) as torch.nn.LSTM, forget biases raised, the head scaled down."""
        H = self.spec.hidden_size
        bound = H**-0.5
        for parameter in self.parameters():
            drawn = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
            parameter.copy_(drawn)
        for layer in range(self.spec.num_layers):
            self.get_parameter(f"bias_{layer}")[H : 2 * H].add_(self.forget_bias)
        self.head_weight.mul_(self.head_init_scale)
        self.head_bias.zero_()

    def phi(self) -> Tensor:
        """Returns φ as the flat vector [P] that the operators take."""
        return torch.cat([parameter.reshape(-1) for parameter in self.parameters()])

    def step(self, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Maps (x_t, s_t [L, 2, H, n]) to (u_t [n], s_{t+1}) in plain PyTorch, which is the definition."""
        theta = inputs.new_zeros(inputs.shape[-1])
        return reference.step(theta, self.read_by_lstm(inputs), state, self.phi(), self.spec)

    def read_by_lstm(self, inputs: Tensor) -> Tensor:
        """Returns what of x_t, or of x_t of several steps [T, …], the LSTM reads: all of it."""
        return inputs

    @torch.no_grad()
    def stepper(self) -> Step:
        """Returns a step that adds u_t to θ and writes s_{t+1} in one fused launch; φ is packed here."""
        fused = functools.partial(step_, phi=self.phi(), spec=self.spec, backend=self.backend)
        read = self.read_by_lstm
        return lambda theta, inputs, state, new_state: fused(theta, read(inputs), state, new_state)

    @torch.no_grad()
    def segment_gradient(
        self, inputs: Tensor, history: Tensor, d_updates: Tensor, d_final_state: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """Returns the derivatives in φ and s_0 of a segment, by the fused backward through time."""
        d_phi, d_state = bptt(
            self.read_by_lstm(inputs), history, d_updates, d_final_state, self.phi(), self.spec, self.backend
        )
        parameters = list(self.parameters())
        parts = torch.split(d_phi, [parameter.numel() for parameter in parameters])
        return [part.view_as(parameter) for part, parameter in zip(parts, parameters, strict=True)], d_state


class CoordinatewiseLSTM(LSTMRule):
    """An LSTM applied to every coordinate separately, with shared weights.

    u_t = output_scale · (w_out · h_t + b_out), h_t the top layer's output on the preprocessed
    gradient_scale · g_t.
    State [L, 2, H, n]; see `l2l_kernels.LSTMSpec` for the maths and `l2l_kernels.reference` for the code.

    Args:
        num_layers: L, 1 to 3 (paper: 2).
        hidden_size: H, 1 to 64 (paper: 20).
        preprocessing: "log_sign" (paper, on neural networks) or "identity" (its quadratics).
        p: Threshold of "log_sign" (paper: 10; DeepMind's code: 5).
        output_scale: Paper: 0.1 on MNIST, 1 on quadratics; DeepMind's code: 0.01.
        head_init_scale: Multiplies the output head's initial weights; its bias starts at 0. A rule that
            starts with small updates trains; one that starts with large ones goes to chance and stays.
        forget_bias: Added to the forget gates' initial biases: the rule starts with a longer memory.
        backend: Kernel backend ("triton", "cpu", "reference"); None chooses by device.
        gradient_scale: Multiplies gradients before anything else.
        precision: "bf16" rounds the operands of products with the layers' weights to bfloat16, which is
            faster on processors with AVX512_BF16 (see `l2l_kernels.LSTMSpec`); None does as the backend does
            by itself.

    Raises:
        ValueError: A value is out of its range (see LSTMSpec) or not finite, gradient_scale is not positive,
            or the backend is unknown.
        TypeError: num_layers or hidden_size is not a whole number.

    Source: Andrychowicz et al. 2016, section 2.1.

    Example:
        >>> rule = CoordinatewiseLSTM(num_layers=2, hidden_size=20)
        >>> update, state = rule.step(torch.randn(1000), rule.init_state(1000))
    """

    def __init__(
        self,
        num_layers: int = 2,
        hidden_size: int = 20,
        preprocessing: Literal["log_sign", "identity"] = "log_sign",
        p: float = 10.0,
        output_scale: float = 0.1,
        head_init_scale: float = 0.1,
        forget_bias: float = 1.0,
        backend: str | None = None,
        gradient_scale: float = 1.0,
        precision: Literal["bf16"] | None = None,
    ) -> None:
        check_choice(["log_sign", "identity"], preprocessing=preprocessing)
        check_finite(output_scale=output_scale)
        check_positive(gradient_scale=gradient_scale)
        spec = LSTMSpec(num_layers, hidden_size, preprocessing, p, output_scale, precision=precision)
        super().__init__(spec, head_init_scale, forget_bias, backend)
        self.preprocessing = preprocessing
        self.p = p
        self.gradient_scale = gradient_scale

    def read_by_lstm(self, inputs: Tensor) -> Tensor:
        """Returns gradient_scale · g_t."""
        return inputs if self.gradient_scale == 1 else inputs * self.gradient_scale
