"""The errors that loralens raises on purpose.

    LoraLensError
    ├── FormatError      a file is not what it claims to be, or cannot be read or written
    ├── ShapeError       arrays that do not fit together
    ├── MismatchError    two things that belong together and disagree: config and tensors, adapter and base
    ├── OptionError      an option has a value that is not allowed
    │   ├── UnknownModuleError   a module that an adapter does not have; a KeyError too
    │   └── MissingFileError     a path at which there is nothing; a FileNotFoundError too
    └── DivergenceError  training has reached infinite numbers or NaN

A message has three parts: where, what, and how to fix it. The code that finds the problem knows *what*; its callers add
*where* while the error passes through them::

    with place("my_adapter/adapter_model.safetensors"):
        read(...)

Messages name options as the command line has them: ``--rank 8``. Where they are shown to Python, `spell` makes
``rank=8`` of that.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Self

# The characters that can change what a terminal shows of other text. In order: the control characters of C0 and of C1,
# the marks and overrides of writing direction, the separators of lines and paragraphs, and lone surrogates.
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


# The fix where one module of an adapter stands in the way. `--modules` would not do: it chooses what is kept.
LEAVE_OUT = "leave the module out first: loralens drop ADAPTER -m NAME -o OUT"
# The same for a tensor that was trained in full, which `drop` keeps.
LEAVE_EXTRA_OUT = "leave what was trained in full out first: loralens convert ADAPTER --drop-extra -o OUT"

# What is wrong with an adapter whose factors cannot be used; `name_damaged` adds which adapter it is.
NOT_FINITE = "a factor holds NaN or Inf"


def visible(text: str, *, keep: str = "") -> str:
    """Return text that is safe to show: characters that move the cursor, hide or reverse text become escapes.

    Characters in ``keep`` stay as they are. A byte of a path that is not UTF-8 is shown by its hexadecimal number.
    """
    # Nearly all text is printable, and isprintable is much faster than the regular expression. A character that it
    # calls unprintable may still be harmless, such as a no-break space; then the expression leaves it as it is.
    if text.isprintable():
        return text
    return UNPRINTABLE.sub(lambda match: match[0] if match[0] in keep else _escape(ord(match[0])), text)


def _escape(code: int) -> str:
    # Python decodes a byte of a path that is not UTF-8 to a surrogate in this range (PEP 383).
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


# Commands as users type them stay, up to the end of the clause or of the quotation; and so do options of other programs
# and of the shell.
_OPTION = re.compile(
    r"(?P<command>`loralens [^`]*`|\bloralens [a-z]+ [^;,)]*)"
    r"|(?<![\w-])(?:--(?P<name>[a-z][a-z-]*[a-z])|-o)\b"
    r"(?: (?P<value>'[^']*'|\S*=(?:\S*?[^\s;),])?(?=\.? [A-Z]|,?(?:\s|$)|[;)])|[^\s,;:()]*\w))?"
)
_FOREIGN = {
    "concat", "csv", "help", "json", "lora", "max-lora-rank", "no-deps", "nproc-per-node", "num-train-epochs", "plot",
    "python", "quiet", "runner", "top", "verbose",
}  # fmt: skip
_FLAGS = {
    "allow-loss", "allow-missing", "demo", "drop-dead", "drop-extra", "dry-run", "exact", "explain", "force",
    "group-by-length", "intruders", "markdown", "measure", "once", "only-if-smaller", "out-side", "overwrite", "pack",
    "resume", "shard", "uniform",
}  # fmt: skip
_OTHERWISE = {
    "for": "consumer",
    "keep-tied": "untie=False",
    "lambda": "strength",
    "no-explain": "explain=False",
    "no-intruders": "intruders=False",
    "no-mask-prompt": "mask_prompt=False",
    "set": "settings",
}
# A value is a placeholder (DIR), a text with a digit or =, or one of these; any other word goes on with the sentence.
_VALUES = {
    "adamw", "causal-lm", "classification", "comfyui", "core", "diffusers", "dpo", "feedback", "gguf", "keep", "kohya",
    "median", "mlx", "nearest", "none", "olora", "peft", "pissa", "rounding", "stochastic", "sum", "ties", "trl",
}  # fmt: skip
_typed: list[bool] = []  # not empty within `as_typed`, in every thread


@contextmanager
def as_typed() -> Iterator[None]:
    """Within the block, messages name options as the command line has them."""
    _typed.append(True)
    try:
        yield
    finally:
        _typed.pop()


def in_shell(advice: str) -> str:
    """Advice about the command line; empty where a message is shown to Python."""
    return advice if _typed else ""


def spell(text: str) -> str:
    """A message with its options spelled for the place where it is shown: ``--rank 8``, or ``rank=8`` in Python."""
    return text if _typed or "-" not in text else _OPTION.sub(_as_keyword, text)


def _as_keyword(option: re.Match[str]) -> str:
    name, value = option["name"] or "output", option["value"]
    if option["command"] or name in _FOREIGN:
        return option[0]
    keyword = _OTHERWISE.get(name, name.replace("-", "_"))
    if name in _FLAGS:
        keyword += "=True"
    rest = f" {value}" if value else ""
    if "=" in keyword:
        return keyword + rest
    if value and value[0] == "'":
        return f"{keyword}={value}"
    if not value or not (value.isupper() or value in _VALUES or re.search("[0-9=]", value)):
        return f"{keyword}={rest}"
    plain = (value.isupper() and "=" not in value) or re.fullmatch(r"[+-]?[0-9.]+", value)
    return f"{keyword}={value if plain else repr(value)}"


class LoraLensError(Exception):
    """The base class of all errors: what went wrong, where, and how to fix it.

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
        # From the outermost place to the innermost, such as a file and a tensor in it.
        self.where: tuple[str, ...] = ()

    def at(self, place: str) -> Self:
        """Put ``place`` before the places that this error already names, and return the error."""
        # A place that two callers add, such as the path of a file, is named once.
        if not self.where or self.where[0] != place:
            self.where = (place, *self.where)
        return self

    # Errors cross process boundaries. BaseException.__reduce__ would call the class without its required ``fix``.
    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), fix=self.fix), (self.what,), {"where": self.where}

    def __str__(self) -> str:
        said = ": ".join(map(visible, (*self.where, spell(self.what))))
        return f"{said}\n  fix: {visible(spell(self.fix))}"


