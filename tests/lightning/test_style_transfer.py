"""Neural art: the objective against one written by hand, pictures of any kind, and networks of any kind."""

import json
import re

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from l2l_lightning.class_paths import class_config, from_class_config
from l2l_lightning.errors import DataCorruptedError, DataNotFoundError, WeightsError
from l2l_lightning.rollout.optimizees import Optimizees, derive_generator
from l2l_lightning.tasks import StyleTransfer, Task
from l2l_lightning.tasks.style import networks
from l2l_lightning.tasks.style.feature_training import train_features
from l2l_lightning.tasks.style.networks import small_network, vgg_network
from l2l_lightning.tasks.style.pictures import photographs, square
from l2l_lightning.tasks.style.textures import TEXTURES
from l2l_lightning.training.meta_learner import MetaLearner

PICTURES = torch.rand(7, 3, 20, 24, generator=torch.Generator().manual_seed(0))


def make(stream="test", count=2, dtype=torch.float64, **arguments):
    task = StyleTransfer(**{"contents": PICTURES, "styles": PICTURES[:2], "size": 16, **arguments})
    return Optimizees(task, None, 0, stream, range(count), dtype=dtype)


def drawn(optimizees, index, stream="test"):
    """What an optimizee is about, as pictures in float64: its content and its style."""
    generator = derive_generator(0, stream, index)
    optimizees.task.init(generator)
    return [picture.double() for picture in optimizees.task.draw(generator)]


def features_by_hand(pictures, weights):
    """The small network's activations in float64, of pictures [M, 3, H, W]."""
    x, found = (pictures - 0.5) / 0.25, []
    for number in range(1, 5):
        x = F.conv2d(x, weights[f"conv{number}.weight"], weights[f"conv{number}.bias"], padding=1)
        x = x * torch.sigmoid(x)
        found.append(x)
        if number in (1, 3):
            x = F.avg_pool2d(x, 2)
    return found


def loss_by_hand(picture, content, style, sizes, alpha, beta, gamma):
    weights = {name: value.double() for name, value in small_network().network.state_dict().items()}
    ours, contents, styles = (
        [f[0] / size for f, size in zip(features_by_hand(p[None], weights), sizes, strict=True)]
        for p in (picture, content, style)
    )
    total = alpha * F.mse_loss(ours[3], contents[3])
    for f, s in zip(ours, styles, strict=True):
        channels, height, width = f.shape
        # Equations 4 and 5 of Gatys et al., for Gram matrices that are sums.
        gram, target = (torch.einsum("ihw,jhw->ij", x, x) for x in (f, s))
        total = total + beta / 4 * ((gram - target) ** 2).sum() / (2 * channels * height * width) ** 2
    rows, columns = picture[:, 1:] - picture[:, :-1], picture[:, :, 1:] - picture[:, :, :-1]
    return total + gamma * ((rows**2).mean() + (columns**2).mean())


def test_the_loss_and_its_gradient_are_those_written_by_hand():
    """In float64, from nothing but the pictures and the network's weights."""
    weighted = {"content_weight": 2.0, "style_weight": 3.0, "tv_weight": 0.7, "size": 8}
    optimizees = make(**weighted)
    losses, grads = optimizees.losses_and_grads()
    weights = {name: value.double() for name, value in small_network().network.state_dict().items()}
    parts = [optimizees.task.on_split(part) for part in ("train", "validation", "test")]
    training = torch.stack([square(picture, 8) for picture in parts[0]._parts["train"]]).double()
    sizes = [f.square().mean().sqrt() for f in features_by_hand(training, weights)]
    for k in range(2):
        picture = optimizees.theta[k].view(3, 8, 8).requires_grad_()
        expected = (8 / 64) ** 2 * loss_by_hand(picture, *drawn(optimizees, k), sizes, 2.0, 3.0, 0.7)
        (gradient,) = torch.autograd.grad(expected, picture)
        # The sizes and the targets were computed in float32.
        torch.testing.assert_close(losses[k], expected.detach(), rtol=1e-5, atol=0)
        torch.testing.assert_close(
            grads[k], gradient.flatten(), rtol=0, atol=1e-5 * float(gradient.abs().max())
        )


