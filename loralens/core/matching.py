"""Matching the names of an adapter's modules with the names of a base model's weights.

Methods are tried in this order. One is accepted only if every module finds exactly one weight with a fitting shape:

1. the names as they are;
2. one edit of all names: leading parts are dropped, or a prefix that occurs in the base is added;
3. the names under which the base is stored, if they differ from those of its modules, including experts that are
   stored one by one or all together (`loralens.core.matching`), with one edit as in 2;
4. the normal form, in which kohya's underscores are equal to dots: ``lora_unet_a_b_0_c`` is ``a.b.0.c``, and
   ``lora_te2_`` is ``text_encoder_2.``.
"""

import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from typing import NamedTuple, TypeVar, final

from loralens.core.names import (
    bare_form,
    encoder,
    expert,
    inner_form,
    may_be_same,
    natural_key,
    nearest,
    normal_form,
    weight_name,
)
from loralens.errors import MismatchError

Shape = tuple[int, ...]

RENAMED = (  # expression → its replacement in the common spelling; applied in this order
    # A language model inside a model of images and text stands one level higher or lower.
    (r"^(?:(?:model|language_model|backbone)\.)+", ""),
    (r"\b(vision_tower|image_tower|video_tower)\.vision_model\.", r"\1."),
    # Mixtral, Phi-3.5-MoE, MiniMax: ``block_sparse_moe`` on disk and ``mlp`` in memory.
    (r"\.block_sparse_moe\.", ".mlp."),
    # The router: ``gate`` of Mixtral and Qwen, ``router.layer`` of Granite on disk.
    (r"\.(mlp|feed_forward|ffn)\.(?:gate|router\.gate|router\.layer)$", r".\1.router"),
    # The head of GPT-NeoX on disk.
    (r"^embed_out$", "lm_head"),
    # mlx-lm, and Granite on disk.
    (r"\.switch_mlp\.", ".experts."),
    (r"\.mlp\.input_linear$", ".mlp.experts.gate_up_proj"),
    (r"\.mlp\.output_linear$", ".mlp.experts.down_proj"),
    # ViT and the models built like it, DINOv2, Swin.
    (r"(^|\.)encoder\.layer\.(\d+)\.", r"\1layers.\2."),
    (r"\.attention\.(?:attention|self)\.(query|key|value)$", lambda parts: f".attention.{parts[1][0]}_proj"),
    (r"\.attention\.output\.dense$", ".attention.o_proj"),
    (r"\.intermediate\.dense$", ".mlp.fc1"),
    (r"\.output\.dense$", ".mlp.fc2"),
    (r"\.mlp\.weights_out$", ".mlp.down_proj"),
)  # fmt: skip
EXPERT_PARTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}  # Mixtral's names → those of all others
FUSED = (  # end of a name → the ends of the names of its parts, in the order of the rows; parts have the same size
    (".experts.gate_up_proj", (".experts.gate_proj", ".experts.up_proj")),
    (".mlp.weights_in", (".mlp.gate_proj", ".mlp.up_proj")),  # DINOv2 with SwiGLU
)
_EXPERT_ALONE = re.compile(r"^(?P<stack>.+\.experts)\.(?P<number>\d{1,9})\.(?P<part>\w+)$")
_RENAMED = tuple((re.compile(expression), new) for expression, new in RENAMED)


class MatrixSlot(NamedTuple):
    """One matrix of a network: its name in the common spelling, and the number of its expert."""

    name: str
    expert: int | None = None


class Place(NamedTuple):
    """The location of a slot in the base.

    Attributes
    ----------
    key : str
        The key of the tensor in the base.
    number : int or None
        The number of the matrix, if the tensor is a stack.
    part, parts : int
        The slot is part number ``part`` of ``parts`` equal parts of the outputs of that matrix.
    """

    key: str
    number: int | None = None
    part: int = 0
    parts: int = 1


