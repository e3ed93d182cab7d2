"""Colours by their meaning: CSS classes for light and dark pages, and the same colours for matplotlib.

Sequential colours go evenly from the lightest to the darkest, or from the darkest to the lightest on dark pages, and
diverging colours have a neutral middle. The eight colours of series can be distinguished by colour-blind readers (after
Okabe & Ito 2008).
"""

from collections.abc import Sequence

from loralens.charts.spec import Ink

# Colours are a few classes and not one per value, so that a page of many cells stays small and can change its theme.
STEPS = 32  # steps of a sequential scale, classes s0 … s31
SIDES = 12  # steps on either side of a diverging scale, classes v0 … v24
BLOCKS = 16  # steps from the first to the last block, classes b0 … b15

# Anchors of the scales, between which colours are mixed. On dark pages the largest value is the brightest, so that it
# stands out from the page there too.
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
# Colours of lines that stand for no series, of the mark of chance on a map, of the area between two curves, and of the
# cross of a cell in which ΔW is 0.
OTHERS = {
    "light": {"quiet": "#5b6670", "chance": "#c8530c", "area": "#e3e7ea", "zero": "#c8530c"},
    "dark": {"quiet": "#a3aeb8", "chance": "#f2925a", "area": "#2b343d", "zero": "#f2925a"},
}


def colours(scheme: str) -> dict[str, str]:
    """Return class → colour, for the scheme ``light`` or ``dark``."""
    return {
        **{f"s{i}": _at(SEQUENTIAL[scheme], i / (STEPS - 1)) for i in range(STEPS)},
        **{f"v{i}": _at(DIVERGING[scheme], i / (2 * SIDES)) for i in range(2 * SIDES + 1)},
        **{f"b{i}": _at(DEPTH[scheme], i / (BLOCKS - 1)) for i in range(BLOCKS)},
        **{f"c{i}": colour for i, colour in enumerate(SERIES[scheme])},
        **OTHERS[scheme],
    }


def stylesheet(scheme: str) -> str:
    """Return the colours of a scheme as CSS custom properties: ``--s0`` …"""
    return "".join(f"--{name}:{colour};" for name, colour in colours(scheme).items())


def classes() -> str:
    """Return the CSS rules of the classes, which fill a cell or colour a line."""
    # Lines get a property, --ink, as the stylesheet uses their colour as stroke and the marks of their points as fill.
    rules = {"s": "fill", "v": "fill", "b": "--ink", "c": "--ink", "q": "--ink"}
    names = [name for name in colours("light") if name == "quiet" or name not in OTHERS["light"]]
    return "".join(f".{name}{{{rules[name[0]]}:var(--{name})}}" for name in names)


def level(value: float, low: float, high: float, *, diverging: bool) -> str:
    """Return the class of a value on a scale; values beyond an end have the colour of that end."""
    if diverging:
        most = max(abs(low), abs(high)) or 1.0
        return f"v{round(SIDES * (1 + min(max(value / most, -1.0), 1.0)))}"
    share = (value - low) / (high - low) if high > low else 0.0
    return f"s{round((STEPS - 1) * min(max(share, 0.0), 1.0))}"


def is_strong(colour: str) -> bool:
    """Whether a class of `level` is so far from the colour of the page that letters on it need the opposite colour."""
    step = int(colour[1:])
    # One threshold serves both themes, as a page can change its theme and the classes stay the same.
    return step > STEPS * 0.36 if colour[0] == "s" else abs(step - SIDES) > SIDES * 0.55


def block_ink(place: int, count: int) -> Ink:
    """Return the colour of a block by its place among ``count`` blocks."""
    return "block", round((BLOCKS - 1) * place / max(count - 1, 1))


def ink_class(ink: Ink) -> str:
    """Return the class that colours a line."""
    what, number = ink
    return {"quiet": "quiet", "block": f"b{number}", "series": f"c{number}"}[what]


def _at(anchors: Sequence[str], share: float) -> str:
    """The colour at a share of the way along the anchors, mixed in sRGB."""
    place = share * (len(anchors) - 1)
    anchor = min(int(place), len(anchors) - 2)
    start, end = (bytes.fromhex(colour.removeprefix("#")) for colour in anchors[anchor : anchor + 2])
    return "#" + bytes(round(a + (b - a) * (place - anchor)) for a, b in zip(start, end, strict=True)).hex()
