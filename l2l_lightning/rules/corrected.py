"""An LSTM on top of a trained `ZeroShot`: of every coordinate's direction, or of every tensor's step size."""

from __future__ import annotations

import functools
import itertools
import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import torch
from l2l_kernels import LSTMSpec, reference
from torch import Tensor, nn

from l2l_lightning.checks import check_positive
from l2l_lightning.rules.base import PopulationStep, Rule
from l2l_lightning.rules.layout import Layout
from l2l_lightning.rules.lstm import LSTMRule
from l2l_lightning.rules.nominal import DIRECTIONS, FACTS, NominalFeatures
from l2l_lightning.rules.zero_shot import ZeroShot
from l2l_lightning.rules.zero_shot_population import ZeroShotPopulation

OF_TENSORS = 2 + len(FACTS)
"""Features that all coordinates of a tensor have in common, the last ones: progress, decay and facts."""


class Corrected(LSTMRule):
    """A `ZeroShot` whose φ stays as it is, and an LSTM c_t ∈ [−bound, bound] that corrects what it does.

    The LSTM has one layer. Its head begins at zero: a fresh rule is the ZeroShot that it stands on. That is a
    neutral one until `start_from` has put a trained one in its place.

    Args:
        width: How many of ZeroShot's features x_t the LSTM reads, the last ones.
        hidden_size: H, 1 to 64.
        bound: The largest correction.
        orthogonal: ZeroShot's.
        horizon_free: ZeroShot's.
        forget_bias: Added to the forget gates' initial biases.
        backend: Kernel backend ("triton", "cpu", "reference"); None chooses by device.
        decay_facts: ZeroShot's; `start_from` takes that of the one it gets.
        precision: "bf16" or None, as CoordinatewiseLSTM's.
    """

    coordinatewise = False
    finishes_shards = True
    finish_has_no_phi = True

    def __init__(
        self,
        width: int,
        hidden_size: int,
        bound: float,
        orthogonal: bool,
        horizon_free: bool,
        forget_bias: float,
        backend: str | None,
        decay_facts: Literal[2, 4],
        precision: Literal["bf16"] | None,
    ) -> None:
        check_positive(bound=bound)
        base = ZeroShot(orthogonal, horizon_free, decay_facts=decay_facts)
        spec = LSTMSpec(1, hidden_size, "features", 10.0, bound, width, "tanh", precision)
        super().__init__(spec, 0.0, forget_bias, backend, base.features)
        self.bound = bound
        self.orthogonal = orthogonal
        self.horizon_free = horizon_free
        self.decay_facts = decay_facts
        self.base = _frozen(base)

    def config(self) -> dict[str, Any]:
        """Returns the constructor's arguments, without `decay_facts` where it is as in earlier versions."""
        arguments = super().config()
        return {name: arguments[name] for name in arguments if name != "decay_facts" or self.decay_facts != 2}

    def read_by_lstm(self, inputs: Tensor) -> Tensor:
        """Returns the last `width` features."""
        return inputs[..., -self.spec.width :, :].contiguous()

    def start_from(self, trained: Rule) -> None:
        """Takes φ from a rule of the same shape, or from a `ZeroShot` what this one corrects."""
        if isinstance(trained, ZeroShot):
            if self.decay_facts != trained.decay_facts:
                self.decay_facts = trained.decay_facts
                base = ZeroShot(self.orthogonal, self.horizon_free, decay_facts=trained.decay_facts)
                self.base = _frozen(base.to(self.base.log_step))
            self.base.load_state_dict(trained.state_dict())
        else:
            super().start_from(trained)

    def finish(self, update: Tensor, inputs: Tensor, theta: Tensor, layout: Layout) -> Tensor:
        """The LSTM's c_t [n] to −η d and ZeroShot's decay, both as they are corrected."""
        return self.base.finish(self.corrected(update, inputs, layout), inputs, theta, layout)

    @abstractmethod
    def corrected(self, correction: Tensor, inputs: Tensor, layout: Layout) -> Tensor:
        """Returns −η d [n], corrected by c_t [n]."""


class CorrectedDirection(Corrected):
    r"""`ZeroShot` with the direction d + c_t, scaled to d's root mean square over every tensor.

    c_t is an LSTM's output on every coordinate, zero where the gradient always was. It is trained by the
    exact meta-gradient of windows (100 steps and more; shorter ones do not see what a direction leads to),
    from a trained ZeroShot: `fit --config corrected_direction`. State: three statistics and 2H numbers a
    coordinate, 12 + 8H bytes.

    Args:
        hidden_size: H, 1 to 64.
        bound: The largest correction, in units of √v̂ as d is.
        orthogonal: Orthogonalise the updates of matrices with both sides of 4 and more.
        horizon_free: Go without T.
        forget_bias: Added to the forget gates' initial biases.
        backend: Kernel backend ("triton", "cpu", "reference"); None chooses by device.
        decay_facts: How many facts ZeroShot's decay of the weights follows; `start_from` sets it.
        precision: "bf16" or None, as CoordinatewiseLSTM's.

    Raises:
        ValueError: A value is out of its range, or the backend is unknown.
        TypeError: A value is of the wrong kind.

    Example:
        >>> from l2l_lightning import pretrained
        >>> rule = CorrectedDirection(hidden_size=4)
        >>> rule.start_from(pretrained.load("zero-shot"))
    """

    def __init__(
        self,
        hidden_size: int = 8,
        bound: float = 1.0,
        orthogonal: bool = True,
        horizon_free: bool = False,
        forget_bias: float = 1.0,
        backend: str | None = None,
        decay_facts: Literal[2, 4] = 2,
        precision: Literal["bf16"] | None = None,
    ) -> None:
        settings = bound, orthogonal, horizon_free, forget_bias, backend, decay_facts, precision
        super().__init__(NominalFeatures.width, hidden_size, *settings)

    def corrected(self, correction: Tensor, inputs: Tensor, layout: Layout) -> Tensor:
        """−η (d + c_t) as long as −η d."""
        direction = self.base.direction(inputs)
        moved = (inputs[: len(DIRECTIONS)] != 0).any(0)
        new = direction + correction * moved
        tiny = torch.finfo(new.dtype).tiny
        size, own = layout.mean(torch.stack([direction.square(), new.square()])).clamp(min=tiny).sqrt()
        pinned: Tensor = new * (size / own)
        return -self.base.step_size(inputs) * pinned