def test_a_picture_that_is_the_content_and_the_style_has_no_loss_but_its_variation():
    one = PICTURES[:1, :, :16, :16].expand(6, 3, 16, 16)
    optimizees = make(contents=one, styles=one[0], start="content", tv_weight=0.0)
    losses, grads = optimizees.losses_and_grads()
    torch.testing.assert_close(optimizees.theta[0].view(3, 16, 16).float(), one[0], rtol=0, atol=1e-6)
    assert losses.abs().max() < 1e-9
    assert grads.abs().max() < 1e-6
    uniform = make(tv_weight=1.0, content_weight=0.0, style_weight=0.0)
    uniform.theta.fill_(0.3)
    assert torch.equal(uniform.losses_and_grads()[0], torch.zeros(2, dtype=torch.float64))


def test_no_two_parts_share_a_content():
    """Pictures of one colour each say which is which, by the first stream that draws them."""
    colours = torch.linspace(0, 1, 12)[:, None, None, None].expand(12, 3, 9, 9).contiguous()
    seen = {}
    for stream in ("train", "validation", "tuning", "test"):
        optimizees = make(stream, 30, torch.float32, contents=colours, size=8, start="content")
        seen[stream] = {round(11 * float(theta.mean())) for theta in optimizees.theta}
    assert seen["tuning"] <= seen["validation"]
    assert [len(seen[part]) for part in ("train", "validation", "test")] == [8, 2, 2]
    assert len(seen["train"] | seen["validation"] | seen["test"]) == 12


def test_a_content_is_the_same_at_twice_the_size_and_theta_may_begin_with_it():
    small, large = (make(contents="photographs", size=s, least_share=0.5, start="content") for s in (16, 32))
    for k in range(2):
        content, of_twice = drawn(small, k)[0], drawn(large, k)[0]
        assert (F.avg_pool2d(of_twice, 2) - content).abs().mean() < 0.03
        torch.testing.assert_close(small.theta[k].view(3, 16, 16), content)
    assert (drawn(small, 0)[0] - drawn(small, 1)[0]).abs().mean() > 0.03


def test_the_gradient_in_a_pixel_has_one_size_at_every_resolution():
    sizes = [
        make(contents="photographs", styles="dots", size=s).losses_and_grads()[1].abs().mean()
        for s in (32, 64)
    ]
    assert 0.6 < sizes[1] / sizes[0] < 1.6


def test_pictures_come_from_files_folders_and_tensors(tmp_path):
    pixels = (255 * PICTURES).round().byte()
    for index, picture in enumerate(pixels):
        Image.fromarray(picture.movedim(0, -1).numpy()).save(tmp_path / f"{index}.png")
    Image.new("L", (20, 20), 51).save(tmp_path / "grey.bmp")
    (tmp_path / "notes.txt").write_text("no picture")
    folder = make(contents=str(tmp_path), styles=str(tmp_path / "grey.bmp"))
    assert folder.task.draw(torch.Generator())[1].flatten().tolist() == pytest.approx([0.2] * 3 * 16 * 16)
    listed = make(
        contents=[*sorted(tmp_path.glob("*.png")), tmp_path / "grey.bmp"], styles=folder.task.styles
    )
    tensors = [*(pixels / 255), torch.full((3, 20, 20), 0.2)]
    given = make(contents=tensors, styles=torch.full((3, 20, 20), 0.2))
    for other in (listed, given):
        torch.testing.assert_close(other.losses_and_grads(), folder.losses_and_grads(), rtol=1e-4, atol=1e-6)
    parts = make(contents={"train": PICTURES, "validation": "swirls", "test": ["dots", PICTURES[0]]})
    assert len(parts.task._parts["test"]) == 2
    assert folder.task.data_source.startswith("contents, 6 + 1 + 1 pictures (")
    assert folder.task.data_source == listed.task.data_source != given.task.data_source
    rebuilt = from_class_config(json.loads(json.dumps(class_config(folder.task))), Task)
    assert rebuilt.data_source == folder.task.data_source
    with pytest.raises(DataNotFoundError, match=r"a tensor \[7, 3, 20, 24\].*no such file"):
        from_class_config(class_config(make(styles="dots").task), Task)


