"""The figure of a run: what is in it, and that it is the same every time."""

import io
from pathlib import Path

import numpy as np

import loralens
from loralens.analysis.trajectory import Trajectory, measure_trajectory
from loralens.charts.figure import save
from loralens.charts.trajectory import trajectory_figure

LOSSES = {"loss": [(1, 3.0), (50, 2.0), (100, 1.5)], "eval loss": [(100, 1.75)]}


def found(count: int = 3) -> Trajectory:
    rng = np.random.default_rng(0)
    A, B = rng.standard_normal((2, 9)), rng.standard_normal((8, 2))
    return measure_trajectory(
        [loralens.Adapter(modules={"q": loralens.LowRank(B * t + rng.random(B.shape), A)}) for t in range(1, count + 1)]
    )


def test_every_panel_has_its_line_its_title_and_its_units() -> None:
    run = found()
    figure = trajectory_figure(run, [10, 50, 100], LOSSES, ["a", "b", "c"])
    size, rank, direction, loss = figure.axes
    assert [list(line.get_xdata()) for line in size.lines] == [[10, 50, 100]] * 2
    assert list(size.lines[0].get_ydata()) == [point.frobenius for point in run.points]
    assert np.isnan(size.lines[1].get_ydata()[0])
    assert list(rank.lines[0].get_ydata()) == [point.effective_rank for point in run.points]
    assert list(direction.lines[0].get_ydata()) == [point.cosine for point in run.points]
    labels = [line.get_label() for line in direction.lines]
    assert labels == [
        "cosine of ΔW", "φ, out side", "φ, in side", "φ by chance, out", "φ by chance, in", "settled (0.9)",
    ]  # fmt: skip
    for line, side in ((1, "out"), (2, "in")):
        assert list(direction.lines[line].get_ydata()) == [point.phi[side] for point in run.points]
    assert run.points[0].phi["out"] != run.points[0].phi["in"]
    assert [direction.lines[line].get_ydata()[0] for line in (3, 4)] == [2 / 8, 2 / 9]
    assert [line.get_label() for line in size.lines] == ["‖ΔW‖ here", "moved since the one before"]
    assert list(size.lines[1].get_ydata())[1:] == [point.length for point in run.points[1:]]
    assert [list(line.get_ydata()) for line in loss.lines] == [[3.0, 2.0, 1.5], [1.75]]
    assert all(axes.get_title() and axes.get_ylabel() for axes in figure.axes)
    assert [axes.get_xlabel() for axes in figure.axes] == ["", "", "step", "step"]


def test_every_loss_has_its_line() -> None:
    losses = {name: [(1, 1.0 + i), (2, 0.5 + i)] for i, name in enumerate(("loss", "eval loss", "other", "a fourth"))}
    figure = trajectory_figure(found(2), [1, 2], losses, ["a", "b"])
    assert [line.get_label() for line in figure.axes[3].lines] == list(losses)


def test_without_steps_checkpoints_stand_under_their_names() -> None:
    figure = trajectory_figure(found(), [10, 50, None], LOSSES, ["a", "b", "a $very$ long name of a checkpoint indeed"])
    assert [tick.get_text() for tick in figure.axes[2].get_xticklabels()] == ["a", "b", "a $very$ lon…oint indeed"]
    assert [text.get_text() for text in figure.axes[3].texts] == ["not drawn: some steps are unknown"]


def test_without_losses_the_panel_says_so() -> None:
    figure = trajectory_figure(found(), [1, 2, 3], {"loss": []}, ["a", "b", "c"])
    assert [text.get_text() for text in figure.axes[3].texts] == ["no losses logged"]


def test_a_run_of_zeros_can_be_drawn() -> None:
    zero = loralens.Adapter(modules={"q": loralens.LowRank(np.zeros((3, 1)), np.ones((1, 3)))})
    trajectory_figure(measure_trajectory([zero, zero]), [1, 2], {}, ["a", "b"])


def test_the_bytes_are_the_same_every_time(tmp_path: Path) -> None:
    made = []
    for i in range(2):
        drawn = trajectory_figure(found(), [10, 50, 100], LOSSES, ["a", "b", "c"])
        for suffix in ("png", "svg", "pdf"):
            save(drawn, tmp_path / f"{i}.{suffix}")
            made.append((tmp_path / f"{i}.{suffix}").read_bytes())
    assert made[:3] == made[3:]


def test_no_label_leaves_the_figure() -> None:
    figure = trajectory_figure(found(20), [None] * 20, {}, [f"a-long-name-of-checkpoint-{i}" for i in range(20)])
    figure.savefig(io.BytesIO(), dpi=150)
    width, height = figure.get_size_inches() * 150
    for axes in figure.axes:
        box = axes.get_tightbbox()
        assert box is not None
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= width
        assert box.y1 <= height
