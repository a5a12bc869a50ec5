"""Networks whose features say what a picture shows, and in which style: a small one, VGG, and any other."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from safetensors.torch import load as from_safetensors
from torch import Tensor, nn

from l2l_lightning.errors import WeightsError

SHIPPED = "features.safetensors"
"""The file beside this module with the small network's weights, which `feature_training` makes."""

DOWNLOADED = "IMAGENET1K_V1"
"""The weights that torchvision downloads: VGG-19's, as Gatys et al.'s network is."""


class Standardise(nn.Module):
    """(x − mean) / deviation of pictures x [..., 3, H, W] in [0, 1], channel by channel."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, mean: Sequence[float], deviation: Sequence[float]) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("deviation", deviation)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Returns a tensor of x's shape."""
        return (x - self.mean) / self.deviation


class SmallFeatures(nn.Sequential):
    """Four 3×3 convolutions of 12 to 32 channels with SiLU, on three scales: conv1, act1, …, conv4, act4.

    Example:
        >>> SmallFeatures()(torch.rand(1, 3, 64, 64)).shape
        torch.Size([1, 32, 16, 16])
    """

    CHANNELS = (3, 12, 24, 24, 32)

    def __init__(self) -> None:
        layers: dict[str, nn.Module] = {"standardise": Standardise([0.5] * 3, [0.25] * 3)}
        for number, channels in enumerate(zip(self.CHANNELS, self.CHANNELS[1:], strict=False), start=1):
            layers[f"conv{number}"] = nn.Conv2d(*channels, 3, padding=1)
            layers[f"act{number}"] = nn.SiLU()
            if number in (1, 3):
                layers[f"pool{number}"] = nn.AvgPool2d(2)
        super().__init__(OrderedDict(layers))


class FeatureNetwork(NamedTuple):
    """A network, and which of its layers are compared unless somebody says otherwise."""

    network: nn.Module
    content_layers: tuple[str, ...]
    style_layers: tuple[str, ...]


def small_network() -> FeatureNetwork:
    """Returns the package's small network with the weights that ship with it."""
    network = SmallFeatures()
    file = resources.files("l2l_lightning.tasks.style").joinpath(SHIPPED)
    network.load_state_dict(from_safetensors(file.read_bytes()))
    return FeatureNetwork(network, ("act4",), ("act1", "act2", "act3", "act4"))


def vgg_network(weights: str) -> FeatureNetwork:
    """Returns the convolutions of VGG, with average pooling and the layers of Gatys et al., by their names.

    Layers are conv1_1, relu1_1, …, pool5. Without the fully connected layers a picture may have any size.

    Args:
        weights: A file (.pth, .safetensors) with the state dict of torchvision's vgg16 or vgg19: its tensors
            say which. Or IMAGENET1K_V1: VGG-19's, which torchvision downloads to its cache, or finds there.

    Raises:
        WeightsError: There is no such file, it holds something else, or it could not be downloaded.

    Source: Gatys, Ecker, Bethge 2016, "Image Style Transfer Using Convolutional Neural Networks", section 2.
    """
    from torchvision.models import vgg  # here: it takes seconds, and the small network does without

    state = {
        key.removeprefix("features."): value
        for key, value in _vgg_state(weights).items()
        if key.startswith("features.")
    }
    layout = {26: "D", 32: "E"}.get(len(state))  # weights and biases of VGG-16's convolutions, of VGG-19's
    if layout is None:
        raise _no_vgg(weights, f"it has {len(state)} tensors of features, not 26 or 32")
    convolutions = vgg.make_layers(vgg.cfgs[layout])
    try:
        convolutions.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        raise _no_vgg(weights, str(error)) from error
    layers: dict[str, nn.Module] = {"standardise": Standardise((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))}
    block, number = 1, 0
    for layer in convolutions:
        if isinstance(layer, nn.MaxPool2d):
            layers[f"pool{block}"] = nn.AvgPool2d(2)
            block, number = block + 1, 0
        else:
            number += isinstance(layer, nn.Conv2d)
            layers[f"{'conv' if isinstance(layer, nn.Conv2d) else 'relu'}{block}_{number}"] = layer
    style_layers = tuple(f"conv{block}_1" for block in range(1, 6))
    return FeatureNetwork(nn.Sequential(OrderedDict(layers)), ("conv4_2",), style_layers)


