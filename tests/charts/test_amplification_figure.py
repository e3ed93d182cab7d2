"""The figure of amplification shows curves, controls, maps and φ as they are, and gives the same bytes."""

from itertools import pairwise

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.text import Text

from loralens.analysis.base.amplification import Amplification, Top
from loralens.charts.amplification import amplification_figure
from loralens.charts.figure import save
from loralens.errors import OptionError
from loralens.linalg.projection import Estimate


def one(k: int = 3, factor: float = 1.0, *, top: bool = True, weight: float = 10.0, n: int = 40) -> Amplification:
    overlap = np.diag(np.arange(k, 0, -1.0)) / factor
    phi = np.full((k, k + 1), 0.25)
    return Amplification(
        (n, n),
        k,
        np.arange(k, 0, -1.0),
        overlap,
        weight,
        Estimate(weight**4 / 9, 0.0),
        Top(np.arange(k + 1, 0, -1.0), np.zeros(k + 1), phi, 2 * phi, exact=True) if top else None,
        (k,),
    )


def llama(blocks: int = 3, **options: object) -> dict[str, Amplification]:
    return {
        f"model.layers.{b}.self_attn.{kind}": one(factor=(b + 1) * (j + 1), **options)  # type: ignore[arg-type]
        for b in range(blocks)
        for j, kind in enumerate(("q_proj", "v_proj"))
    }


def panels(figure: Figure) -> dict[str, Axes]:
    return {axes.get_title(): axes for axes in figure.axes if axes.get_title()}


def words(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def mesh(axes: Axes) -> np.ma.MaskedArray:
    return next(c for c in axes.collections if isinstance(c, QuadMesh)).get_array()


def test_a_line_for_each_module_over_the_random_control():
    found = llama()
    axes = panels(amplification_figure(found, title="mine"))["v_proj"]
    chance, *lines = axes.lines
    assert chance.get_linestyle() == "--"
    rows = [found[f"model.layers.{b}.self_attn.v_proj"].curve for b in range(3)]
    np.testing.assert_allclose(chance.get_ydata(), [row.delta_norm / row.random_norm for row in rows[0]])
    for line, curve in zip(lines, rows, strict=True):
        np.testing.assert_allclose(line.get_xdata(), [1, 2, 3])
        np.testing.assert_allclose(line.get_ydata(), [row.amplification for row in curve])
    assert len({tuple(line.get_color()) for line in lines}) == 3
    assert axes.get_yscale() == "log"


def test_the_maps_hold_excess_and_z_of_every_block_and_kind():
    found = llama()
    del found["model.layers.1.self_attn.v_proj"]
    found["model.layers.0.self_attn.q_proj"] = one(0)
    shown = panels(amplification_figure(found))
    excess, z = (
        mesh(shown[title])
        for title in ("excess over random directions (1: chance)", "standard deviations from chance (0: chance)")
    )
    assert excess.shape == z.shape == (2, 3)
    assert (
        np.argwhere(np.ma.getmaskarray(excess)).tolist()
        == np.argwhere(np.ma.getmaskarray(z)).tolist()
        == [[0, 0], [1, 1]]
    )
    last = found["model.layers.2.self_attn.v_proj"].kept(3)
    assert excess[1, 2] == pytest.approx(np.log2(last.excess))
    assert z[1, 2] == pytest.approx(last.z)


def test_several_modules_of_a_cell_are_their_median():
    found = {f"blocks.0.experts.w[{i}]": one(factor=i + 1.0) for i in range(3)}
    figure = amplification_figure(found)
    value = mesh(panels(figure)["excess over random directions (1: chance)"])[0, 0]
    assert value == pytest.approx(np.log2(found["blocks.0.experts.w[1]"].kept(3).excess))
    assert any("median of its modules" in text for text in words(figure))


def test_phi_on_both_sides_with_chance():
    figure = amplification_figure(llama(), phi_rank=2)
    titles = [title for title in panels(figure) if title.startswith("φ")]
    assert titles == [
        "φ(i, j) on the out side: mean 0.25 at the corner, chance 0.05",
        "φ(i, j) on the in side: mean 0.5 at the corner, chance 0.05",
    ]
    for title, value in zip(titles, (0.25, 0.5), strict=True):
        (image,) = panels(figure)[title].images
        np.testing.assert_allclose(image.get_array(), np.full((2, 2), value))
    bar = figure.axes[-1]
    assert [line.get_ydata()[0] for line in bar.lines if line.get_color() == "white"] == [pytest.approx(0.05)]
    assert not [title for title in panels(amplification_figure(llama(top=False))) if title.startswith("φ")]


def test_what_has_no_value_is_left_out_and_nothing_at_all_is_an_error():
    found = llama() | {"model.layers.3.self_attn.q_proj": one(0), "model.layers.4.self_attn.q_proj": one(weight=0.0)}
    assert len(panels(amplification_figure(found))["q_proj"].lines) == 4
    with pytest.raises(OptionError, match="not 0"):
        amplification_figure({"a": one(0)})


def test_modules_outside_blocks_and_odd_names():
    found = llama() | {"lm_head": one(), "model.layers.0.a $x$ [red]": one(1), "decoder.layers.0.q_proj": one()}
    figure = amplification_figure(found, title="a $b$ " * 60)
    assert "outside" in words(figure)


def test_stacks_with_names_that_are_alike_at_both_ends_stay_apart():
    stacks = ("text_encoder.text_model.encoder.layers", "text_encoder_2.text_model.encoder.layers")
    figure = amplification_figure({f"{stack}.{b}.q_proj": one() for stack in stacks for b in range(2)})
    axes = panels(figure)["excess over random directions (1: chance)"]
    labels = [tick.get_text() for tick in axes.get_xticklabels()]
    assert len(set(labels)) == len(labels) == 4


def test_no_labels_overlap_at_32_blocks_of_seven_kinds():
    kinds = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    found = {f"model.layers.{b}.{kind}": one(8, 1 + b) for b in range(32) for kind in kinds}
    figure = amplification_figure(found)
    figure.draw_without_rendering()
    for axes in figure.axes:
        boxes = [t.get_window_extent() for t in axes.get_xticklabels() if t.get_visible() and t.get_text()]
        assert all(a.x1 < b.x0 for a, b in pairwise(boxes))


def test_the_same_figure_gives_the_same_bytes(tmp_path):
    figure, another = (amplification_figure(llama(), title="mine") for _ in range(2))
    for suffix in (".png", ".svg", ".pdf"):
        once, again, anew = (tmp_path / f"{name}{suffix}" for name in ("once", "again", "anew"))
        save(figure, once)
        save(figure, again)
        save(another, anew)
        assert once.read_bytes() == again.read_bytes() == anew.read_bytes()
