import io

import matplotlib.colors
import matplotlib.image
import matplotlib.pyplot as plt
import numpy as np
import pytest

from l2l_lightning.comparison.plots import COLOURS, HIGHLIGHT, Curve, curves_figure, png


def curve(label="adam", mean=None, **settings):
    mean = np.geomspace(2.0, 0.3, 50) if mean is None else np.asarray(mean, dtype=np.float64)
    settings = {"final": float(mean[-1])} | settings
    return Curve(label, mean, 0.9 * mean, 1.1 * mean, **settings)


def draw(*curves):
    figure = curves_figure(curves, "Quadratic", "final loss")
    pixels = matplotlib.image.imread(io.BytesIO(png(figure)))[..., :3]
    return figure.axes[0], pixels


def has_colour(pixels, colour):
    return bool((np.abs(pixels - matplotlib.colors.to_rgb(colour)).max(axis=-1) < 0.01).any())


def test_draws_every_curve_in_its_colour_and_sorts_the_legend():
    axes, pixels = draw(
        curve("b", final=0.2),
        curve("lost", np.ones(50), final=float("nan")),
        curve("a", np.geomspace(2, 0.1, 50), final=0.1, highlight=True),
    )
    assert pixels.shape[0] > 600
    assert pixels.shape[1] > 1000
    for colour in (HIGHLIGHT, *COLOURS[:2]):
        assert has_colour(pixels, colour)
    assert not has_colour(pixels, COLOURS[2])
    b, _, highlighted = axes.lines
    assert highlighted.get_linewidth() > b.get_linewidth()
    assert highlighted.get_zorder() > b.get_zorder()
    assert len(axes.collections) == 3
    texts = axes.get_legend().get_texts()
    assert [text.get_text() for text in texts] == ["a", "b", "lost"]
    assert [text.get_fontweight() for text in texts] == ["bold", "normal", "normal"]
    colours = [line.get_color() for line in axes.get_legend().get_lines()]
    assert colours == [HIGHLIGHT, COLOURS[0], COLOURS[1]]
    assert plt.get_fignums() == []  # none is left in pyplot


def test_more_curves_than_colours_differ_in_style():
    axes, _ = draw(*(curve(str(n)) for n in range(8)))
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == 8


@pytest.mark.parametrize(
    ("mean", "scale"), [([3.0, 2.0, 1.0], "log"), ([1.0, 0.0, -1.0], "linear"), ([1.0, 1.0, 1.0], "log")]
)
def test_log_axis_where_every_mean_is_positive(mean, scale):
    axes, _ = draw(curve(mean=mean))
    assert axes.get_yscale() == scale


def test_limits_follow_the_means_though_bands_reach_zero():
    mean = np.geomspace(1.0, 0.1, 20)
    axes, _ = draw(Curve("wide", mean, mean - 1, mean + 1, final=0.1))
    low, high = axes.get_ylim()
    assert 0.05 < low < 0.1 < 1 < high < 2


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("everywhere", [False, True])
def test_values_that_are_not_finite_are_gaps(bad, everywhere):
    mean = np.geomspace(1.0, 0.1, 20)
    mean[0 if everywhere else 5 :] = bad
    with np.errstate(invalid="ignore"):
        axes, _ = draw(curve(mean=mean), curve("adam"))
    assert np.isfinite(axes.lines[0].get_ydata()).sum() == (0 if everywhere else 5)
