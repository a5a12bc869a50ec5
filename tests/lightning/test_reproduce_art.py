"""`reproduce art`: panels, pictures and lines of a tiny run; the committed figures are the rule's."""

import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from l2l_lightning import pretrained
from l2l_lightning.comparison.baselines import BASELINES, run_baseline
from l2l_lightning.comparison.plots import png
from l2l_lightning.comparison.statistics import final_losses
from l2l_lightning.reproduce import art, art_tasks, curves
from l2l_lightning.reproduce.art_pictures import Strip, pictures_figure, styled
from l2l_lightning.reproduce.command import reproduce
from l2l_lightning.reproduce.recipes import RECIPES
from l2l_lightning.reproduce.result_store import Request, ResultStore
from l2l_lightning.reproduce.settings import Settings, parse
from l2l_lightning.rollout.optimizees import Optimizees
from l2l_lightning.rollout.rollout import run_rule
from l2l_lightning.tasks import Quadratic, StyleTransfer
from l2l_lightning.tasks.style_transfer import gram_matrix

COMMITTED = Path(__file__).parents[2] / "benchmarks/results/reproduction/art/results.json"


@pytest.fixture
def tiny(monkeypatch):
    """Pictures of 8×8 and 16×16, one baseline, and no drawing of curves, which other tests look at."""
    for module in (art, art_tasks):
        monkeypatch.setattr(module, "SIZE", 8)
    monkeypatch.setattr(art, "BASELINES", ("adam",))
    monkeypatch.setattr(curves, "curves_picture", lambda *_: b"")


@pytest.fixture
def folder(tmp_path):
    """Six pictures of one colour each."""
    for index in range(6):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        Image.new("RGB", (20, 18), (40 * index, 90, 200)).save(tmp_path / f"pictures/{index}.png")
    return tmp_path / "pictures"


def test_a_tiny_run_on_ones_own_pictures_leaves_curves_pictures_and_lines(tiny, folder, tmp_path):
    settings = Settings(
        out=str(tmp_path / "out"),
        quick=True,
        from_pretrained=True,
        num_tuning_optimizees=1,
        contents=str(folder),
        style=str(folder / "1.png"),
        new_style="dots",
    )
    report = reproduce(["art"], settings).read_text()
    document = json.loads((tmp_path / "out/art/results.json").read_text())
    assert document["data"][0].startswith("contents, 4 + 1 + 1 pictures (")
    assert list(document["results"]) == ["style_8", "new_styles_8", "style_16", "new_styles_16"]
    for panel in document["results"].values():
        assert list(panel["optimizers"]) == ["learned", "zero-shot", "adam"]
        assert panel["optimizers"]["learned"]["rule"] == "lstm-art"
    at = [document["results"][f"style_{size}"]["optimizers"]["adam"]["learning_rate"] for size in (8, 16)]
    assert at[0] == at[1]  # tuned once, at the size that is trained at
    assert "pictures.png" in document["pictures"]
    assert report.count("| art | ") == 4
    # The paper has no figure of a new style at 64×64, nor of its own at 128×128.
    of_the_papers = [not finding["verdict"].startswith("New: ") for finding in document["findings"]]
    assert of_the_papers == [True, False, False, True]
    assert "zero-shot" in report
    with pytest.raises(Exception, match=r"contents .*, not .*: name another folder with --out"):
        reproduce(
            ["art"], Settings(out=settings.out, quick=True, from_pretrained=True, num_tuning_optimizees=1)
        )


def test_panels_are_the_papers(tmp_path):
    """One style at 64×64 to train on; then new ones, and both at twice the size, with settings of 64×64."""
    store = ResultStore(Settings(out=str(tmp_path)))
    requests = art.ART.requests(store)
    tasks = {panel: request.task for (panel, _), request in requests.items()}
    assert {panel: (task.size, task.styles) for panel, task in tasks.items()} == {
        "style_64": (64, "swirls"),
        "new_styles_64": (64, ["mosaic", "dots"]),
        "style_128": (128, "swirls"),
        "new_styles_128": (128, ["mosaic", "dots"]),
    }
    assert {request.horizon for request in requests.values()} == {128}
    assert all(request.tuned_on.size == 64 for request in requests.values())
    assert all(request.tuned_on.styles == request.task.styles for request in requests.values())
    trained_on = RECIPES["lstm-art"].task(store.settings)
    assert trained_on.describe() == tasks["style_64"].describe()
    # The shipped rule is of the paper's training: windows of 32 of 128 steps, from no other rule.
    model = RECIPES["lstm-art"].options["model"]
    assert (model["horizon"], model["unroll"], RECIPES["lstm-art"].start) == (128, 32, None)