# Large checkpoints with separate experts have tens of thousands of tensors, and each name is read several times.
@lru_cache(maxsize=1 << 17)
def slots(name: str) -> tuple[MatrixSlot, ...]:
    """The slots of a module, or of a stored tensor without its ``.weight``, in the order of its outputs."""
    number, path = None, name
    alone, stacked = _EXPERT_ALONE.match(name), expert(name)
    if stacked:
        path, number = stacked
    elif alone:
        part = EXPERT_PARTS.get(alone["part"], alone["part"])
        path, number = f"{alone['stack']}.{part}", int(alone["number"])
    # In order: `.attention.output.dense` has to be replaced before the shorter `.output.dense`.
    for expression, new in _RENAMED:
        path = expression.sub(new, path)
    for end, parts in FUSED:
        if path.endswith(end):
            return tuple(MatrixSlot(path.removesuffix(end) + part, number) for part in parts)
    return (MatrixSlot(path, number),)


@final
class Storage:
    """The slots of a base and their locations.

    Parameters
    ----------
    base : mapping of str to tuple of int
        Key → shape of every tensor.
    """

    __slots__ = ("_base", "_places")

    def __init__(self, base: Mapping[str, Shape]) -> None:
        self._base = base
        self._places: dict[MatrixSlot, list[Place]] = {}
        for key in base:
            tensor_slots = slots(key.removesuffix(".weight"))
            for part, slot in enumerate(tensor_slots):
                self._places.setdefault(slot, []).append(Place(key, None, part, len(tensor_slots)))

    @property
    def names(self) -> Mapping[str, Shape]:
        """The name of every slot → the shape of a tensor that contains it."""
        return {slot.name: self._base[places[0].key] for slot, places in self._places.items()}

    def places(self, module_slots: Sequence[MatrixSlot]) -> tuple[Place, ...]:
        """The places in which these slots of one module are stored; empty if a slot has no place, or several."""
        slot_places = [self._place(slot) for slot in module_slots]
        places = tuple(place for place in slot_places if place is not None)
        # A module without one of its parts cannot be adapted.
        if len(places) < len(module_slots):
            return ()
        first = places[0]
        # All parts of one tensor in their order are the tensor itself.
        if places == tuple(first._replace(part=part, parts=len(places)) for part in range(len(places))):
            return (Place(first.key, first.number),)
        return places

    def _place(self, slot: MatrixSlot) -> Place | None:
        candidates = self._places.get(slot, [])
        # The name of a stack does not contain the number of an expert. Only a tensor with three axes can be a stack.
        if not candidates and slot.expert is not None:
            stacks = self._places.get(MatrixSlot(slot.name), [])
            candidates = [p._replace(number=slot.expert) for p in stacks if len(self._base[p.key]) == 3]
        # With two candidates the name does not decide, so the slot has no place.
        return candidates[0] if len(candidates) == 1 else None


def is_interleaved(key: str, base: Iterable[str]) -> bool:
    """Whether gate and up alternate in a stored stack, as in gpt-oss, which is recognised by the biases of experts."""
    return key.endswith("experts.gate_up_proj") and f"{key}_bias" in base


__all__ = ["Match", "Shape", "match", "normal_form", "same_modules", "shape_fits"]

Rename = Callable[[str], str]
Form = TypeVar("Form", bound=Hashable)
Forms = tuple[Callable[[str], Hashable], ...]
MOST_DROPPED = 16  # most leading parts to drop; prefixes of known formats have at most four
MOST_LEADS = 64  # most prefixes of the base to try; real bases have one or two
_STATED: Forms = (  # forms of a name that include the text encoder that it states
    lambda name: (encoder(name), inner_form(name)),
    lambda name: (number := encoder(name), bare_form(name) if number else inner_form(name)),
)
_FORMS: Forms = (*_STATED, inner_form, bare_form)  # the last two are for a base that is one encoder and states none
_AS_STORED = "reading names as the base is stored"


