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
from math import isfinite

import numpy as np

from loralens.core.image_models import ImageModel, Layer, image_models
from loralens.core.names import block, encoder, encoder_prefix, inner_form, is_near, kind, natural_key, nearest, some
from loralens.errors import OptionError

BLOCK_FORMS = "give a number (3), a range (4-8), or the name of a block of an image model (IN04)"
# One block or a range of blocks: by number, or by the names that block weight tools use.
_NUMBERS = re.compile(r"(?P<first>[0-9]{1,9})(?:-(?P<last>[0-9]{1,9}))?")
_NAMED = re.compile(
    r"(?P<letters>BASE|CLIP|T5|IN|MID|OUT|D|S)(?P<first>[0-9]{1,2})?(?:-(?:IN|OUT|D|S)?(?P<last>[0-9]{1,2}))?"
)
_ALIASES = {"M00": "MID", "M": "MID", "DOUBLE": "D", "SINGLE": "S"}  # what other tools call blocks
_ORDER = ("BASE", "CLIP", "T5", "IN", "MID", "OUT", "D", "S")  # the order in which messages list blocks


def is_block(entry: str) -> bool:
    """Whether a text is a block, or a range of blocks."""
    named = _NAMED.fullmatch(entry.upper())
    # A range needs a first number: IN-IN04 is not a range.
    return bool(_NUMBERS.fullmatch(entry)) or bool(named and (named["first"] or not named["last"]))


def inside_blocks(names: Sequence[str], blocks: str) -> set[str]:
    """The names in any of the blocks.

    Raises
    ------
    OptionError
        A block that no module is in, or numbers for a model whose blocks have names.
    """
    image = image_blocks(names)
    numbered = any(_number(own[0]) >= 0 for own in image.values())
    inside: set[str] = set()
    for entry in blocks.split(","):
        if numbered and entry[:1].isdigit():
            what = f"block {entry} does not exist: the blocks of an image model are chosen by name, not by number"
            raise OptionError(what, fix=f"give one of {_block_names(image)}, or a range of them")
        members = {name for name in names if in_block(entry, name, image.get(name, ()))}
        if not members:
            places = describe_blocks(names) if entry[:1].isdigit() else _block_names(image)
            raise OptionError(f"no module is in block {entry}", fix=f"the modules are in {places}")
        inside |= members
    return inside


def in_block(entry: str, name: str, image: Sequence[str]) -> bool:
    """Whether a module is in one block or range of blocks; ``image`` has the names of its block in an image model."""
    if numbers := _NUMBERS.fullmatch(entry):
        own = block(name)
        first, last = sorted((int(numbers["first"]), int(numbers["last"] or numbers["first"])))
        return own is not None and first <= own.number <= last
    parts = _NAMED.fullmatch(entry.upper())
    if not parts or not image:
        return False
    if parts["first"] is None:
        # IN alone is a block of FLUX, and all blocks IN00, IN01 … of a UNet.
        return any(_letters(own) == parts["letters"] for own in image)
    first, last = sorted((int(parts["first"]), int(parts["last"] or parts["first"])))
    return any(_letters(own) == parts["letters"] and first <= _number(own) <= last for own in image)


def _letters(own: str) -> str:
    """The name of a block without its number; T5 is a name, and the blocks MID0 to MID2 are layers of MID."""
    return own if own == "T5" else own.rstrip("0123456789")


def _number(own: str) -> int:
    """The number of a block; −1 if it has none."""
    return int(own[len(_letters(own)) :] or -1)


