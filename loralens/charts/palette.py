"""Colours by their meaning: CSS classes for light and dark pages, and the same colours for matplotlib.

Sequential colours go evenly from the lightest to the darkest, or from the darkest to the lightest on dark pages, and
diverging colours have a neutral middle. The eight colours of series can be distinguished by colour-blind readers (after
Okabe & Ito 2008).
"""

from itertools import pairwise

# Colours are a few classes and not one per value, so that a page of many cells stays small and can change its theme.
STEPS = 25  # steps of the sequential scale s0 … s24, and of the diverging scale v0 … v24
BLOCKS = 16  # steps from the first to the last block, classes b0 … b15

# Anchors of the scales, between which colours are mixed; on dark pages the largest value is the brightest. Below them
# the colours of series, of lines that stand for none, of the mark of chance and of the area between two curves.
SCALES = {
    "light": {
        "s": "#eef2f6 #c9dcea #94bfdb #5a9bc7 #2c74ab #14508a #0b2f5e",
        "v": "#8c2d1f #cf6a52 #efb9a6 #f3f2f0 #a9c8df #4c8cbd #134a80",
        "b": "#440154 #414487 #2a788e #22a884 #7ad151 #b6c52b",
    },
    "dark": {
        "s": "#1d2833 #1f4460 #20648e #3a87b7 #6cadd4 #a9d2ea #eaf6fd",
        "v": "#ff9b80 #d4664b #7d3a2b #262d35 #2b5575 #4a93c6 #9ed3fb",
        "b": "#8b6fd6 #6f8fe0 #3fb0c2 #3fcf9a #95dc5f #f4e52f",
    },
}
SERIES = {
    "light": ("#0b6cab", "#c8530c", "#0a8a66", "#a8457f", "#8a6d00", "#2f9ad0", "#6b5bb5", "#5c6670"),
    "dark": ("#62b5ee", "#f2925a", "#41c9a0", "#e08fbd", "#e0c04a", "#9bd6f5", "#b0a3f0", "#aab4bd"),
}
OTHERS = {
    "light": {"quiet": "#5b6670", "chance": "#c8530c", "area": "#e3e7ea"},
    "dark": {"quiet": "#a3aeb8", "chance": "#f2925a", "area": "#2b343d"},
}


def colours(scheme: str) -> dict[str, str]:
    """Return class → colour, for the scheme ``light`` or ``dark``."""
    scales = {
        f"{name}{step}": _mix(anchors, step / (count - 1))
        for (name, anchors), count in zip(SCALES[scheme].items(), (STEPS, STEPS, BLOCKS), strict=True)
        for step in range(count)
    }
    return {**scales, **{f"c{i}": colour for i, colour in enumerate(SERIES[scheme])}, **OTHERS[scheme]}


def level(share: float, *, diverging: bool) -> str:
    """Return the class of a value that stands at a share of its scale."""
    return f"{'v' if diverging else 's'}{round((STEPS - 1) * share)}"


def is_strong(colour: str) -> bool:
    """Whether a class of `level` is so far from the colour of the page that letters on it need the opposite colour."""
    step = int(colour[1:])
    # One threshold serves both themes, as a page can change its theme and the classes stay the same.
    return step > STEPS * 0.36 if colour[0] == "s" else abs(step - 12) > 6.6


def block_ink(place: int, count: int) -> str:
    """Return the class of a block by its place among ``count`` blocks."""
    return f"b{round((BLOCKS - 1) * place / max(count - 1, 1))}"


def _mix(anchors: str, share: float) -> str:
    """The colour at a share of the way along the anchors, mixed in sRGB."""
    pairs = list(pairwise(anchors.split()))
    place = share * len(pairs)
    index = min(int(place), len(pairs) - 1)
    start, end = (bytes.fromhex(colour[1:]) for colour in pairs[index])
    return "#" + bytes(round(a + (b - a) * (place - index)) for a, b in zip(start, end, strict=True)).hex()
