"""Globs, prefixes and blocks that select modules by their names.

A glob is compared with the whole name and with the kind of a module, so ``q_proj`` means ``*.q_proj``. Brackets are
literal, because numbers of experts are written in them. What follows an ``@`` limits a glob to blocks:
``q_proj@4-8`` means the modules that ``q_proj`` matches in the blocks 4 to 8, and ``*@IN04,MID`` two blocks of an
image model. A text without wildcards that is neither a name nor a kind may be the beginning of names, or else one or
more whole parts of them: ``layers.3`` and, in kohya's names, ``te``.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from loralens.core.names import is_near, kind, natural_key, nearest, some
from loralens.core.naming.blocks import (
    BLOCK_FORMS,
    block_name,
    describe_blocks,
    image_blocks,
    in_block,
    inside_blocks,
    is_block,
)
from loralens.core.naming.clock import Clock
from loralens.core.naming.normal_form import encoder, inner_form
from loralens.errors import OptionError

FEWER_GLOBS = "name kinds of modules, q_proj, or use fewer and shorter globs"
_NUMBERED = re.compile(r"_[0-9]+(_|$)")
_WILD = {*"*?"}  # the wildcards of a glob; brackets are literal, because numbers of experts are written in them


def within_blocks(globs: Sequence[str], blocks: Sequence[int | str]) -> tuple[str, ...]:
    """Globs that match what ``globs`` match inside of ``blocks``; without blocks the globs as they are.

    Parameters
    ----------
    globs : sequence of str
        Without globs all modules of the blocks are meant.
    blocks : sequence of int or str
        Numbers, ranges (``4-8``), names of blocks of image models (``IN04``), and several of them with commas.

    Raises
    ------
    OptionError
        A text that is not a block.
    """
    entries = [block_name(entry.strip()) for part in blocks for entry in str(part).split(",")]
    for entry in entries:
        if not is_block(entry):
            raise OptionError(f"{entry!r:.60} is not a block", fix=BLOCK_FORMS)
    if not entries:
        return tuple(globs)
    return tuple(f"{glob}@{','.join(entries)}" for glob in globs or ["*"])


def select(names: Iterable[str], globs: str | Sequence[str], *, prefixes: bool = True) -> list[str]:
    """The names that match any of ``globs`` (one glob may be a plain string), or all names if there are no globs.

    Parameters
    ----------
    names : iterable of str
    globs : str or sequence of str
    prefixes : bool
        A text without wildcards that is neither a name nor a kind may be the beginning or a part of names, as in
        `as_parts`.

    Raises
    ------
    OptionError
        A glob matches nothing, or no module is in a block. The message has a glob that matches, or the nearest names.
    FormatError
        There are so many names and globs that matching would take minutes.
    """
    # Names may be an iterator, and are gone through several times.
    names = list(names)
    globs = [globs] if isinstance(globs, str) else globs
    if not globs:
        return names
    called: dict[str, set[str]] = {}
    for name in names:
        called.setdefault(name, set()).add(name)
        # Kinds repeat in every block: a glob is matched once for each kind instead of once for each module.
        called.setdefault(kind(name), set()).add(name)
    clock = Clock()
    chosen: set[str] = set()
    for glob in globs:
        chosen |= _select_by_glob(names, called, glob, clock, prefixes=prefixes)
    return [name for name in names if name in chosen]


def _select_by_glob(
    names: Sequence[str], called: Mapping[str, set[str]], glob: str, clock: Clock, *, prefixes: bool
) -> set[str]:
    """The names that a glob selects, which are at least one."""
    # The glob is first compared as a whole, because a name may end in a text that looks like an @ with blocks.
    hits = set(called.get(glob, ()))
    pattern, blocks = (glob, "") if hits else _split(glob)
    matched = hits or _matching_names(called, pattern, clock)
    if not matched and prefixes:
        matched = set().union(*(_matching_names(called, wider, clock) for wider in as_parts(names, pattern)))
    if not matched:
        raise OptionError(f"no module matches {pattern!r}", fix=suggestion(pattern, names))
    # Before the set of all names is made: there may be as many globs as names.
    if not blocks:
        return matched
    inside = inside_blocks(names, blocks)
    if not matched & inside:
        places = describe_blocks(name for name in names if name in matched)
        raise OptionError(
            f"no module that {pattern!r} matches is in block {blocks}", fix=f"these modules are in {places}"
        )
    return matched & inside


def _matching_names(called: Mapping[str, set[str]], glob: str, clock: Clock) -> set[str]:
    """The names that a glob matches; ``called`` maps whole names and kinds to names."""
    # Without wildcards a dictionary is enough.
    if not _WILD & {*glob}:
        return set(called.get(glob, ()))
    pattern = _escape_brackets(glob)
    hits: set[str] = set()
    for name, names in called.items():
        # fnmatch may backtrack for minutes on a hostile glob with many stars.
        with clock.running(f"the glob {glob!r:.60}", fix=FEWER_GLOBS):
            if fnmatchcase(name, pattern):
                hits |= names
    return hits


def wild(glob: str) -> bool:
    """Whether a glob means more than one name or kind: it has wildcards, or blocks."""
    return bool(_WILD & {*glob}) or bool(_split(glob)[1])


def glob_in_words(glob: str) -> str:
    """A glob in a sentence: ``q_proj of blocks 4-8``."""
    pattern, blocks = _split(glob)
    if not blocks:
        return glob
    several = "," in blocks or "-" in blocks
    return f"{'' if pattern == '*' else f'{pattern} of '}block{'s' * several} {blocks.replace(',', ', ')}"


def matches(name: str, glob: str) -> bool:
    """Whether a glob of `select` matches this name."""
    if glob in (name, kind(name)):
        return True
    glob, blocks = _split(glob)
    if blocks and not any(in_block(entry, name, image_blocks([name]).get(name, ())) for entry in blocks.split(",")):
        return False
    if not _WILD & {*glob}:
        return glob in (name, kind(name))
    pattern = _escape_brackets(glob)
    return fnmatchcase(name, pattern) or fnmatchcase(kind(name), pattern)


def _escape_brackets(glob: str) -> str:
    """Escape the brackets of a glob for `fnmatch`, which would read them as sets of letters."""
    return glob.replace("[", "[[]")


def _split(glob: str) -> tuple[str, str]:
    """A glob without its blocks, and the blocks; the blocks are empty if none follow the last @."""
    pattern, at, blocks = glob.rpartition("@")
    return (pattern, blocks) if at and all(map(is_block, blocks.split(","))) else (glob, "")


# ---- Parts of names, and what to suggest


def as_parts(names: Iterable[str], text: str) -> list[str]:
    """Globs of the modules whose names begin with ``text``, else of those that have it as whole parts anywhere.

    None if the text has wildcards or no name has it. It begins and ends where a part of the name does. A beginning may
    be written as any dialect writes it, and with a space before the number of a block, as `inspect` prints it:
    ``lora_unet_up_blocks``, ``unet.up_blocks``, ``up_blocks 3``.
    """
    # A shell that completes words leaves a dot at the end.
    start = text.strip().replace(" ", "_").rstrip("._*")
    if not start or _WILD & {*start}:
        return []
    names = list(names)
    # A star at the end says that the text is a beginning.
    return _beginnings(names, start) or ([] if "*" in text else _whole_parts(names, start))


def _beginnings(names: Sequence[str], start: str) -> list[str]:
    """Globs of the names that begin with ``start``."""
    flat = re.sub(r"[./]", "_", start)
    start_form, component = inner_form(start), encoder(start)
    globs: dict[str, None] = {}
    for name in names:
        form = inner_form(name)
        if _begins(name, re.sub(r"[./]", "_", name), flat):
            length = len(flat)
        elif (
            start_form and encoder(name) in (component or encoder(name), component) and _begins(name, form, start_form)
        ):
            length = len(name) - len(form) + len(start_form)
        else:
            continue
        globs[f"{name[: length + 1]}*"] = None
    return list(globs)


def _whole_parts(names: Sequence[str], text: str) -> list[str]:
    """Globs of the names in which ``text`` is one or more whole parts."""
    # A number alone may be that of a block, of an attention in it, or of a layer in a sequence.
    if text.isdecimal():
        return []
    words = "[._/]".join(map(re.escape, re.split(r"[._/]", text)))
    dotted, flat = (re.compile(rf"(?:^|[{joints}]){words}(?=[{joints}]|$)") for joints in (r"./\[", r"./\[_"))
    globs: dict[str, None] = {}
    for name in names:
        if found := (flat if _divided_by_underscores(name) else dotted).search(name):
            globs[f"{name[: found.end() + 1]}*" if found.end() < len(name) else name] = None
    return list(globs)


def expand_glob(names: Mapping[str, object], glob: str) -> list[str]:
    """The glob itself, or globs for the modules whose names begin with it or have it as whole parts."""
    pattern, blocks = _split(glob)
    if any(matches(name, pattern) for name in names):
        return [glob]
    return [f"{wider}@{blocks}" if blocks else wider for wider in as_parts(names, pattern)] or [glob]


def _begins(name: str, form: str, start: str) -> bool:
    """Whether the form of a name begins with ``start``, and a part of the name ends there.

    The form stands for the end of the name and has the same length as that end.
    """
    if not form.startswith(start) or len(form) == len(start):
        return False
    joint = name[len(name) - len(form) + len(start)]
    return joint in ".[/" or (joint == "_" and _divided_by_underscores(name))


def _divided_by_underscores(name: str) -> bool:
    """Whether underscores divide the parts of a name: it has numbers and no dots. `lm` is not a part of `lm_head`."""
    return "." not in name and bool(_NUMBERED.search(name))


def suggestion(text: str, names: Sequence[str]) -> str:
    """What to give in place of a glob that matches nothing: a glob of the names that contain it, if there are any."""
    middle = text.strip("*. ")
    # The same words joined as in other dialects, and in lower case.
    spellings = (middle, middle.replace(".", "_"), middle.replace("_", "."), middle.lower())
    # Behind a number only a whole part of the name is meant: layers.1 is not layers.10.
    ends = (".*", "_*", "*") if middle[-1:].isdigit() else ("*",)
    for end in dict.fromkeys(f"{spelling}{end}" for spelling in spellings for end in ends if spelling):
        globs = {glob: _count(names, glob) for glob in (f"*{end}", end, f"*.{end}", f"*_{end}")}
        hits = globs.pop(f"*{end}")
        if hits:
            # Names in which a part begins with the text come first: te1 is meant by te, and attentions is not.
            narrower = {glob: count for glob, count in globs.items() if 0 < count < hits}
            glob = max(narrower, key=narrower.__getitem__, default=f"*{end}")
            hits = narrower.get(glob, hits)
            # Letters inside of words are hardly meant.
            doubt = "" if any(globs.values()) else f"no part of a name begins with {middle!r:.60}; "
            return f"{doubt}{glob!r} matches {hits} module{'s' * (hits != 1)}"
    if not _WILD & {*middle} and is_near(middle, names):
        return f"the nearest names are {nearest(text, names)}"
    kinds = f"the kinds of modules are {some(sorted({*map(kind, names)}, key=natural_key))}"
    return f"no name contains {middle!r:.60}; {kinds}" if middle else kinds


def _count(names: Sequence[str], glob: str) -> int:
    """The number of names that a glob matches."""
    with Clock().running(f"the glob {glob!r}", fix=FEWER_GLOBS):
        return sum(matches(name, glob) for name in names)