def image_blocks(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Module → the names of its block; empty unless the names of all modules are those of one image model."""
    for model in image_models():
        layers = [model.layers_named(name) for name in names]
        if names and all(layers):
            return {name: layer_block_names(found[0]) for name, found in zip(names, layers, strict=True)}
    return {}


def _block_names(image: Mapping[str, Sequence[str]]) -> str:
    """The names of the blocks of these modules, in the order of the model; consecutive blocks are given as ranges."""
    if not image:
        return "no block that has a name; give numbers"
    present: dict[str, set[int]] = {}
    for own in image.values():
        # The widest name: MID and not its layers MID0 to MID2.
        name = own[-1] if own[-1] == "MID" else own[0]
        present.setdefault(_letters(name), set()).update(number for number in [_number(name)] if number >= 0)
    texts = []
    for letters in sorted(present, key=_ORDER.index):
        numbers = sorted(present[letters])
        texts += [f"{letters}{text}" for text in _ranges(numbers, f"-{letters}", width=2)] if numbers else [letters]
    return ", ".join(texts)


def describe_blocks(names: Iterable[str]) -> str:
    """The blocks that modules are in, as text for a message: ``the blocks 0-11 of model.layers``."""
    stacks: dict[str, set[int]] = {}
    for name in names:
        if own := block(name):
            stacks.setdefault(own.stack, set()).add(own.number)
    if not stacks:
        return "no block: their names have no numbers"
    texts = [f"the blocks {', '.join(_ranges(sorted(numbers)))} of {stack}" for stack, numbers in stacks.items()]
    return "; ".join(texts[:4])


def _ranges(numbers: Sequence[int], joint: str = "-", width: int = 1) -> list[str]:
    """Rising numbers as ranges: ``0-3``, ``7``."""
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1)
    return [joint.join(f"{number:0{width}}" for number in dict.fromkeys((run[0], run[-1]))) for run in runs]


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
    entries = [part.strip() for entry in blocks for part in str(entry).split(",")]
    entries = [_ALIASES.get(entry.upper(), entry) for entry in entries]
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
    chosen: set[str] = set()
    for glob in globs:
        chosen |= _select_by_glob(names, called, glob, prefixes=prefixes)
    return [name for name in names if name in chosen]


def _select_by_glob(names: Sequence[str], called: Mapping[str, set[str]], glob: str, *, prefixes: bool) -> set[str]:
    """The names that a glob selects, which are at least one."""
    # The glob is first compared as a whole, because a name may end in a text that looks like an @ with blocks.
    hits = set(called.get(glob, ()))
    pattern, blocks = (glob, "") if hits else _split(glob)
    matched = hits or _matching_names(called, pattern)
    if not matched and prefixes:
        matched = set().union(*(_matching_names(called, wider) for wider in as_parts(names, pattern)))
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


def _matching_names(called: Mapping[str, set[str]], glob: str) -> set[str]:
    """The names that a glob matches; ``called`` maps whole names and kinds to names."""
    # Without wildcards a dictionary is enough.
    if not _WILD & {*glob}:
        return set(called.get(glob, ()))
    pattern = glob.replace("[", "[[]")  # `fnmatch` would read brackets as sets of letters
    return set().union(*(own for name, own in called.items() if fnmatchcase(name, pattern)))


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
    pattern = glob.replace("[", "[[]")  # `fnmatch` would read brackets as sets of letters
    return fnmatchcase(name, pattern) or fnmatchcase(kind(name), pattern)


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


# The words of all programs for a text encoder, which dialects write as lora_te, text_encoder or clip_l.
_ENCODERS = re.compile(r"(?:lora_)?(?:te|text_?encoders?|text_?model|clip|t5(?:xxl)?)(?:[._]?[lgh\d])?")
_INSIDE = 4  # letters that may be meant inside of a word


def suggestion(text: str, names: Sequence[str]) -> str:
    """What to give in place of a glob that matches nothing: a glob of the names that contain it, if there are any."""
    middle = text.strip("*. ")
    kinds = f"the kinds of modules are {some(sorted({*map(kind, names)}, key=natural_key))}"
    if _ENCODERS.fullmatch(middle.lower()):
        starts = dict.fromkeys(f"{start}*" for start in map(encoder_prefix, names) if start)
        if not starts:
            return f"no module is in a text encoder; {kinds}"
        return f"modules of text encoders match {' and '.join(map(repr, starts))}"
    # The same words joined as in other dialects, and in lower case.
    spellings = (middle, middle.replace(".", "_"), middle.replace("_", "."), middle.lower())
    # Behind a number only a whole part of the name is meant: layers.1 is not layers.10.
    ends = (".*", "_*", "*") if middle[-1:].isdigit() else ("*",)
    for end in dict.fromkeys(f"{spelling}{end}" for spelling in spellings for end in ends if spelling):
        globs = {glob: sum(matches(name, glob) for name in names) for glob in (f"*{end}", end, f"*.{end}", f"*_{end}")}
        anywhere = globs.pop(f"*{end}")
        # Names in which a part begins with the text: te1 is meant by te, and attentions is not.
        glob = max(globs, key=globs.__getitem__)
        if globs[glob] == anywhere:
            glob = f"*{end}"
        hits = max(globs.values())
        # A few letters inside of words are not meant.
        if hits or (anywhere and len(middle) >= _INSIDE):
            doubt = "" if hits else f"no part of a name begins with {middle!r:.60}; "
            glob, hits = (glob, hits) if hits else (f"*{end}", anywhere)
            return f"{doubt}{glob!r} matches {hits} module{'s' * (hits != 1)}"
    if not _WILD & {*middle} and is_near(middle, names):
        return f"the nearest names are {nearest(text, names)}"
    return f"no part of a name is {middle!r:.60}; {kinds}" if middle else kinds


Weights = str | Mapping[str, float] | Sequence[float]
BLOCK_WEIGHTS = "give blocks and weights: IN04=0,MID=1,ALL=0.5"
_EVERYTHING = ("ALL", "DEFAULT")


def _numbers(letters: str, *numbers: int) -> list[str]:
    return [f"{letters}{number:02}" for number in numbers]


_SD_17 = ["BASE", *_numbers("IN", 1, 2, 4, 5, 7, 8), "MID", *_numbers("OUT", *range(3, 12))]
_SD_26 = ["BASE", *_numbers("IN", *range(12)), "MID", *_numbers("OUT", *range(12))]
_SD_27 = ["BASE", *_numbers("IN", *range(1, 12)), "MID0", "MID1", "MID2", *_numbers("OUT", *range(12))]
_XL_12 = ["BASE", *_numbers("IN", 4, 5, 7, 8), "MID", *_numbers("OUT", *range(6))]
_XL_20 = ["BASE", *_numbers("IN", *range(9)), "MID", *_numbers("OUT", *range(9))]
_XL_21 = ["BASE", *_numbers("IN", *range(1, 9)), "MID0", "MID1", "MID2", *_numbers("OUT", *range(9))]
_DOUBLE, _SINGLE = _numbers("D", *range(19)), _numbers("S", *range(38))
# For each family, the blocks of each vector, which is recognised by its length. Blocks that a vector does not list get
# 0, as in A1111. With a vector of 20, single blocks get the weight of the last double block, as in the Inspire Pack.
VECTORS: dict[str, tuple[list[str], ...]] = {
    "SD": (_SD_17, _SD_26, _SD_27),
    "SDXL": (_XL_12, _XL_20, _XL_21),
    "FLUX": (
        ["BASE", *_DOUBLE],
        ["BASE", *_DOUBLE, *_SINGLE],
        ["CLIP", "T5", "IN", *_DOUBLE, *_SINGLE, "OUT"],
    ),
}
# name → weights of BASE and of the blocks of the shortest vector in their order, or of blocks by name
PRESETS: dict[str, dict[str, str]] = {
    "SD": {
        "NONE": "ALL=0",
        "ALL": "ALL=1",
        "ALL0.5": "ALL=0.5",
        "INS": "1,1,1,1,0,0,0,0,0,0,0,0,0,0,0,0,0",
        "IND": "1,0,0,0,1,1,1,0,0,0,0,0,0,0,0,0,0",
        "INALL": "1,1,1,1,1,1,1,0,0,0,0,0,0,0,0,0,0",
        "MIDD": "1,0,0,0,1,1,1,1,1,1,1,1,0,0,0,0,0",
        "MIDD0.2": "1,0,0,0,0,0,0.2,0.4,0.4,0.2,0,0,0,0,0,0,0",
        "MIDD0.8": "1,0,0,0,0,0.5,0.8,0.8,0.4,0,0,0,0,0,0,0,0",
        "MOUT": "1,0,0,0,0,0,1,1,1,1,1,1,1,1,0.5,0,0",
        "OUTD": "1,0,0,0,0,0,0,0,1,1,1,1,0,0,0,0,0",
        "OUTS": "1,0,0,0,0,0,0,0,0,0,0,0,1,1,1,1,1",
        "OUTALL": "1,0,0,0,0,0,0,0,1,1,1,1,1,1,1,1,1",
    },
    "SDXL": {
        "NONE": "ALL=0",
        "ALL": "ALL=1",
        "INALL": "1,1,1,1,1,0,0,0,0,0,0,0",
        "MIDALL": "1,0,0,0,0,1,0,0,0,0,0,0",
        "OUTALL": "1,0,0,0,0,0,1,1,1,1,1,1",
    },
    "FLUX": {
        "NONE": "ALL=0",
        "ALL": "ALL=1",
        "DBL-ALL": "ALL=1",
        "DBL-FRONT7": "ALL=0,BASE=1,D00-D06=1",
        "DBL-MID6": "ALL=0,BASE=1,D07-D12=1",
        "DBL-TAIL6": "ALL=0,BASE=1,D13-D18=1,S=1",
        "SINGLE-ALL": "ALL=1,D=0",
        "SINGLE-1TO10": "ALL=0,BASE=1,S00-S09=1",
        "SINGLE-11TO20": "ALL=0,BASE=1,S10-S19=1",
        "SINGLE-21TO30": "ALL=0,BASE=1,S20-S29=1",
        "SINGLE-31TO37": "ALL=0,BASE=1,S30-S37=1",
    },
}


def layer_block_names(layer: Layer) -> tuple[str, ...]:
    """The names of the block that a layer belongs to, the smallest block first: ``MID1``, ``MID``."""
    component, inner, *numbers = layer.original.split(".")
    match inner:
        case "input_blocks" | "output_blocks" | "double_blocks" | "single_blocks":
            letters = {"input_blocks": "IN", "output_blocks": "OUT", "double_blocks": "D", "single_blocks": "S"}[inner]
            return (f"{letters}{int(numbers[0]):02}",)
        case "middle_block":
            return f"MID{numbers[0]}", "MID"
    if component == "text_encoders":
        return "T5" if inner == "t5xxl" else "CLIP", "BASE"
    if not layer.name.startswith("transformer."):
        return ("BASE",)
    return "OUT" if inner == "final_layer" else "IN", "BASE"


def weights_of_modules(
    model: ImageModel, layers: Mapping[str, Layer], *, preset: str | None = None, blocks: Weights | None = None
) -> dict[str, float]:
    """The weight of each module.

    Parameters
    ----------
    model : ImageModel
    layers : mapping of str to Layer
        Module → the layer that it adapts, or the first of them.
    preset : str, optional
        The name of a row of `PRESETS`, with or without the name of its family before it.
    blocks : str, mapping or sequence of float, optional
        ``IN04=0,MID=1``, a mapping with the same names, or all weights in their order. They come after the preset.

    Raises
    ------
    OptionError
        A preset or a block that the model does not have, a vector of another length, or a weight that is not a number.
    """
    family = {"SDXL": "SDXL", "FLUX.1": "FLUX"}.get(model.name, "SD")
    names = {module: layer_block_names(layer) for module, layer in layers.items()}
    # Every name of a block of the model → the smallest blocks that it contains.
    inside: dict[str, list[str]] = {}
    for own in dict.fromkeys(map(layer_block_names, model.layers)):
        for name in own:
            inside.setdefault(name, []).append(own[0])
    present = sorted({own[0] for own in names.values()})
    weights: dict[str, float] = {}
    if preset is not None:
        # The Inspire Pack writes the family before the name: SDXL-INALL.
        preset_weights = PRESETS[family].get(preset.upper().removeprefix(f"{family}-"))
        if preset_weights is None:
            fix = f"choose one of {', '.join(PRESETS[family])}"
            raise OptionError(f"--preset {preset!r} is not a preset for {family}", fix=fix)
        weights = _parse(preset_weights, family, inside, present)
    if blocks is not None:
        weights |= _parse(blocks, family, inside, present)
    return {module: weights.get(own[0], 1.0) for module, own in names.items()}


def _parse(blocks: Weights, family: str, inside: Mapping[str, list[str]], present: Sequence[str]) -> dict[str, float]:
    """The weight of every block that is named; a block that contains others is replaced by these."""
    entries: Sequence[tuple[str, object]]
    if isinstance(blocks, Mapping):
        entries = list(blocks.items())
    elif isinstance(blocks, str) and "=" in blocks:
        parts = [entry.partition("=") for entry in blocks.lstrip("% ").split(",") if entry.strip()]
        if alone := [name for name, equals, _ in parts if not equals]:
            raise OptionError(f"--block-weights has {alone[0].strip()!r}, which is not BLOCK=WEIGHT", fix=BLOCK_WEIGHTS)
        entries = [(name.strip(), value) for name, _, value in parts]
    else:
        # The tools write the name of a preset before its vector: OUTALL:1,0,0…
        numbers = blocks.rpartition(":")[2].split(",") if isinstance(blocks, str) else blocks
        if isinstance(blocks, str) and len(numbers) == 1:
            # Every vector has more numbers. `IN04:0` is meant as the weight of one block.
            raise OptionError(f"--block-weights has {blocks!r:.40}, which is not BLOCK=WEIGHT", fix=BLOCK_WEIGHTS)
        entries = _vector([_weight_of(number) for number in numbers], family, inside)
    counted = isinstance(blocks, str) and blocks.lstrip().startswith("%")
    weights: dict[str, float] = {}
    # An entry for all blocks is applied first, wherever it is written, so that the others are exceptions to it.
    for name, value in sorted(entries, key=lambda entry: entry[0].upper() not in _EVERYTHING):
        chosen = _blocks_by_number(name, present) if counted else _chosen(name, list(inside))
        weights |= dict.fromkeys((block for own in chosen for block in inside[own]), _weight_of(value))
    return weights


def _weight_of(value: object) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = float("nan")
    if not isfinite(number):
        text = str(value).strip()
        random = ": random weights (R, U) and those of sliders (A, B) are not taken" if text.upper() in "RUAB" else ""
        raise OptionError(f"--block-weights has {text!r:.40}, which is not a number{random}", fix=BLOCK_WEIGHTS)
    return number


def _vector(numbers: Sequence[float], family: str, inside: Mapping[str, list[str]]) -> list[tuple[str, float]]:
    """The blocks and their weights in a vector, preceded by the blocks that it does not list."""
    blocks = next((blocks for blocks in VECTORS[family] if len(blocks) == len(numbers)), None)
    if blocks is None:
        lengths = ", ".join(str(len(blocks)) for blocks in VECTORS[family])
        what = f"--block-weights has {len(numbers)} numbers, and vectors for {family} have {lengths}"
        raise OptionError(what, fix="give all numbers of a vector, or blocks by name: BASE=1,OUT=0.5")
    listed = list(zip(blocks, numbers, strict=True))
    if family == "FLUX":
        return [(name, numbers[len(_DOUBLE)]) for name in _SINGLE] + listed
    return [(name, 0.0) for name in inside if name.startswith(("IN", "OUT"))] + listed


def _chosen(text: str, model_blocks: Sequence[str]) -> list[str]:
    """The blocks that an entry names: one, a range, or all whose names begin with letters."""
    name = _ALIASES.get(text.upper(), text)
    chosen = [own for own in model_blocks if name.upper() in _EVERYTHING or in_block(name, "", (own,))]
    if not chosen:
        raise OptionError(f"--block-weights: no block {text!r}", fix=f"the nearest are {nearest(name, model_blocks)}")
    return chosen


def _blocks_by_number(text: str, model_blocks: Sequence[str]) -> list[str]:
    """The blocks of an entry of the Inspire Pack's ``%`` form, whose numbers count the blocks that the adapter has."""
    match = re.match(r"^(default|base|in|mid|out|double|single)(\d+)?(?:-(\d+))?$", text.lower())
    if not match:
        raise OptionError(
            f"--block-weights: no block {text!r}",
            fix="give blocks and weights such as %default=1,in1-3=0,mid=0.5,out2=0",
        )
    kind, first, last = match.groups()
    if kind == "default":
        return list(model_blocks)
    if kind == "base":
        return [name for name in model_blocks if name in ("BASE", "CLIP", "T5", "IN", "OUT")]
    letters = _ALIASES.get(kind.upper(), kind.upper())
    blocks = [name for name in model_blocks if re.fullmatch(rf"{letters}\d+", name)]
    if first is None:
        return blocks
    return blocks[max(0, int(first) - 1) : int(last or first)]
