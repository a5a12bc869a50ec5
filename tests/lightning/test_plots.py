import io
import itertools
import random
import re

import matplotlib.colors
import matplotlib.image
import matplotlib.pyplot as plt
import numpy as np
import pytest
from colour_vision import DEFICIENCIES, contrast, distance
from matplotlib import colormaps

from l2l_lightning.comparison.baselines import BASELINES
from l2l_lightning.comparison.colours import (
    COLOURS,
    HIGHLIGHT,
    OTHER_COLOURS,
    OTHER_STYLES,
    OWN_STYLES,
    line_styles,
)
from l2l_lightning.comparison.figures import FORMATS
from l2l_lightning.comparison.plots import Curve, curves_figure, heatmap_figure, image_bytes, png


def curve(label="adam", mean=None, **settings):
    mean = np.geomspace(2.0, 0.3, 50) if mean is None else np.asarray(mean, dtype=np.float64)
    settings = {"final": float(mean[-1])} | settings
    return Curve(label, mean, 0.9 * mean, 1.1 * mean, **settings)


def draw(*curves, **settings):
    return curves_figure(curves, "Quadratic", "final loss", **settings).axes[0]


def has_colour(pixels, colour):
    return bool((np.abs(pixels - matplotlib.colors.to_rgb(colour)).max(axis=-1) < 0.01).any())


def test_draws_every_curve_in_its_colour_and_sorts_the_legend():
    axes = draw(
        curve("sgd 0.2", name="sgd", final=0.2),
        curve("lost", np.ones(50), final=float("nan")),
        curve("learned", np.geomspace(2, 0.1, 50), final=0.1, highlight=True),
    )
    pixels = matplotlib.image.imread(io.BytesIO(png(axes.figure)))[..., :3]
    assert pixels.shape[0] > 600
    assert pixels.shape[1] > 1000
    lost = line_styles(["lost"])["lost"].colour
    for colour in (HIGHLIGHT, OWN_STYLES["sgd"].colour, lost):
        assert has_colour(pixels, colour)
    assert not has_colour(pixels, OWN_STYLES["adam"].colour)
    sgd, _, highlighted = axes.lines
    assert highlighted.get_linewidth() > sgd.get_linewidth()
    assert highlighted.get_zorder() > sgd.get_zorder()
    assert len(axes.collections) == 3
    texts = axes.get_legend().get_texts()
    assert [text.get_text() for text in texts] == ["learned", "sgd 0.2", "lost"]
    assert [text.get_fontweight() for text in texts] == ["bold", "normal", "normal"]
    colours = [line.get_color() for line in axes.get_legend().get_lines()]
    assert colours == [HIGHLIGHT, OWN_STYLES["sgd"].colour, lost]
    assert plt.get_fignums() == []  # none is left in pyplot


def test_an_optimizer_looks_the_same_in_every_figure_and_order():
    names = ["learned", *BASELINES]
    assert set(names) == set(OWN_STYLES)
    assert len({style.colour for style in OWN_STYLES.values()}) == len(names)
    others = ["lion", "my rule", "θ-rule", "adam (default)"]
    shuffled = random.Random(0).sample([*names, *others], len(names) + len(others))
    assert line_styles(shuffled) == line_styles([*names, *others])
    for name in [*names, *others]:
        alone = line_styles([name])[name]
        assert line_styles([name, *names])[name] == alone
    (line,) = draw(curve("a label", name="lion")).lines
    assert (line.get_color(), line.get_linestyle()) == line_styles(["lion"])["lion"]


def test_names_of_others_get_colours_that_no_curve_beside_them_has():
    names = [f"rule {number}" for number in range(27)]
    for count in (2, 9, 27):
        styles = line_styles([*OWN_STYLES, *names[:count]])
        assert len(set(styles.values())) == len(OWN_STYLES) + count
        assert not {styles[name].colour for name in names[:count]} & {HIGHLIGHT, *COLOURS}
    assert len({line_styles(names[:9])[name].colour for name in names[:9]}) == 9
    assert set(line_styles([*names, "one more"]).values()) == set(OTHER_STYLES)


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
@pytest.mark.parametrize("palette", [(HIGHLIGHT, *COLOURS), OTHER_COLOURS], ids=["own", "others"])
def test_readers_with_any_colour_vision_can_tell_curves_apart(palette, deficiency):
    colours = [matplotlib.colors.to_rgb(colour) for colour in palette]
    assert min(distance(*pair, deficiency) for pair in itertools.combinations(colours, 2)) > 15


