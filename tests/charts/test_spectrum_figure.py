"""The figure of spectra shows what it was given, says in words what it does not show, and gives the same bytes."""

from collections.abc import Iterable, Mapping
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure, SubFigure
from matplotlib.text import Text

from loralens.analysis.spectrum import Spectrum
from loralens.charts import figure as figures
from loralens.charts.figure import check_suffix, fit, save
from loralens.charts.spectrum import spectrum_figure
from loralens.errors import FormatError, OptionError

Spectra = Mapping[str, Spectrum]


def one(*s: float, rank: int | None = None, shape: tuple[int, int] = (64, 64)) -> Spectrum:
    return Spectrum(np.array(s, dtype=np.float64), shape, rank or len(s))


def llama(blocks: Iterable[int] = range(3), kinds: Iterable[str] = ("q_proj", "v_proj"), rank: int = 4) -> Spectra:
    return {
        f"model.layers.{b}.self_attn.{kind}": one(*(np.arange(rank, 0, -1) * (b + 1.5) * (j + 1.25)))
        for b in blocks
        for j, kind in enumerate(kinds)
    }


def panels(figure: Figure) -> dict[str, Axes]:
    return {axes.get_title(): axes for axes in figure.axes if axes.get_title()}


def maps(figure: Figure) -> list[Axes]:
    return [axes for axes in figure.axes if axes.patch.get_hatch()]


def values(axes: Axes) -> np.ma.MaskedArray:
    return next(c for c in axes.collections if isinstance(c, QuadMesh)).get_array()


def bars(figure: Figure) -> list[Axes]:
    return [axes for axes in figure.axes if axes.get_label() == "<colorbar>"]