class CorrectedStepSize(Corrected):
    r"""`ZeroShot` with the step size η exp(c_t), c_t the mean over a tensor of an LSTM's outputs.

    The LSTM reads the facts of the tensor and of the horizon and what comes of them along the run: all its
    coordinates have the same input, and so the same state. It is trained by evolution strategies from a
    trained ZeroShot: `fit --config corrected_step_size`.

    Args:
        hidden_size: H, 1 to 64.
        bound: The largest correction of log η; log 4 keeps step sizes within a quarter and four times.
        orthogonal: Orthogonalise the updates of matrices with both sides of 4 and more.
        horizon_free: Go without T.
        forget_bias: Added to the forget gates' initial biases.
        backend: Kernel backend ("triton", "cpu", "reference"); None chooses by device.
        decay_facts: How many facts ZeroShot's decay of the weights follows; `start_from` sets it.
        precision: "bf16" or None, as CoordinatewiseLSTM's.

    Raises:
        ValueError: A value is out of its range, or the backend is unknown.
        TypeError: A value is of the wrong kind.

    Example:
        >>> from l2l_lightning import pretrained
        >>> rule = CorrectedStepSize(hidden_size=4)
        >>> rule.start_from(pretrained.load("zero-shot"))
    """

    def __init__(
        self,
        hidden_size: int = 4,
        bound: float = math.log(4),
        orthogonal: bool = True,
        horizon_free: bool = False,
        forget_bias: float = 1.0,
        backend: str | None = None,
        decay_facts: Literal[2, 4] = 2,
        precision: Literal["bf16"] | None = None,
    ) -> None:
        settings = bound, orthogonal, horizon_free, forget_bias, backend, decay_facts, precision
        super().__init__(OF_TENSORS, hidden_size, *settings)

    def population_step(
        self, phis: Mapping[str, Tensor], layout: Layout, statistics: Tensor, state: Tensor
    ) -> PopulationStep:
        """Steps of K optimizees, in which the LSTM is computed once for a tensor."""
        return _Population(self, phis, layout, statistics, state)

    def corrected(self, correction: Tensor, inputs: Tensor, layout: Layout) -> Tensor:
        """−η exp(c_t) d."""
        size = self.base.step_size(inputs) * layout.mean(correction).exp()
        return -size * self.base.direction(inputs)


class _Population(ZeroShotPopulation):
    """Moves K optimizees of the same tensors, the k-th by the k-th LSTM on the same ZeroShot.

    Args:
        rule: Which one; its own φ is not read.
        phis: The K values of every parameter by its name, [K, *shape] each.
        layout: The tensors, of K copies.
        statistics: m, m₂ and v, [3, K · n], which steps bring up to date in place.
        state: h and c, [1, 2, H, K · n], the same for all coordinates of a tensor; likewise.
    """

    def __init__(
        self,
        rule: CorrectedStepSize,
        phis: Mapping[str, Tensor],
        layout: Layout,
        statistics: Tensor,
        state: Tensor,
    ) -> None:
        of_base = {name: phi.expand(layout.copies, *phi.shape) for name, phi in rule.base.named_buffers()}
        super().__init__(rule.base, of_base, layout, statistics)
        self.phis_of_lstm = phis
        self.spec = rule.spec
        self.state = state.view(*state.shape[:-1], layout.copies, layout.num_coordinates)
        self.firsts = torch.tensor([0, *itertools.accumulate(self.sizes[:-1])], device=state.device)

    def sizes_of(self, inputs: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """η exp(c_t) and η λ of every tensor, [K, tensors] each; the state moves on."""
        sizes, shrink = super().sizes_of(inputs, theta)
        step = functools.partial(reference.step, torch.zeros_like(sizes[0]), spec=self.spec)
        phi = torch.cat([values.view(len(inputs), -1) for values in self.phis_of_lstm.values()], 1)
        state = self.state[..., self.firsts].movedim(-2, 0)  # [K, 1, 2, H, tensors]
        correction, state = torch.vmap(step)(inputs, state, phi)
        self.state.copy_(state.movedim(0, -2)[..., self.tensor_of])
        return sizes * correction.exp(), shrink


def _frozen(rule: ZeroShot) -> ZeroShot:
    """Returns the rule with its φ as buffers: saved with it, and no part of the φ of what it is in."""
    for name, phi in list(rule.named_parameters()):
        delattr(rule, name)
        rule.register_buffer(name, nn.Parameter(phi.detach(), requires_grad=False).data)
    return rule