class Branches(nn.Module):
    """A network of one's own, in which an activation works in place and a layer is never called."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=True)
        self.idle = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.act(self.norm(self.stem(x))).mean((-2, -1)))


OWN = {"features": Branches, "content_layers": ["act"], "style_layers": ["stem", "norm"]}


def test_any_network_serves_in_eval_mode_and_is_left_as_it_is():
    network = Branches()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    own = OWN | {"features": network}
    losses, grads = make(**own).losses_and_grads()
    assert network.training
    assert network.act.inplace
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in network.parameters())
    outputs = make(**own).task._outputs(PICTURES[0])
    stem = network.stem(PICTURES[:1])[0]
    torch.testing.assert_close(outputs["stem"], stem)
    torch.testing.assert_close(outputs["act"], (stem / (1 + 1e-5) ** 0.5).relu())
    alone = make(count=1, **own).losses_and_grads()
    torch.testing.assert_close([x[0] for x in alone], [losses[0], grads[0]])
    # One that a function builds is the same every time.
    torch.testing.assert_close(make(**OWN).losses_and_grads(), make(**OWN).losses_and_grads(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"contents": PICTURES[:5]}, ValueError, r"contents holds 5 pictures, and three parts need 6"),
        ({"contents": PICTURES[:, :1]}, ValueError, r"contents must be \[M, 3, H, W\].*expand\(-1, 3"),
        ({"contents": PICTURES[0, 0]}, ValueError, r"contents must be \[M, 3, H, W\]"),
        ({"contents": 255 * PICTURES}, ValueError, r"contents must be in \[0, 1\], got values from"),
        (
            {"contents": PICTURES * torch.nan},
            ValueError,
            r"contents must be in \[0, 1\], got values from nan",
        ),
        ({"styles": PICTURES.byte()}, ValueError, r"styles must be floating-point.*divide by 255"),
        (
            {"contents": {"train": PICTURES}},
            ValueError,
            r"contents must name train, validation, test, got train",
        ),
        ({"contents": 3}, TypeError, r"contents must be a tensor \[M, 3, H, W\], a path or a list"),
        ({"styles": []}, ValueError, r"styles must hold at least one picture"),
        (
            {"styles": "swirl"},
            DataNotFoundError,
            r"styles='swirl'.*no generated picture.*\(swirls, mosaic, dots\)",
        ),
        ({"size": 1}, ValueError, r"size must be at least 2"),
        ({"size": 3}, ValueError, r"features cannot be computed of a picture of size 3×3.*too small"),
        ({"least_share": 1.5}, ValueError, r"least_share must be at most 1"),
        ({"tv_weight": -1.0}, ValueError, r"tv_weight must be at least 0"),
        ({"start": "blank"}, ValueError, r"start must be one of noise, content"),
        ({"style_layers": ["act9"]}, ValueError, r"style_layers: there is no layer 'act9', only .*act4"),
        ({"content_layers": []}, ValueError, r"content_layers must name layers.*choose from"),
        ({"features": Branches}, ValueError, r"content_layers must name layers.*choose from stem, norm"),
        (OWN | {"content_layers": ["idle"]}, ValueError, r"the network does not call its layer 'idle'"),
        (
            OWN | {"content_layers": ["head"]},
            ValueError,
            r"the layer 'head' gives no features \[1, C, h, w\]",
        ),
        (OWN | {"weights": "vgg.pth"}, ValueError, r"give one or the other"),
        ({"features": dict}, TypeError, r"features must be or build an nn.Module, got dict"),
        ({"features": "no.such"}, ValueError, r"features='no.such' cannot be imported"),
        ({"weights": "no-such.pth"}, WeightsError, r"weights='no-such.pth': there is no such file"),
    ],
)
def test_what_is_wrong_is_said(arguments, error, message):
    with pytest.raises(error, match=message) as caught:
        make(**arguments)
    assert "\n" not in str(caught.value)


def test_damaged_files_are_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG and then nothing")
    with pytest.raises(DataCorruptedError, match=r"a.png cannot be read as a picture"):
        make(styles=tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataNotFoundError, match=r"no pictures \(.*\) in the folder"):
        make(styles=tmp_path / "empty")
    Image.new("I;16", (20, 20)).save(tmp_path / "deep.png")
    with pytest.raises(DataCorruptedError, match="more than 8 bits a channel"):
        make(styles=tmp_path / "deep.png")


def tiny_vgg(layout, monkeypatch):
    """torchvision's layers with 4 channels for 64: as named, and quickly made."""
    from torchvision.models import vgg

    slim = {key: [c if c == "M" else max(c // 16, 1) for c in vgg.cfgs[key]] for key in "DE"}
    monkeypatch.setattr(vgg, "cfgs", slim)
    return vgg.make_layers(slim[layout])


@pytest.mark.parametrize(("layout", "depth"), [("D", 3), ("E", 4)])
def test_vggs_weights_come_from_a_file_and_are_its_layers(layout, depth, tmp_path, monkeypatch):
    convolutions = tiny_vgg(layout, monkeypatch)
    state = {f"features.{name}": value for name, value in convolutions.state_dict().items()}
    state["classifier.0.weight"] = torch.zeros(2, 2)
    torch.save(state, tmp_path / "vgg.pth")
    save_file(state, tmp_path / "vgg.safetensors")
    found = vgg_network(str(tmp_path / "vgg.pth"))
    assert list(found.network._modules)[-2:] == [f"relu5_{depth}", "pool5"]
    assert found.style_layers == ("conv1_1", "conv2_1", "conv3_1", "conv4_1", "conv5_1")
    picture = PICTURES[:1]
    mean, deviation = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    expected = convolutions[:5]((picture - mean) / deviation)
    ours = found.network[:6](picture)
    assert ours.shape == expected.shape
    assert not torch.allclose(ours, expected)  # the mean of four pixels in place of the largest
    torch.testing.assert_close(found.network[:5](picture), convolutions[:4]((picture - mean) / deviation))
    both = [make(weights=str(tmp_path / f"vgg.{kind}"), size=32) for kind in ("pth", "safetensors")]
    torch.testing.assert_close(*(optimizees.losses_and_grads() for optimizees in both), rtol=0, atol=0)


def test_weights_that_are_no_vggs_are_refused_and_nothing_in_them_is_executed(tmp_path, monkeypatch):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"features.0.weight": Trap()}, tmp_path / "trap.pth")
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    torch.save([1], tmp_path / "list.pth")
    torch.save({f"features.{i}.weight": torch.zeros(1) for i in range(26)}, tmp_path / "shapes.pth")
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "text.safetensors").write_text("no weights")
    for name, message in {
        "trap.pth": "cannot be read as a state dict",
        "other.pth": "is no state dict of torchvision's vgg16 or vgg19: it has 1 tensors",
        "list.pth": "it is no dict of tensors",
        "shapes.pth": "is no state dict of torchvision's vgg16 or vgg19: Error",
        "text.pth": "cannot be read as a state dict",
        "text.safetensors": "cannot be read as a state dict",
    }.items():
        with pytest.raises(WeightsError, match=re.escape(message)) as caught:
            vgg_network(str(tmp_path / name))
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()

    def offline(*_, **options):
        assert options["weights_only"]
        raise OSError("<urlopen error no network>")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(
        WeightsError, match="IMAGENET1K_V1' could not be downloaded: <urlopen error no network>"
    ):
        vgg_network(networks.DOWNLOADED)