def _vgg_state(weights: str) -> dict[str, Tensor]:
    """Reads a state dict; nothing in the file is executed."""
    path = Path(weights).expanduser()
    try:
        if weights == DOWNLOADED:
            from torchvision.models import VGG19_Weights

            return dict(VGG19_Weights.IMAGENET1K_V1.get_state_dict(check_hash=True, weights_only=True))
        if path.suffix == ".safetensors":
            state: Any = from_safetensors(path.read_bytes())
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise WeightsError(
            f"weights={weights!r}: there is no such file; {DOWNLOADED} lets torchvision download VGG-19's"
        ) from error
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, safetensors.SafetensorError) as error:
        how = "could not be downloaded" if weights == DOWNLOADED else "cannot be read as a state dict"
        raise WeightsError(f"weights={weights!r} {how}: {_first_line(error)}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise _no_vgg(weights, "it is no dict of tensors")
    return state


def _no_vgg(weights: str, reason: str) -> WeightsError:
    short = " ".join(reason.split())[:200]
    return WeightsError(f"weights={weights!r} is no state dict of torchvision's vgg16 or vgg19: {short}")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


class LayerOutputs:
    """A frozen copy of a network that gives what some of its layers compute, by their names.

    Args:
        network: Takes pictures [1, 3, H, W] in [0, 1]; the copy is in eval mode.
        content_layers: Names of submodules, as `named_modules` has them.
        style_layers: More of them.

    Raises:
        ValueError: There is no such layer, or none is named; the message lists those that there are.
    """

    def __init__(
        self, network: nn.Module, content_layers: Sequence[str], style_layers: Sequence[str]
    ) -> None:
        there = [name for name, _ in network.named_modules() if name]
        for argument, names in (("content_layers", content_layers), ("style_layers", style_layers)):
            if unknown := [name for name in names if name not in there]:
                raise ValueError(f"{argument}: there is no layer {unknown[0]!r}, only {', '.join(there)}")
            if not names:
                raise ValueError(
                    f"{argument} must name layers of the network: choose from {', '.join(there)}"
                )
        self.layers = tuple(dict.fromkeys([*content_layers, *style_layers]))
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        for part in self.network.modules():
            if getattr(part, "inplace", False):  # it would overwrite the output of the layer before it
                part.inplace = False  # type: ignore[assignment]
        self._copies: dict[tuple[torch.device, torch.dtype], nn.Module] = {}

    def __call__(self, picture: Tensor) -> dict[str, Tensor]:
        """Returns the features [C, h, w] of a picture [3, H, W] by layer, in its dtype and on its device."""
        network = self._on(picture)
        found: dict[str, Any] = {}

        def keep(name: str) -> Callable[..., None]:
            return lambda module, inputs, output: found.update({name: output})

        handles = [network.get_submodule(name).register_forward_hook(keep(name)) for name in self.layers]
        try:
            network(picture[None])
        finally:
            for handle in handles:
                handle.remove()
        if unused := [name for name in self.layers if name not in found]:
            raise ValueError(f"the network does not call its layer {unused[0]!r}: name another one")
        return {name: found[name][0] for name in self.layers}

    def sizes(self, pictures: Sequence[Tensor]) -> dict[str, float]:
        """Returns the features' root mean square over pictures [3, H, W] by layer; 1 where all are zero.

        Raises:
            ValueError: The network cannot take such pictures, or a layer gives no features [1, C, h, w].
        """
        size = "×".join(map(str, pictures[0].shape[1:]))
        try:
            with torch.no_grad():
                outputs = [self(picture) for picture in pictures]
        except Exception as error:  # whatever code of the user's raises
            raise ValueError(
                f"features cannot be computed of a picture of size {size} ({type(error).__name__}: "
                f"{_first_line(error)}): is it too small for the network's strides and pools?"
            ) from error
        for name, value in outputs[0].items():
            if not isinstance(value, Tensor) or value.ndim != 3:
                raise ValueError(f"the layer {name!r} gives no features [1, C, h, w]: name another one")
        squares = {name: torch.stack([o[name].square().mean() for o in outputs]) for name in self.layers}
        return {name: float(square.mean().sqrt()) or 1.0 for name, square in squares.items()}

    def _on(self, picture: Tensor) -> nn.Module:
        """The network in a picture's dtype on its device; kept, as the host waits for a transfer."""
        key = (picture.device, picture.dtype)
        if key not in self._copies:
            with torch.inference_mode(False):  # a validation's would not do for a fit
                self._copies[key] = copy.deepcopy(self.network).to(*key)
        return self._copies[key]
