"""The gallery of a folder of adapters: one page with previews, which a browser searches and filters."""

import re
from base64 import b64decode, b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from loralens.core.adapter import Finding
from loralens.errors import FormatError, OptionError, place
from loralens.formats.files.atomic import atomic_file, check_write_target
from loralens.formats.files.disk import check_room
from loralens.formats.files.outside import open_stream
from loralens.reporting.report_files import SUFFIX, render_page

SIDE = 384  # pixels of the longer side of a preview: a card is 250 pixels wide, and some screens have two for each
MOST_BYTES = 1 << 24  # of a picture as it is stored; previews of image models have 1 MB
MOST_PIXELS = 1 << 26  # of a picture that is decoded, in 200 MB of memory
# What is never SVG, which may hold scripts; the same types are all that the decoder is allowed to try.
TYPES = ("PNG", "JPEG", "WEBP")
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
_DATA = re.compile(r"data:image/(?:png|jpe?g|webp);base64,", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Card:
    """An adapter in the gallery.

    Attributes
    ----------
    name : str
    level : str
        The verdict in one word, by which the page filters and colours.
    verdict : str
        The verdict in words.
    family : str
    facts : sequence of (str, str)
        What the card says below the name: a property and its value.
    trigger_words : sequence of str
    preview : str
        A ``data:`` URL of `preview`; empty if there is none.
    details : sequence of (str, str)
        What the opened card adds.
    findings : sequence of Finding
    commands : sequence of str
        What to type next.
    """

    name: str
    level: str
    verdict: str
    family: str
    facts: Sequence[tuple[str, str]]
    trigger_words: Sequence[str]
    preview: str
    details: Sequence[tuple[str, str]]
    findings: Sequence[Finding]
    commands: Sequence[str]


def check_gallery_target(page: Path, *, overwrite: bool) -> None:
    """Refuse a target to which the page cannot be written, before anything is read.

    Raises
    ------
    OptionError
        A suffix other than .html; a file that exists although ``overwrite`` is false; a folder.
    """
    if page.suffix != SUFFIX:
        raise OptionError(f"{page}: a gallery is a .html page", fix=f"end the name in {SUFFIX}")
    with place(page):
        check_write_target(page, (), folder=False, overwrite=overwrite)
    check_room(page)


def write_gallery(title: str, headline: str, cards: Sequence[Card], page: Path) -> None:
    """Write the page, which needs no other file. All names and texts are escaped."""
    families = sorted({card.family for card in cards if card.family}, key=str.lower)
    levels = list(dict.fromkeys(card.level for card in cards))
    text = render_page(
        "gallery.html",
        "gallery.js",
        title=title,
        headline=headline,
        cards=cards,
        families=families,
        levels=levels,
        # Without any picture, cards need no place for them.
        pictures=any(card.preview for card in cards),
    )
    with atomic_file(page) as stream:
        stream.write(text.encode("utf-8"))


def beside(path: Path) -> str:
    """The preview of an adapter from a picture beside its file, ``NAME.png`` or ``NAME.preview.png``; else empty."""
    for picture in (path.with_name(f"{path.stem}{kind}{suffix}") for kind in (".preview", "") for suffix in PICTURES):
        try:
            if picture.is_file():
                with open_stream(picture) as stream:
                    data = stream.read(MOST_BYTES + 1)
                if made := preview(data):
                    return made
        except (FormatError, OSError):  # a picture that cannot be read is left out
            continue
    return ""


def from_data_url(url: str) -> str:
    """The preview from the ``data:`` URL of a picture, as in ``modelspec.thumbnail``; empty if it is none."""
    start = _DATA.match(url)
    if not start or len(url) > 2 * MOST_BYTES:
        return ""
    try:
        return preview(b64decode(url[start.end() :], validate=True))
    except ValueError:
        return ""


def preview(data: bytes) -> str:
    """A small copy of a picture as a ``data:`` URL; empty if it is too large, or no PNG, JPEG or WebP.

    The picture comes from anywhere. It is decoded and encoded anew, so that nothing else in the file reaches the page.
    """
    if len(data) > MOST_BYTES:
        return ""
    from PIL import Image, ImageOps  # only where a page has pictures

    try:
        with Image.open(BytesIO(data), formats=TYPES) as picture:
            if picture.width * picture.height > MOST_PIXELS:
                return ""
            picture.draft("RGB", (SIDE, SIDE))  # a large JPEG is decoded at a fraction of its size
            small = ImageOps.exif_transpose(picture)
            small.thumbnail((SIDE, SIDE))
            stream = BytesIO()
            small.convert("RGB").save(stream, "JPEG", quality=82)
    # Decoders raise errors of many classes for damaged files; a card without a picture is the answer to all of them.
    except Exception:  # noqa: BLE001
        return ""
    return "data:image/jpeg;base64," + b64encode(stream.getvalue()).decode()