def words(figure: Figure | SubFigure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def curves(axes: Axes) -> list[np.ndarray]:
    return [np.asarray(line.get_ydata()) for line in axes.lines]


def test_a_panel_for_each_kind_and_a_line_for_each_block():
    spectra = llama()
    figure = spectrum_figure({"mine": spectra})
    shown = panels(figure)
    assert list(shown) == ["q_proj", "v_proj"]
    for kind, axes in shown.items():
        given = [s.s for name, s in spectra.items() if name.endswith(kind)]
        assert len(axes.lines) == 3
        for line, s in zip(axes.lines, given, strict=True):
            np.testing.assert_array_equal(line.get_ydata(), s)
            np.testing.assert_array_equal(line.get_xdata(), [1, 2, 3, 4])
        assert axes.get_yscale() == "log"
        low, high = axes.get_ylim()
        assert low < min(s.min() for s in given)
        assert high > max(s.max() for s in given)
    assert "singular value σᵢ of ΔW" in words(figure)
    assert "direction i" in words(figure)
    assert "mine" in words(figure)


def test_a_block_has_one_colour_everywhere_and_it_is_that_of_the_bar():
    figure = spectrum_figure({"mine": llama(range(5))})
    q, v = ([line.get_color() for line in axes.lines] for axes in panels(figure).values())
    assert q == v
    assert len(set(q)) == 5
    bar = next(axes for axes in bars(figure) if axes.get_ylabel() == "block of model.layers")
    mesh = next(c for c in bar.collections if isinstance(c, QuadMesh))
    np.testing.assert_allclose([mesh.cmap(mesh.norm(b)) for b in range(5)], q)
    assert [t.get_text() for t in bar.get_yticklabels()] == ["0", "1", "2", "3", "4"]


def test_the_map_holds_the_effective_ranks():
    spectra = llama(range(4))
    figure = spectrum_figure({"mine": spectra})
    (axes,) = maps(figure)
    want = [[spectra[f"model.layers.{b}.self_attn.{k}"].effective_rank for b in range(4)] for k in ("q_proj", "v_proj")]
    np.testing.assert_allclose(values(axes), want)
    assert [t.get_text() for t in axes.get_yticklabels()] == ["q_proj", "v_proj"]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["0", "1", "2", "3"]
    assert axes.get_ylim() == (2, 0)
    assert axes.get_xlabel() == "block of model.layers"
    assert "effective rank\n(of nominal r = 4)" in [bar.get_ylabel() for bar in bars(figure)]
    assert not axes.figure.legends


def test_zero_modules_and_missing_ones_look_different_and_are_named():
    spectra = {**llama(range(4)), "model.layers.1.self_attn.q_proj": one(0, 0, 0, 0)}
    del spectra["model.layers.2.self_attn.v_proj"]
    figure = spectrum_figure({"mine": spectra})
    (axes,) = maps(figure)
    assert values(axes).mask.tolist() == [[False, True, False, False], [False, False, True, False]]
    cross = next(line for line in axes.lines if line.get_marker() == "x")
    assert cross.get_xydata().tolist() == [[1.5, 0.5]]
    assert [t.get_text() for t in axes.figure.legends[0].get_texts()] == ["no module", "ΔW = 0"]
    q, v = panels(figure).values()
    assert "1 of 4 modules are zero" in [t.get_text() for t in q.texts]
    assert not any("zero" in t.get_text() for t in v.texts)
    assert [len(y) for y in curves(q)] == [4, 0, 4, 4]


def test_a_line_ends_where_sigma_is_zero_to_rounding():
    figure = spectrum_figure({"mine": {"layers.0.q": one(2, 1, 1e-17, 0), "layers.1.q": one(4, 3, 2, 1)}})
    assert [y.tolist() for y in curves(panels(figure)["q"])] == [[2, 1], [4, 3, 2, 1]]
    assert "direction i (a line ends where σᵢ is zero to rounding)" in words(figure)
    assert panels(figure)["q"].get_ylim()[0] > 0.1


def test_nothing_but_zeros():
    figure = spectrum_figure({"fresh": {f"h.{b}.c_attn": one(0, 0) for b in range(3)}})
    assert [t.get_text() for t in panels(figure)["c_attn"].texts] == ["all zero"]
    assert values(maps(figure)[0]).mask.all()


def test_no_adapter_is_an_error_and_no_module_is_said():
    with pytest.raises(OptionError, match="no adapter"):
        spectrum_figure({})
    assert "bare\nno modules" in words(spectrum_figure({"bare": {}}))


def test_adapters_share_their_limits_and_colours():
    first, second = llama(range(3)), {k: Spectrum(1000 * s.s**3, s.shape, 4) for k, s in llama(range(1, 5)).items()}
    figure = spectrum_figure({"first": first, "second": second})
    axes = [a for a in figure.axes if a.get_title()]
    assert [a.get_title() for a in axes] == ["q_proj", "v_proj"] * 2
    assert len({a.get_ylim() for a in axes}) == 1
    assert axes[0].get_ylim()[1] > max(s.spectral for s in second.values())
    assert axes[0].lines[1].get_color() == axes[2].lines[0].get_color()  # block 1 in both
    upper, lower = maps(figure)
    assert [t.get_text() for t in upper.get_xticklabels()] == ["0", "1", "2", "3", "4"]
    assert values(upper).shape == values(lower).shape == (2, 5)
    assert upper.collections[0].get_clim() == lower.collections[0].get_clim()
    assert {"first", "second"} <= set(words(figure))


def test_stacks_are_told_apart():
    parts = ("unet.down_blocks.0", "unet.down_blocks.1", "unet.mid_block.attentions.0", "unet.up_blocks.1")
    spectra = {f"{p}.attentions.0.attn{a}.to_q": one(3 * a, 1) for p in parts for a in (1, 2)}
    figure = spectrum_figure({"unet": spectra})
    (axes,) = maps(figure)
    names = ["down_blocks.0", "down_blocks.1", "mid_block.attentions.0", "up_blocks.1"]
    assert [t.get_text() for t in bars(figure)[0].get_yticklabels()] == names
    assert len(panels(figure)["to_q"].lines) == 8
    mean = (one(3, 1).effective_rank + one(6, 1).effective_rank) / 2
    np.testing.assert_allclose(values(axes), [[mean] * 4])
    assert axes.get_xlabel() == "block (a cell is the mean of its non-zero modules, of up to 2)"


def test_wide_stacks_stand_under_their_names():
    counts = {"t.single_blocks": 38, "t.double_blocks": 19}
    figure = spectrum_figure({"flux": {f"{s}.{b}.to_q": one(2, 1) for s, n in counts.items() for b in range(n)}})
    (axes,) = maps(figure)
    assert {t.get_text(): t.get_position()[0] for t in axes.texts} == {"double_blocks": 9.5, "single_blocks": 38.0}
    assert [t.get_text() for t in axes.get_xticklabels()][:10] == [*map(str, range(0, 18, 2)), "0"]
    assert axes.get_xticks()[9] == 19.5


def test_stacks_with_names_too_long_to_tell_apart_are_numbered():
    stacks = [f"{'a' * 40}{x}{'b' * 40}" for x in "xy"]
    figure = spectrum_figure({"odd": {f"{stack}.{b}.q": one(2, 1) for stack in stacks for b in range(2)}})
    labels = [t.get_text() for t in bars(figure)[0].get_yticklabels()]
    assert len(set(labels)) == 4
    assert labels[0].startswith("(1) ")


def test_modules_outside_any_block_have_a_column_and_a_grey_line():
    figure = spectrum_figure({"mine": {**llama(), "classifier.dense": one(2, 1)}})
    assert [t.get_text() for t in maps(figure)[0].get_xticklabels()] == ["0", "1", "2", "outside"]
    dense = panels(figure)["dense"]
    assert dense.lines[0].get_linestyle() == "--"
    assert [t.get_text() for t in dense.texts] == ["grey: outside any block"]


def test_without_any_block_every_module_is_a_line_of_one_panel():
    figure = spectrum_figure({"toy": {f"w{i:03d}": one(3 + i, 2, 1) for i in range(24)}})
    assert [len(axes.lines) for axes in panels(figure).values()] == [24]
    assert [t.get_text() for t in maps(figure)[0].get_xticklabels()] == [f"w{i:03d}" for i in range(24)]
    assert bars(figure)[0].get_ylabel() == "module"


def test_a_stack_of_experts_is_drawn_as_the_mean_of_each_block():
    spectra = {f"layers.{b}.mlp.experts.down_proj[{e}]": one(e + b + 2, 1) for b in range(3) for e in range(128)}
    spectra["layers.0.mlp.experts.down_proj[0]"] = one(0, 0)
    figure = spectrum_figure({"moe": spectra})
    (axes,) = panels(figure).values()
    np.testing.assert_allclose(curves(axes), [[np.mean(np.arange(1, 128) + 2), 1], [66.5, 1], [67.5, 1]])
    assert "mean of each block's modules\n1 of 384 modules are zero" in [t.get_text() for t in axes.texts]


def test_adapters_of_rank_one_are_drawn_against_the_block():
    figure = spectrum_figure({"one": {f"layers.{b}.q": one(b + 1.0) for b in range(3)}})
    (axes,) = panels(figure).values()
    assert [line.get_xydata().tolist() for line in axes.lines] == [[[0, 1]], [[1, 2]], [[2, 3]]]
    assert any(word.startswith("block, in the order of the map") for word in words(figure))


def test_the_kinds_of_least_energy_share_a_panel():
    spectra = {f"layers.{b}.kind{k}": one((k + 1) * 2.0, k + 1) for b in range(2) for k in range(30)}
    figure = spectrum_figure({"wide": spectra})
    assert list(panels(figure)) == [*(f"kind{k}" for k in range(7, 30)), "7 other kinds"]
    assert "wide\n7 of 30 kinds, those of least energy, share a panel" in words(figure)
    assert len(panels(figure)["7 other kinds"].lines) == 14
    two = spectrum_figure({"a": spectra, "b": spectra})
    assert len([axes for axes in two.axes if axes.get_title()]) == 24


def test_too_many_adapters_are_counted_in_the_title():
    figure = spectrum_figure({f"run {i}": llama(range(1), ["q_proj"]) for i in range(14)})
    assert "12 of 14 adapters; 2 left out" in words(figure)
    assert len(maps(figure)) == 12


def test_labels_do_not_overlap_with_many_blocks_and_kinds():
    figure = spectrum_figure({"big": llama(range(96), [f"quite_long_projection_{i}" for i in range(20)])})
    (axes,) = maps(figure)
    assert len(axes.get_xticks()) <= 32
    boxes = [t.get_window_extent() for t in axes.get_xticklabels()]
    assert all(a.x1 < b.x0 for a, b in pairwise(boxes))
    boxes = [t.get_window_extent() for t in axes.get_yticklabels()]
    assert all(a.y0 > b.y1 for a, b in pairwise(boxes))
    boxes = [axes.title.get_window_extent() for axes in list(panels(figure).values())[:5]]
    assert all(a.x1 < b.x0 for a, b in pairwise(boxes))


def test_dollars_newlines_and_surrogates_stay_text(tmp_path):
    name = r"$\frac{1$ and $x$"
    spectra = {f"layers.{b}.{name}": one(2, 1) for b in range(2)} | {f"$a$.{b}.q": one(2, 1) for b in range(2)}
    figure = spectrum_figure({"a$b$\n\udcff_漢": spectra, "$x$.only": {"$y$.0.q": one(1), "$y$.1.q": one(1)}})
    assert name in panels(figure)
    assert "a$b$ ?_漢" in words(figure)
    hostile = [t for t in figure.findobj(Text) if "$" in t.get_text() and "mathdefault" not in t.get_text()]
    assert len(hostile) >= 7
    assert not any(t.get_parse_math() for t in hostile)
    save(figure, tmp_path / "a.svg")


@pytest.mark.parametrize(
    ("name", "width", "want"),
    [("abc", 3, "abc"), ("abcdefgh", 5, "ab…gh"), ("abcdefgh", 4, "ab…h"), (" a \n b ", 9, "a b")],
)
def test_fit(name, width, want):
    assert fit(name, width) == want


def test_the_same_figure_gives_the_same_bytes(tmp_path):
    spectra = {"a": {**llama(range(4)), "model.layers.0.self_attn.q_proj": one(0, 0)}, "b": llama(range(1, 3))}
    figure, another = spectrum_figure(spectra), spectrum_figure(spectra)
    for suffix, head in ((".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF"), (".PNG", b"\x89PNG")):
        once, again, anew = (tmp_path / f"{name}{suffix}" for name in ("once", "again", "anew"))
        save(figure, once)
        save(figure, again)
        save(another, anew)
        assert once.read_bytes().startswith(head)
        assert once.read_bytes() == anew.read_bytes() == again.read_bytes()
    assert len(list(tmp_path.iterdir())) == 12


@pytest.mark.parametrize("name", ["spectra.jpg", "spectra", "png"])
def test_another_suffix_is_an_error_that_lists_the_three(tmp_path, name):
    with pytest.raises(OptionError) as error:
        check_suffix(tmp_path / name)
    assert ".png, .svg or .pdf" in str(error.value)
    with pytest.raises(OptionError):
        save(Figure(), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_is_an_error_before_the_work(tmp_path):
    with pytest.raises(OptionError, match="no such folder"):
        check_suffix(tmp_path / "none" / "a.png")
    with pytest.raises(OptionError, match="no such folder"):
        save(Figure(), tmp_path / "none" / "a.png")


def test_what_stood_there_stays_until_the_new_file_is_whole(tmp_path, monkeypatch):
    target = tmp_path / "a.png"
    target.write_bytes(b"old")

    def fail(self, stream, **options):
        stream.write(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Figure, "savefig", fail)
        with pytest.raises(FormatError, match="No space left"):
            save(Figure(), target)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]
    save(spectrum_figure({"a": llama()}), str(target))
    assert target.read_bytes() != b"old"


def test_the_users_own_settings_change_nothing(tmp_path):
    from matplotlib import rc_context

    save(spectrum_figure({"a": llama()}), tmp_path / "plain.svg")
    with rc_context({"font.size": 20, "svg.hashsalt": "mine", "font.family": ["serif"]}):
        save(spectrum_figure({"a": llama()}), tmp_path / "loud.svg")
    assert (tmp_path / "plain.svg").read_bytes() == (tmp_path / "loud.svg").read_bytes()
    assert figures.STYLE["font.family"] == ["DejaVu Sans"]