@final
@dataclass(frozen=True, slots=True)
class Match:
    """The weight of the base that each module adapts.

    Attributes
    ----------
    keys : mapping of str to str
        Module name → key of the weight in the base checkpoint, or of the first tensor if the weight is in several.
    edit : str
        The edit of the names, in words; empty if there was none.
    rename : callable
        Gives the name in the base of any other module that the adapter mentions. It applies the same edit. If names
        were matched by their normal form, it returns the only name in the base of that form, or else the name itself.
    places : mapping of str to tuple of Place
        For modules whose weight is not a whole stored tensor of that name: the places of its parts, in the order of the
        outputs.
    """

    keys: Mapping[str, str]
    edit: str
    rename: Rename = str
    places: Mapping[str, tuple[Place, ...]] = field(default_factory=dict)

    @property
    def by_storage(self) -> bool:
        """Whether the base is stored with other names or another division than its modules."""
        return self.edit.startswith(_AS_STORED)

    def __str__(self) -> str:
        count = len(self.keys)
        return f"{count}/{count} modules match" + (f" after {self.edit}" if self.edit else "")


def match(modules: Mapping[str, Shape], base: Mapping[str, Shape], *, allow_missing: bool = False) -> Match:
    """Find the weight of the base that each module adapts.

    Parameters
    ----------
    modules : mapping of str to tuple of int
        Module name → (out, in) of its update.
    base : mapping of str to tuple of int
        Key → shape of every tensor of the base checkpoint.
    allow_missing : bool
        Leave out modules without a weight. The edit that finds most modules is used, and at least one must be found.

    Raises
    ------
    MismatchError
        A module matches no weight or several. The message contains the nearest names.
    """
    # The match that finds the most modules so far. If no match finds all of them, the error is about this match.
    best = Match({}, "")
    for attempt in _attempts(modules, base):
        # The first that fits all modules wins: they are ordered from the least to the most change.
        if len(attempt.keys) == len(modules):
            return attempt
        best = max(best, attempt, key=lambda option: len(option.keys))
    if allow_missing and best.keys:
        return best
    raise _no_match_error(modules, base, best)


def _attempts(modules: Mapping[str, Shape], base: Mapping[str, Shape]) -> Iterator[Match]:
    for edit, rename in _edits(modules, base):
        keys = {name: _weight_key(rename(name), shape, base) for name, shape in modules.items()}
        yield Match({name: key for name, key in keys.items() if key}, edit, rename)
    yield from _by_storage(modules, base, Storage(base))
    # Last, because a normal form is the same for names that differ in dots and underscores alone.
    yield Match(_by_normal_form(modules, base), "reading underscores as dots", _form_reader(base))


def _edits(modules: Iterable[str], base: Mapping[str, Shape]) -> Iterable[tuple[str, Rename]]:
    """No edit, then dropping leading parts that all modules share, then adding a prefix that the base has."""
    names = list(modules)
    yield "", lambda name: name
    shared = _shared_parts(names)
    for count in range(1, len(shared) + 1):
        lead = ".".join(shared[:count]) + "."
        yield f"dropping {lead!r}", lambda name, lead=lead: name.removeprefix(lead)  # type: ignore[misc]
    for lead in _prefixes(names, base):
        yield f"adding {lead!r}", lambda name, lead=lead: lead + name  # type: ignore[misc]


def _shared_parts(names: list[str]) -> list[str]:
    """The leading dotted parts that all names share, at most `MOST_DROPPED`; the last part of a name never counts."""
    paths = [name.split(".", MOST_DROPPED)[:-1] for name in names]
    shared: list[str] = []
    for parts in zip(*paths, strict=False):
        # The first part in which names differ belongs to the modules themselves.
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return shared


def _prefixes(names: list[str], base: Mapping[str, Shape]) -> list[str]:
    """The prefixes with which the first module occurs in the base, shortest first; at most `MOST_LEADS`."""
    if not names:
        return []
    # One module is enough: the edit has to fit all of them anyway.
    first = weight_name(names[0])
    ends = (f".{first}.weight", f".{first}")
    prefixes = {key[: -len(end) + 1] for key in base for end in ends if key.endswith(end)}
    return sorted(prefixes, key=lambda lead: (len(lead), natural_key(lead)))[:MOST_LEADS]