def test_a_rule_is_trained_on_what_the_settings_name(folder, tmp_path):
    names, settings = parse(["art", f"--contents={folder}", "--style=dots", f"--out={tmp_path}"])
    assert names == ["art"]
    task = RECIPES["lstm-art"].task(settings)
    assert (task.contents, task.styles, task.least_share) == (str(folder), "dots", 1.0)
    ours, other = (ResultStore(s).rule_folder("lstm-art") for s in (settings, Settings(out=str(tmp_path))))
    assert ours != other


def test_a_baseline_may_be_tuned_on_another_task(tmp_path, monkeypatch):
    store, searched = ResultStore(Settings(out=str(tmp_path), quick=True, num_tuning_optimizees=1)), []
    original = ResultStore.tuned

    def tuned(self, task, horizons, names):
        searched.append((task, names))
        return original(self, task, horizons, names)

    monkeypatch.setattr(ResultStore, "tuned", tuned)
    small, large = Quadratic(dim=2), Quadratic(dim=5)
    request = Request(large, "sgd", 3, 2, tuned_on=small)
    rate = store.baseline(request).learning_rate
    assert searched == [(small, ["sgd"])]
    expected = run_baseline(BASELINES["sgd"], rate, Optimizees(large, None, 0, "test", range(2)), 3)
    assert torch.equal(store.losses(request), expected)


def test_a_strip_shows_what_the_first_test_optimizee_became(tmp_path):
    store = ResultStore(Settings(out=str(tmp_path)))
    task = StyleTransfer(styles=["dots", "swirls"], size=8)
    request = Request(task, "adam", 3, 2, tuning="default")
    content, style, results = styled(store, {"adam": request})
    optimizees = Optimizees(task, None, 0, "test", [0])
    targets, outputs = optimizees.next_batches(), optimizees.task._outputs
    torch.testing.assert_close(targets["content"][0][0], outputs(content)["act4"])
    for name, gram in zip(task.style_layers, targets["style"], strict=True):
        torch.testing.assert_close(gram[0], gram_matrix(outputs(style)[name]))
    run_baseline(BASELINES["adam"], 0.001, optimizees, 3)
    assert torch.equal(results["adam"].flatten(), optimizees.theta[0])


def test_pictures_are_shown_as_they_are():
    """Colours beyond [0, 1] are the nearest within; the first column is the first picture."""
    red = torch.tensor([2.0, -1.0, 0.0])[:, None, None].expand(3, 4, 4)
    content = png(pictures_figure([Strip("one", {"content": red, "style": 0 * red})]), dpi=50)
    image = Image.open(io.BytesIO(content)).convert("RGB")
    colours = {colour for _, colour in image.getcolors(100_000)}
    assert {(255, 0, 0), (0, 0, 0)} <= colours


@pytest.mark.slow
@pytest.mark.parametrize("name", ["learned", "adam"])
def test_the_committed_losses_are_the_optimizers(name, tmp_path):
    """On the style that was trained on at 64×64.

    A change of θ0 by 10⁻⁶ of itself changes the mean sum by 0.06% and the mean final loss by 0.3%.
    """
    document = json.loads(COMMITTED.read_text(encoding="utf-8"))
    assert (document["seed"], document["quick"], document["num_tuning_optimizees"]) == (0, False, 2)
    panel = document["results"]["style_64"]
    said = panel["optimizers"][name]
    store = ResultStore(Settings(out=str(tmp_path), from_pretrained=True))
    request = art.ART.requests(store)["style_64", name]
    assert (panel["task"], panel["horizon"]) == (request.task.describe(), request.horizon)
    assert said["num_optimizees"] == request.num_optimizees
    optimizees = Optimizees(request.task, None, 0, "test", range(request.num_optimizees))
    if name == "learned":
        losses = run_rule(pretrained.load(said["rule"]), optimizees, panel["horizon"])
    else:
        adam = BASELINES[name]
        rate, setting = said["learning_rate"], said["setting"]
        losses = run_baseline(adam, rate, optimizees, panel["horizon"], setting=setting)
    assert losses.sum(0).mean().item() == pytest.approx(said["sum_loss"]["mean"], rel=5e-3)
    assert final_losses(losses).mean().item() == pytest.approx(said["final_loss"]["mean"], rel=2e-2)