def heatmap(values, **options):
    count = len(values[0])
    rows, columns = ([str(i) for i in range(n)] for n in (len(values), count))
    figure = heatmap_figure(values, rows, columns, "Ratios", "ratio", **options)
    figure.draw_without_rendering()
    axes, bar = figure.axes
    (image,) = axes.images
    return axes, bar, image


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_readers_with_any_colour_vision_see_which_side_of_the_middle_a_cell_is_on(deficiency):
    ratios = [1.25, 1.5, 2.0, 3.0, 4.0, 10.0]
    _, _, image = heatmap([ratios, [1 / ratio for ratio in ratios]], middle=1.0)
    colours = image.to_rgba(image.get_array())[..., :3]
    assert min(distance(above, below, deficiency) for above, below in zip(*colours, strict=True)) > 12
    if deficiency == "deuteranopia":  # the measure does tell what these readers cannot see
        red_green = colormaps["RdYlGn"]
        assert distance(red_green(0.4)[:3], red_green(0.6)[:3], deficiency) < 5


@pytest.mark.parametrize("middle", [None, 1.0])
def test_a_cells_text_has_contrast_to_its_colour(middle):
    values = [list(np.geomspace(0.01, 100, 40)), [np.inf, np.nan] * 20]
    axes, _, image = heatmap(values, middle=middle)
    colours = image.to_rgba(image.get_array())[..., :3].reshape(-1, 3)
    assert len(axes.texts) == len(colours) == 80
    for text, colour in zip(axes.texts, colours, strict=True):
        assert contrast(matplotlib.colors.to_rgb(text.get_color()), colour) > 4.5  # WCAG 2's level AA


def test_a_heatmap_has_short_numbers_and_a_scale_of_decimals():
    axes, bar, _ = heatmap([[0.281, 4153.2, 1034648867.0, np.inf]], middle=1.0)
    assert [text.get_text() for text in axes.texts] == ["0.28", "4153", "1.0e9", "∞"]
    labels = [label.get_text() for label in bar.get_yticklabels() if label.get_text()]
    assert {"0.5", "1", "2"} <= set(labels)
    assert all(re.fullmatch(r"[\d.]+", label) for label in labels)


@pytest.mark.parametrize(
    ("mean", "scale"), [([3.0, 2.0, 1.0], "log"), ([1.0, 0.0, -1.0], "linear"), ([1.0, 1.0, 1.0], "log")]
)
def test_log_axis_where_every_mean_is_positive(mean, scale):
    axes = draw(curve(mean=mean))
    assert axes.get_yscale() == scale
    assert draw(curve(mean=mean), scale="linear").get_yscale() == "linear"


def test_limits_follow_the_means_though_bands_reach_zero():
    mean = np.geomspace(1.0, 0.1, 20)
    axes = draw(Curve("wide", mean, mean - 1, mean + 1, final=0.1))
    low, high = axes.get_ylim()
    assert 0.05 < low < 0.1 < 1 < high < 2


@pytest.mark.parametrize("lowest", [1e-6, 0.1, 1.85, 4.0])
def test_a_log_axis_has_enough_labels(lowest):
    axes = draw(curve(mean=np.geomspace(5.0, lowest, 20)))
    axes.figure.draw_without_rendering()
    low, high = axes.get_ylim()
    labels = [
        label.get_text()
        for label in axes.get_yticklabels()
        if label.get_text() and low <= label.get_position()[1] <= high
    ]
    assert 3 <= len(set(labels)) <= 12


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("everywhere", [False, True])
def test_values_that_are_not_finite_are_gaps(bad, everywhere):
    mean = np.geomspace(1.0, 0.1, 20)
    mean[0 if everywhere else 5 :] = bad
    with np.errstate(invalid="ignore"):
        axes = draw(curve(mean=mean), curve("adam"))
    assert np.isfinite(axes.lines[0].get_ydata()).sum() == (0 if everywhere else 5)


@pytest.mark.parametrize("suffix", FORMATS)
def test_the_same_data_give_the_same_file(suffix, monkeypatch):
    files = []
    for time in ("1000000000", "2000000000"):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", time)
        files.append(image_bytes(curves_figure([curve(), curve("lion")], "θ", "final loss"), suffix))
    assert files[0] == files[1]
    assert files[0].lstrip().startswith({"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[suffix])
