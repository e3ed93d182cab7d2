"""Colours by what they stand for: classes of a stylesheet for light and dark pages, and the same colours on paper.

Sequential colours rise in luminance alone, diverging ones have a neutral middle; the eight series are told apart by
colour-blind eyes (after Okabe & Ito 2008).
"""

from collections.abc import Sequence

from loralens.charts.spec import Ink

STEPS = 32  # of a sequential scale: s0 … s31
SIDES = 12  # steps on either side of a diverging one: v0 … v24
BLOCKS = 16  # b0 … b15, the first to the last block

RGB = tuple[int, int, int]

SEQUENTIAL = {
    "light": ("#eef2f6", "#c9dcea", "#94bfdb", "#5a9bc7", "#2c74ab", "#14508a", "#0b2f5e"),
    "dark": ("#1d2833", "#1f4460", "#20648e", "#3a87b7", "#6cadd4", "#a9d2ea", "#eaf6fd"),
}
DIVERGING = {
    "light": ("#8c2d1f", "#cf6a52", "#efb9a6", "#f3f2f0", "#a9c8df", "#4c8cbd", "#134a80"),
    "dark": ("#ff9b80", "#d4664b", "#7d3a2b", "#262d35", "#2b5575", "#4a93c6", "#9ed3fb"),
}
DEPTH = {
    "light": ("#440154", "#414487", "#2a788e", "#22a884", "#7ad151", "#b6c52b"),
    "dark": ("#8b6fd6", "#6f8fe0", "#3fb0c2", "#3fcf9a", "#95dc5f", "#f4e52f"),
}
SERIES = {
    "light": ("#0b6cab", "#c8530c", "#0a8a66", "#a8457f", "#8a6d00", "#2f9ad0", "#6b5bb5", "#5c6670"),
    "dark": ("#62b5ee", "#f2925a", "#41c9a0", "#e08fbd", "#e0c04a", "#9bd6f5", "#b0a3f0", "#aab4bd"),
}
# Lines that stand for no series, the mark of chance on a map, what lies between two curves, and the cross of ΔW = 0.
OTHERS = {
    "light": {"quiet": "#5b6670", "chance": "#c8530c", "area": "#e3e7ea", "zero": "#c8530c"},
    "dark": {"quiet": "#a3aeb8", "chance": "#f2925a", "area": "#2b343d", "zero": "#f2925a"},
}


def colours(scheme: str) -> dict[str, str]:
    """Class → its colour on a light or a dark page."""
    return {
        **{f"s{i}": _at(SEQUENTIAL[scheme], i / (STEPS - 1)) for i in range(STEPS)},
        **{f"v{i}": _at(DIVERGING[scheme], i / (2 * SIDES)) for i in range(2 * SIDES + 1)},
        **{f"b{i}": _at(DEPTH[scheme], i / (BLOCKS - 1)) for i in range(BLOCKS)},
        **{f"c{i}": colour for i, colour in enumerate(SERIES[scheme])},
        **OTHERS[scheme],
    }


def stylesheet(scheme: str) -> str:
    """The same as custom properties: ``--s0`` …"""
    return "".join(f"--{name}:{colour};" for name, colour in colours(scheme).items())


def classes() -> str:
    """What the classes do: fill a cell, or draw a line."""
    fills = [f"s{i}" for i in range(STEPS)] + [f"v{i}" for i in range(2 * SIDES + 1)]
    inks = [f"b{i}" for i in range(BLOCKS)] + [f"c{i}" for i in range(len(SERIES["light"]))] + ["quiet"]
    return "".join(f".{one}{{fill:var(--{one})}}" for one in fills) + "".join(
        f".{one}{{--ink:var(--{one})}}" for one in inks
    )


def level(value: float, low: float, high: float, *, diverging: bool) -> str:
    """The class of a value on a scale; beyond its ends the last colour."""
    if diverging:
        most = max(abs(low), abs(high)) or 1.0
        return f"v{round(SIDES * (1 + min(max(value / most, -1.0), 1.0)))}"
    share = (value - low) / (high - low) if high > low else 0.0
    return f"s{round((STEPS - 1) * min(max(share, 0.0), 1.0))}"


def is_strong(colour: str) -> bool:
    """Whether a class of `level` is far from the page's own colour, so that letters on it are turned over."""
    step = int(colour[1:])
    return step > STEPS * 0.36 if colour[0] == "s" else abs(step - SIDES) > SIDES * 0.55


def block_ink(place: int, count: int) -> Ink:
    """The colour of the block at a place among so many."""
    return "block", round((BLOCKS - 1) * place / max(count - 1, 1))


def ink_class(ink: Ink) -> str:
    """The class that draws a line."""
    what, number = ink
    return "quiet" if what == "quiet" else f"b{number}" if what == "block" else f"c{number}"


def _at(anchors: Sequence[str], share: float) -> str:
    """The colour at a share of the way along the anchors, mixed in sRGB."""
    place = share * (len(anchors) - 1)
    left = min(int(place), len(anchors) - 2)
    one, two = _rgb(anchors[left]), _rgb(anchors[left + 1])
    mixed = [round(a + (b - a) * (place - left)) for a, b in zip(one, two, strict=True)]
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def _rgb(colour: str) -> RGB:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
