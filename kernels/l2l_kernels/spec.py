"""The shape and constants of a coordinatewise LSTM, where its weights lie, and a nominal step's numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from torch import Tensor

Preprocessing = Literal["log_sign", "identity", "features"]
Output = Literal["linear", "tanh"]
Precision = Literal["bf16"]

MAX_LAYERS = 3
MAX_HIDDEN_SIZE = 64
MAX_WIDTH = 32


class Weights(NamedTuple):
    """The weights of each layer and of the output head: views into φ."""

    layers: list[tuple[Tensor, Tensor]]
    """Per layer (weight [4H, K], bias [4H]); K = inputs + H, columns [input | h]; gate rows i, f, g, o."""
    head_weight: Tensor
    """[H]"""
    head_bias: Tensor
    """[] (0-d)"""


@dataclass(frozen=True)
class LSTMSpec:
    r"""Shape and constants of a coordinatewise LSTM optimizer.

    Per coordinate, with x_t the preprocessed inputs (or, above the first layer, the layer below's h_t):

        (i, f, g, o) = W [x_t; h_{t-1}] + b          c_t = σ(f) c_{t-1} + σ(i) tanh(g)
        h_t = σ(o) tanh(c_t)                         u_t = output_scale · out(w_out · h_t^{(L)} + b_out)

    Args:
        num_layers: L, 1 to 3.
        hidden_size: H, 1 to 64.
        preprocessing: What the kernels make of their inputs. "log_sign": of gradients g [N],
            x = (max(log|g| / p, -1), clamp(e^p g, -1, 1)); "identity": x = g, of the same; "features": the
            inputs are features x [width, N] as they are.
        p: The threshold of "log_sign": gradients below e^{-p} are passed linearly (paper: 10).
        output_scale: Multiplies the head's output (paper: 0.1 on MNIST).
        width: Features per coordinate, 1 to 32, with preprocessing "features"; else 1, the gradient.
        output: out, "linear" or "tanh" (which bounds updates by output_scale; Lv et al. 2017).
        precision: How products with the layers' weights round their operands, in a step and in the backward.
            "bf16": to bfloat16's 8 bits; sums and all else are float32, and so are, on a GPU, a step's
            products with the first layer's inputs. None: as a backend does by itself, which is not at all but
            on a GPU (see `triton.configs.Precisions`).

    Raises:
        ValueError: A value is out of its range; the message names it.
        TypeError: num_layers, hidden_size or width is no whole number.

    Source: Andrychowicz et al. 2016, section 2.1 and appendix A.

    Example:
        >>> LSTMSpec(num_layers=2, hidden_size=20).num_parameters
        5141
    """

    num_layers: int = 2
    hidden_size: int = 20
    preprocessing: Preprocessing = "log_sign"
    p: float = 10.0
    output_scale: float = 0.1
    width: int = 1
    output: Output = "linear"
    precision: Precision | None = None

    def __post_init__(self) -> None:
        largest = {"num_layers": MAX_LAYERS, "hidden_size": MAX_HIDDEN_SIZE, "width": MAX_WIDTH}
        for name, maximum in largest.items():
            value = getattr(self, name)
            if type(value) is not int:
                raise TypeError(f"{name} must be a whole number, got {value!r}")
            if not 1 <= value <= maximum:
                raise ValueError(f"{name} must be 1 to {maximum}, got {value}")
        for name, choices in (("preprocessing", get_args(Preprocessing)), ("output", get_args(Output))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        if self.precision not in (None, *get_args(Precision)):
            raise ValueError(f'precision must be None or "bf16", got {self.precision!r}')
        if not 0 < self.p < 80:
            raise ValueError(f"p must be in (0, 80) so that e^p is a float32, got {self.p}")
        if self.output_scale <= 0:
            raise ValueError(f"output_scale must be positive, got {self.output_scale}")
        if self.width > 1 and self.preprocessing != "features":
            raise ValueError(f'width must be 1 with preprocessing "{self.preprocessing}", got {self.width}')

    def to_lists(self) -> tuple[list[int], list[float]]:
        """Returns the fields as whole and as floating numbers, which an operator's schema can hold.

        Example:
            >>> spec = LSTMSpec(1, 4)
            >>> LSTMSpec.from_lists(*spec.to_lists()) == spec
            True
        """
        preprocessing = get_args(Preprocessing).index(self.preprocessing)
        output = get_args(Output).index(self.output)
        precision = (None, *get_args(Precision)).index(self.precision)
        whole = [self.num_layers, self.hidden_size, preprocessing, self.width, output, precision]
        return whole, [float(self.p), float(self.output_scale)]

    @classmethod
    def from_lists(cls, whole: Sequence[int], floating: Sequence[float]) -> LSTMSpec:
        """Builds the spec of which `to_lists` gave the fields.

        Raises:
            ValueError: A list has another length, or a value is out of its range.
        """
        try:
            num_layers, hidden_size, preprocessing, width, output, precision = whole
            p, output_scale = floating
            kinds = get_args(Preprocessing)[preprocessing], get_args(Output)[output]
            rounding = (None, *get_args(Precision))[precision]
        except (IndexError, ValueError) as error:
            raise ValueError(f"no LSTMSpec has the fields {list(whole)} and {list(floating)}") from error
        return cls(num_layers, hidden_size, kinds[0], p, output_scale, width, kinds[1], rounding)

    @property
    def num_inputs(self) -> int:
        """The numbers per coordinate that the first layer reads: 2 (log, sign), 1 (identity) or width."""
        return 2 if self.preprocessing == "log_sign" else self.width

    def input_shape(self, N: int) -> tuple[int, ...]:
        """Returns the shape of a step's inputs: gradients' [N], or features' [width, N]."""
        return (self.width, N) if self.preprocessing == "features" else (N,)

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """[L, 2, H], per layer h then c: the state of N coordinates is [L, 2, H, N]."""
        return (self.num_layers, 2, self.hidden_size)

    def layer_inputs(self, layer: int) -> int:
        """Returns how many columns of a layer's weight multiply its input; the H others multiply h."""
        return self.num_inputs if layer == 0 else self.hidden_size

    @property
    def num_parameters(self) -> int:
        """P, the length of φ."""
        H = self.hidden_size
        per_layer = (4 * H * (self.layer_inputs(layer) + H + 1) for layer in range(self.num_layers))
        return sum(per_layer) + H + 1

    def check_length(self, phi: Tensor) -> None:
        """Raises ValueError unless φ is [num_parameters]."""
        if phi.shape != (self.num_parameters,):
            raise ValueError(f"phi must have shape [{self.num_parameters}] for {self}, got {list(phi.shape)}")

    def unpack(self, phi: Tensor) -> Weights:
        """Returns views into the flat φ [P], which is W_0, b_0, W_1, b_1, …, w_out, b_out.

        Raises:
            ValueError: φ does not have num_parameters elements.
        """
        self.check_length(phi)
        H, offset = self.hidden_size, 0
        layers = []
        for layer in range(self.num_layers):
            K = self.layer_inputs(layer) + H
            weight = phi[offset : offset + 4 * H * K].view(4 * H, K)
            offset += 4 * H * K
            layers.append((weight, phi[offset : offset + 4 * H]))
            offset += 4 * H
        return Weights(layers, phi[offset : offset + H], phi[offset + H])


class Coefficients(NamedTuple):
    """The numbers of a nominal step that are the same for all tensors: see `nominal_step`."""

    w_fast: float
    """What the newest gradient counts in m."""
    w_slow: float
    """What it counts in m₂."""
    w_square: float
    """What its square counts in v."""
    fast: float
    """c_m: how much of m the direction has."""
    gradient: float
    """c_g: how much of the gradient."""
    slow: float
    """c_s: how much of m₂."""
    square: float
    """c_v: what v is multiplied by under the root."""
    shrink: float
    """κ: how much of every θ is taken off."""


class SizeHead(NamedTuple):
    """The numbers by which a tensor's size and decay follow from its sums: see `nominal_sizes`."""

    of_counts_fast: float
    """a_m: added to log(Σm² / Σv)."""
    of_counts_slow: float
    """a_s: added to log(Σm₂² / Σv)."""
    low: float
    """The least that either can be."""
    high: float
    """The most."""
    of_fast: float
    """w_m: what the first counts in the size's logarithm."""
    of_slow: float
    """w_s: what the second counts."""
    limit: float
    """The largest logarithm of a size."""
    scale: float
    """What sizes are multiplied by, after all else."""
    of_decay: float
    """w_λ: what the first counts in the decay's logarithm."""
    most_decay: float
    """The largest λ."""