class FormatError(LoraLensError):
    """A file is not what it claims to be, or cannot be read or written."""


class ShapeError(LoraLensError):
    """The shapes of arrays do not fit together."""


class MismatchError(LoraLensError):
    """Two things that belong together disagree, such as a configuration and its tensors."""


class OptionError(LoraLensError):
    """An option has a value that is not allowed or does not make sense."""


class UnknownModuleError(OptionError, KeyError):
    """An adapter has no module of this name, or none that this glob matches."""

    # A KeyError too, as adapter[name] looks a name up like a mapping, and callers of mappings catch KeyError.


class MissingFileError(OptionError, FileNotFoundError):
    """There is nothing at a path."""

    # A FileNotFoundError too, which callers of functions that take paths catch.


class DivergenceError(LoraLensError):
    """Training has reached a loss or a parameter that is infinite or not a number."""


def target_exists(path: object = None, *, such: str = "") -> OptionError:
    """The error about a target that is already there; without its path where `place` gives it."""
    what = "exists" if path is None else f"{path}: exists"
    return OptionError(what, fix=f"choose another target{such}, or give --overwrite")


def place(name: object) -> "_Place":
    """Add ``name`` to the places of any LoraLensError that leaves the block."""
    return _Place(name)


class _Place:
    """The block of `place`: a class, since a generator would take five times as long for each tensor of a file."""

    __slots__ = ("_name",)

    def __init__(self, name: object) -> None:
        self._name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, LoraLensError):
            error.at(str(self._name))