def _weight_key(name: str, shape: Shape, base: Mapping[str, Shape]) -> str | None:
    """The key of a module's weight in the base, if the shape fits."""
    plain = weight_name(name)
    # `.weight` first; stacks of experts and other parameters are stored under their own name.
    for key in (f"{plain}.weight", plain):
        if key in base and shape_fits(shape, base[key], expert=plain != name):
            return key
    return None


def shape_fits(update: Shape, weight: Shape, *, expert: bool) -> bool:
    """Whether ΔW (out, in) fits a stored weight: as it is, transposed, as a convolution, or as a matrix of a stack.

    In a stack of several matrices it fits only as an ``expert``, which has a number in its name.
    """
    out, in_ = update
    flat = (weight[0], prod(weight[1:])) if weight else ()
    single = weight[1:] if len(weight) == 3 and (expert or weight[0] == 1) else ()
    # Both orientations are accepted here; `weights_of` decides between them.
    return any(candidate in ((out, in_), (in_, out)) for candidate in (weight, flat, single) if candidate)


def _by_storage(modules: Mapping[str, Shape], base: Mapping[str, Shape], storage: Storage) -> Iterable[Match]:
    """Matches by slots, under each edit of their names."""
    slots_of_module = {name: slots(name) for name in modules}
    for edit, rename in _edits((slot.name for own in slots_of_module.values() for slot in own), storage.names):

        def places(name: str, rename: Rename = rename) -> tuple[Place, ...]:
            return storage.places([MatrixSlot(rename(slot.name), slot.expert) for slot in slots(name)])

        def home(name: str, places: Callable[[str], tuple[Place, ...]] = places) -> str:
            module_places = places(name)
            is_whole = len(module_places) == 1 and module_places[0].parts == 1
            return module_places[0].key.removesuffix(".weight") if is_whole else name

        keys: dict[str, str] = {}
        parts: dict[str, tuple[Place, ...]] = {}
        for name, shape in modules.items():
            key = _weight_key(name, shape, base)
            module_places = () if key else places(name)
            if key:
                keys[name] = key
            elif module_places and _fits_places(shape, module_places, base):
                first = module_places[0]
                keys[name] = first.key
                # An expert under its own number needs no place: its number is in its name.
                own = expert(name)
                if len(module_places) > 1 or first.parts > 1 or first.number != (own.number if own else None):
                    parts[name] = module_places
        yield Match(keys, " and ".join(filter(None, (_AS_STORED, edit))), home, parts)


def _fits_places(update: Shape, places: tuple[Place, ...], base: Mapping[str, Shape]) -> bool:
    """Whether the shape (out, in) of ΔW fits the stored parts in these places."""
    first = places[0]
    shapes = [base[place.key] if place.number is None else base[place.key][1:] for place in places]
    if len(places) == 1 and first.parts == 1:
        return shape_fits(update, shapes[0], expert=False)
    # Only matrices can be put below each other or divided.
    if any(len(shape) != 2 for shape in shapes):
        return False
    if len(places) == 1:
        return bool(part_axes(update, shapes[0], first.parts, alternate=is_interleaved(first.key, base)))
    # Whole matrices below each other: their widths must agree, and their heights add up.
    rows, widths = sum(shape[0] for shape in shapes), {shape[1] for shape in shapes}
    are_whole = all(place.parts == 1 for place in places)
    return are_whole and len(widths) == 1 and (rows, *widths) in (update, update[::-1])


