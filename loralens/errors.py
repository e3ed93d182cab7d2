"""The errors that loralens raises on purpose.

    LoraLensError
    ├── FormatError      a file is not what it says it is, or not what we can read
    ├── ShapeError       arrays that do not fit together
    ├── MismatchError    two things that belong together and disagree: config and tensors, adapter and base
    ├── OptionError      an option with a value that makes no sense
    │   └── UnknownModuleError   a module that an adapter does not have; a KeyError too
    └── DivergenceError  training that left the finite numbers

A message has three parts: where, what, and how to fix it. Code deep down knows *what*; whoever called it adds
*where* on the way out::

    with place("my_adapter/adapter_model.safetensors"):
        read(...)
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Self

# Controls of C0 and C1, marks and overrides of direction, ends of lines and of paragraphs, halves of pairs.
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str, *, keep: str = "") -> str:
    """Text for people, in which what moves a cursor, hides or turns around text is an escape; but for ``keep``.

    A byte of a path that is no UTF-8 is shown as that byte.
    """
    if text.isprintable():  # nearly always, and at the speed of C
        return text
    return UNPRINTABLE.sub(lambda match: match[0] if match[0] in keep else _escape(ord(match[0])), text)


def _escape(code: int) -> str:
    if 0xDC80 <= code <= 0xDCFF:  # as Python keeps such a byte of a path
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


class LoraLensError(Exception):
    """What went wrong, where, and how to fix it.

    Parameters
    ----------
    what : str
        One sentence without a full stop: what is wrong.
    fix : str
        One sentence: what the user can do about it.
    """

    def __init__(self, what: str, *, fix: str) -> None:
        super().__init__(what)
        self.what = what
        self.fix = fix
        self.where: tuple[str, ...] = ()

    def at(self, place: str) -> Self:
        """This error, with ``place`` put before the places it already names."""
        if not self.where or self.where[0] != place:
            self.where = (place, *self.where)
        return self

    def __reduce__(self) -> tuple[Any, ...]:  # Exception's own would call the class without fix
        return partial(type(self), fix=self.fix), (self.what,), {"where": self.where}

    def __str__(self) -> str:
        return ": ".join(map(visible, (*self.where, self.what))) + f"\n  fix: {visible(self.fix)}"


class FormatError(LoraLensError):
    """A file is not what it says it is, or not what we can read."""


class ShapeError(LoraLensError):
    """Arrays that do not fit together."""


class MismatchError(LoraLensError):
    """Two things that belong together and disagree."""


class OptionError(LoraLensError):
    """An option with a value that makes no sense."""


class UnknownModuleError(OptionError, KeyError):
    """An adapter has no module of this name, or none that this glob matches."""


class DivergenceError(LoraLensError):
    """Training that left the finite numbers."""


@contextmanager
def place(name: object) -> Iterator[None]:
    """Add ``name`` to the places of any LoraLensError that leaves the block."""
    try:
        yield
    except LoraLensError as error:
        error.at(str(name))
        raise