def test_fit_meta_trains_a_rule_on_it(tiny_fit, tmp_path):
    for index, picture in enumerate((255 * PICTURES).byte()):
        Image.fromarray(picture.movedim(0, -1).numpy()).save(tmp_path / f"{index}.png")
    named = {"contents": tmp_path, "styles": "dots", "size": "8", "start": "content"}
    options = [f"--model.task.{name}={value}" for name, value in named.items()]
    folder = tiny_fit("--config=mnist", "--model.task=l2l_lightning.tasks.StyleTransfer", *options)
    summary = json.loads((folder / "summary.json").read_text())
    assert f"StyleTransfer(contents={tmp_path}, styles=dots, size=8" in summary["task"]
    learner = MetaLearner.from_checkpoint(next(folder.rglob("last.ckpt")))
    assert isinstance(learner.task, StyleTransfer)
    assert learner.task.start == "content"


def test_generated_styles_are_colours_and_always_the_same():
    for make_texture in TEXTURES.values():
        picture = make_texture()
        assert (picture.shape, picture.dtype) == ((3, 256, 256), torch.float32)
        assert 0 <= picture.min() <= picture.max() <= 1
        assert picture.std() > 0.15
        torch.rand(1)
        assert torch.equal(make_texture(), picture)


def test_the_recipe_of_the_small_network_learns_and_repeats():
    said = []
    first = train_features(steps=12, batch_size=8, progress=said.append)
    again = train_features(steps=12, batch_size=8)
    torch.testing.assert_close(first.state_dict(), again.state_dict(), rtol=0, atol=0)
    assert first.state_dict().keys() == small_network().network.state_dict().keys()
    assert said[0].startswith("step 0 of 12: loss 3.4")  # ln 32 = 3.47: nothing is known at first


def test_photographs_are_three_parts_of_which_the_test_is_one_by_itself():
    parts = photographs()
    assert {name: [list(p.shape) for p in pictures] for name, pictures in parts.items()} == {
        "train": [[3, 427, 427]],
        "validation": [[3, 427, 213]],
        "test": [[3, 427, 640]],
    }
    assert {p.dtype for pictures in parts.values() for p in pictures} == {torch.uint8}