def part_axes(update: Shape, matrix: Shape, parts: int, *, alternate: bool) -> list[int]:
    """The axes of a stored matrix that may be its outputs, if ΔW (out, in) is an update of one part of the outputs.

    The more likely axis comes first. Parts that ``alternate`` are always along the columns.
    """
    rows, columns = matrix
    axes = []
    # Rows first, because most models store (out, in).
    if not alternate and rows % parts == 0 and (rows // parts, columns) in (update, update[::-1]):
        axes.append(0)
    if columns % parts == 0 and (columns // parts, rows) == update:
        axes.append(1)
    return axes


def _form_reader(base: Iterable[str]) -> Rename:
    """A function that maps a name to the only module of the base that shares one of its forms."""
    names = {key.rpartition(".")[0] for key in base}
    alone = [(form, _unique_forms(names, form)) for form in _FORMS]

    def rename(name: str) -> str:
        likely = (same.get(form(name)) for form, same in alone)
        return next((module for module in likely if module and may_be_same(name, module)), name)

    return rename


def _unique_forms(names: Iterable[str], form: Callable[[str], Form]) -> dict[Form, str]:
    """Form → the name that has it, for forms that only one of ``names`` has."""
    forms: dict[Form, list[str]] = {}
    for name in names:
        forms.setdefault(form(name), []).append(name)
    return {same: alike[0] for same, alike in forms.items() if len(alike) == 1}


def same_modules(first: Iterable[str], second: Iterable[str]) -> dict[str, str]:
    """Names of the first adapter → names of the same modules in the second, in the order of ``first``.

    Modules are matched by name, then by normal form, then by slots, if only one name of each side has them. Modules
    without a counterpart are left out. Layers of different text encoders are never the same.
    """
    first, second = list(first), set(second)
    pairs = {name: name for name in first if name in second}
    forms: Forms = (*_STATED, inner_form, slots)
    # From the form that changes a name least to the one that changes it most.
    for form in forms:
        if len(pairs) == len(first):
            break
        first_by_form, second_by_form = (
            _unique_forms(set(first) - pairs.keys(), form),
            _unique_forms(second - {*pairs.values()}, form),
        )
        pairs |= {
            name: second_by_form[same]
            for same, name in first_by_form.items()
            if same in second_by_form and may_be_same(name, second_by_form[same])
        }
    return {name: pairs[name] for name in first if name in pairs}


def _by_normal_form(modules: Mapping[str, Shape], base: Mapping[str, Shape]) -> dict[str, str]:
    """The keys of modules that match exactly one weight by one of the forms.

    A base that is a single text encoder cannot be two encoders of an adapter. Keys that modules of two encoders match
    are left out.
    """
    matches: dict[str, str] = {}
    for form in _FORMS:
        forms: dict[Hashable, list[str]] = {}
        for key in base:
            forms.setdefault(form(key.removesuffix(".weight")), []).append(key)
        for name, shape in modules.items():
            plain = weight_name(name)
            # Several keys of one form: the name does not decide between them.
            keys = [key for key in forms.get(form(plain), []) if may_be_same(plain, key)]
            keys = [key for key in keys if shape_fits(shape, base[key], expert=plain != name)]
            if len(keys) == 1:
                matches.setdefault(name, keys[0])
    encoders: dict[str, set[int]] = {}
    for name, key in matches.items():
        encoders.setdefault(key, set()).add(encoder(name))
    # Two encoders of the adapter cannot both be the one encoder of this base.
    return {name: key for name, key in matches.items() if len(encoders[key]) == 1}


def _no_match_error(modules: Mapping[str, Shape], base: Mapping[str, Shape], best: Match) -> MismatchError:
    """The error that names modules without a weight under the edit that matches most."""
    missing = [name for name in modules if name not in best.keys]
    renames = [best.rename, *(rename for _, rename in _edits(modules, base)), _form_reader(base)]
    name = missing[0]
    # A weight of this name and another shape says more than the nearest names: the base is another model.
    for rename in renames:
        sought = weight_name(rename(name))
        same = next((key for key in (f"{sought}.weight", sought) if key in base), None)
        if same:
            what = f"{name} is {modules[name]} here and {base[same]} in the base ({same}): another model"
            return MismatchError(what, fix="give the base that the adapter was trained on")
    what = f"{len(missing)} of {len(modules)} modules have no weight in the base, such as {name}"
    weights = [key.removesuffix(".weight") for key in base if key.endswith(".weight")]
    return MismatchError(what, fix=f"the nearest names there are {nearest(weight_name(best.rename(name)), weights)}")
