"""Neural art as a task: a picture is optimised itself, to have one's content and another one's style."""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l2l_lightning.checks import check_at_least, check_choice, check_positive, check_whole_numbers
from l2l_lightning.class_paths import resolve
from l2l_lightning.rules.layout import ParameterInfo
from l2l_lightning.tasks.base import Batch, Task
from l2l_lightning.tasks.style.networks import FeatureNetwork, LayerOutputs, small_network, vgg_network
from l2l_lightning.tasks.style.pictures import PARTS, PHOTOGRAPHS, read_pictures, split_pictures, square

Pictures = str | Path | Tensor | Sequence[str | Path | Tensor]
"""What `pictures.read_pictures` takes."""

SIZED_ON = 8
"""The pictures that the features' sizes are measured on."""


class StyleTransfer(Task):
    r"""Neural art: f(θ) = A (α L_content(c, θ) + β L_style(s, θ) + γ L_reg(θ)), θ the picture itself.

    With F_l(x) [C_l, M_l] the features of a picture x in a network's layer l, M_l places of C_l channels,
    divided by a number for each layer, and G_l = F_l F_lᵀ / M_l their Gram matrix,

        L_content = mean over content layers of  mean (F_l(θ) − F_l(c))²
        L_style   = mean over style layers of    1/(4 C_l²) Σ_ij (G_l(θ)_ij − G_l(s)_ij)²
        L_reg     = mean (θ_{y+1,x} − θ_{y,x})² + mean (θ_{y,x+1} − θ_{y,x})².

    L_style is Gatys et al.'s (equations 4 and 5, which have 1/(4 C² M²) and Gram matrices that are sums);
    L_content is theirs (equation 1) with the mean in place of half the sum; L_reg is Mahendran and Vedaldi's
    total variation, of squares. A = H W / 64² is the picture's area: with it the gradient in a pixel is of
    one size at every resolution, as of sums over pixels, and so are learning rates. The number that a layer's
    features are divided by is their root mean square over training contents, 8 at most, where Gatys et al.
    scale every filter to a mean of one: the weights then mean the same for every network.

    θ [3·H·W] is the picture in colours that are meant to be in [0, 1], and may leave it. An optimizee is a
    content and a style, drawn from those given; `on_split` says of which contents: training, validation and
    test never share one.

    Args:
        contents: Pictures: "photographs" (scikit-learn's two), files, a folder, a tensor [M, 3, H, W] in
            [0, 1] or a list of these, split into three parts by a fixed permutation; or a mapping of
            train, validation and test to such. What is no path cannot be rebuilt from a checkpoint.
        styles: Pictures, or names of generated ones ("swirls", "mosaic", "dots"); their middle square counts.
        size: H = W, in pixels, of θ and of what contents and styles are resized to.
        least_share: A content is a square of its picture at a random place, and its side between this share
            of the picture's shorter side and all of it. 1: the largest square, still at a random place.
        weights: VGG's, as the network: a file of torchvision's vgg16 or vgg19, or IMAGENET1K_V1 (see
            `networks.vgg_network`). None: the package's small network.
        features: A network of yours in place of these: an nn.Module of pictures [1, 3, H, W] in [0, 1], a
            function without arguments that builds it (from a fixed seed), or the dotted path of one. It is
            frozen and put in eval mode, and its layers must be named.
        content_layers: Names of submodules; None are those that Gatys et al. took of VGG, or the small
            network's last.
        style_layers: The same of the style: five of VGG, or the small network's four.
        content_weight: α.
        style_weight: β.
        tv_weight: γ.
        start: θ0: "noise", colours uniform in [0, 1], or "content", the content itself.

    Raises:
        ValueError: An argument out of its range, contents or styles that are no pictures in [0, 1], an
            unknown layer (the message lists those that there are), or a size that is too small for the
            network.
        TypeError: An argument of the wrong kind.
        DataNotFoundError: There is no such file or folder, or scikit-learn is missing.
        DataCorruptedError: A file cannot be read as a picture.
        WeightsError: The weights cannot be read as VGG's, or not be downloaded.

    Source: Andrychowicz et al. 2016, section 3.4; Gatys, Ecker, Bethge 2016, "Image Style Transfer Using
    Convolutional Neural Networks"; Mahendran, Vedaldi 2015, "Understanding Deep Image Representations by
    Inverting Them", equation 5.

    Example:
        >>> task = StyleTransfer(torch.rand(6, 3, 40, 40), "dots", size=16)
        >>> task.num_coordinates, task.init(torch.Generator().manual_seed(0)).shape
        (768, torch.Size([768]))
    """

    def __init__(
        self,
        contents: Pictures | Mapping[str, Pictures] = PHOTOGRAPHS,
        styles: Pictures = "swirls",
        size: int = 64,
        least_share: float = 1.0,
        weights: str | None = None,
        features: str | nn.Module | Callable[[], nn.Module] | None = None,
        content_layers: Sequence[str] | None = None,
        style_layers: Sequence[str] | None = None,
        content_weight: float = 1.0,
        style_weight: float = 20.0,
        tv_weight: float = 2.0,
        start: Literal["noise", "content"] = "noise",
    ) -> None:
        check_whole_numbers(2, 4096, size=size)
        check_positive(least_share=least_share)
        if least_share > 1:
            raise ValueError(f"least_share must be at most 1, got {least_share}")
        check_at_least(0, content_weight=content_weight, style_weight=style_weight, tv_weight=tv_weight)
        check_choice(("noise", "content"), start=start)
        self.contents = contents
        self.styles = styles
        self.size = size
        self.least_share = least_share
        self.weights = weights
        self.features = resolve(features, "features") if isinstance(features, str) else features
        self.content_weight = content_weight
        self.style_weight = style_weight
        self.tv_weight = tv_weight
        self.start = start
        self.num_coordinates = 3 * size * size

        found = self._network()
        self.content_layers = list(found.content_layers if content_layers is None else content_layers)
        self.style_layers = list(found.style_layers if style_layers is None else style_layers)
        self._outputs = LayerOutputs(found.network, self.content_layers, self.style_layers)
        self._style_pictures = [square(picture, size) for picture in read_pictures(styles, "styles")]
        self._parts = split_pictures(contents, "contents")
        self._split = "train"
        self.data_source = self._describe_data()
        self._of_split = {"train": self}
        self._sizes = self._outputs.sizes([square(p, size) for p in self._parts["train"][:SIZED_ON]])

    @property
    def tensors(self) -> tuple[ParameterInfo, ...]:
        """The picture, one tensor."""
        return (ParameterInfo("picture", (3, self.size, self.size)),)

    def config(self) -> dict[str, Any]:
        """Returns the constructor's arguments; of a tensor, which is none of the plain values, its shape."""
        return {name: _plain(value) for name, value in super().config().items()}

    def on_split(self, split: str) -> StyleTransfer:
        """Returns the task on the contents of one part, "train", "validation" or "test"; by itself: train."""
        check_choice(PARTS, split=split)
        if split not in self._of_split:
            other = copy.copy(self)
            other._split = split
            self._of_split[split] = other
        return self._of_split[split]

    def _describe_data(self) -> str:
        """Says how many contents there are, with a digest of all that the loss is made of, networks too."""
        parts = [self._parts[split] for split in PARTS]
        digest = hashlib.sha256()
        network = self._outputs.network.state_dict().values()
        for value in itertools.chain(*parts, self._style_pictures, network):
            digest.update(value.contiguous().numpy().tobytes())
        ours = isinstance(self.contents, str) and self.contents == PHOTOGRAPHS
        name = "scikit-learn's photographs" if ours else "contents"
        counts = " + ".join(str(len(pictures)) for pictures in parts)
        return f"{name}, {counts} pictures ({digest.hexdigest()[:12]})"

    def _network(self) -> FeatureNetwork:
        if self.features is None:
            return small_network() if self.weights is None else vgg_network(self.weights)
        if self.weights is not None:
            raise ValueError("weights are VGG's, and features take its place: give one or the other")
        network = self.features
        if not isinstance(network, nn.Module):
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(0)
                network = network()
        if not isinstance(network, nn.Module):
            raise TypeError(f"features must be or build an nn.Module, got {type(network).__name__}")
        return FeatureNetwork(network, (), ())

    def init(self, generator: torch.Generator) -> Tensor:
        """Draws θ0, [N]; a content is the one that `instance` draws next, so that nothing is drawn for it."""
        if self.start == "noise":
            return torch.rand(self.num_coordinates, generator=generator)
        return self.draw(torch.Generator().set_state(generator.get_state()))[0].flatten()

    def instance(self, generator: torch.Generator) -> Batch:
        """Draws a content and a style; returns the features of the one and the Gram matrices of the other."""
        content, style = self.draw(generator)
        with torch.no_grad():
            of_content, of_style = self._outputs(content), self._outputs(style)
        return {
            "content": [of_content[name] for name in self.content_layers],
            "style": [gram_matrix(of_style[name]) for name in self.style_layers],
        }

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draws what `instance` does, as pictures: a content and a style, [3, size, size] each."""
        contents, styles = self._parts[self._split], self._style_pictures
        content = contents[int(torch.randint(len(contents), (), generator=generator))]
        style = styles[int(torch.randint(len(styles), (), generator=generator))]
        share, top, left = torch.rand(3, generator=generator).tolist()
        share = self.least_share + (1 - self.least_share) * share
        return square(content, self.size, share, (top, left)), style

    def loss(self, theta: Tensor, batch: Batch) -> Tensor:
        """Computes f(θ) of a picture θ [N], from the content's features and the style's Gram matrices."""
        picture = theta.view(3, self.size, self.size)
        features, sizes = self._outputs(picture), self._sizes
        content = torch.stack(
            [
                F.mse_loss(features[name], target) / sizes[name] ** 2
                for name, target in zip(self.content_layers, batch["content"], strict=True)
            ]
        )
        style = torch.stack(
            [
                F.mse_loss(gram_matrix(features[name]), target) / (4 * sizes[name] ** 4)
                for name, target in zip(self.style_layers, batch["style"], strict=True)
            ]
        )
        variation = picture.diff(dim=1).square().mean() + picture.diff(dim=2).square().mean()
        total = self.content_weight * content.mean() + self.style_weight * style.mean()
        return (self.size / 64) ** 2 * (total + self.tv_weight * variation)


def gram_matrix(features: Tensor) -> Tensor:
    """Returns F Fᵀ / M, [C, C], of features [C, h, w] as F [C, M].

    Example:
        >>> gram_matrix(torch.tensor([[[1.0, 3.0]], [[2.0, 0.0]]]))
        tensor([[5., 1.],
                [1., 2.]])
    """
    flat = features.flatten(1)
    return flat @ flat.T / flat.shape[1]


def _plain(value: Any) -> Any:
    """A tensor among an argument's values as words, a path as a string."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value
