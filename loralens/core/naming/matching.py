"""Names of an adapter's modules against the names of a base model's weights.

Tried in this order, and accepted only if every module finds exactly one weight of a fitting shape:

1. the names as they are;
2. one edit common to all modules: leading parts dropped, or a prefix found in the base put before them;
3. the names under which the base is stored, where these are not those of its modules, and experts that are stored
   one by one or all together (`loralens.core.naming.storage`), with one edit as above;
4. the normal form, in which kohya's underscores and dots are the same: ``lora_unet_a_b_0_c`` is ``a.b.0.c``, and
   ``lora_te2_`` is ``text_encoder_2.``.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import TypeVar, final

from loralens.core.names import expert, natural_key, nearest, weight_name
from loralens.core.naming.normal_form import bare_form, encoder, inner_form, may_be_same, normal_form
from loralens.core.naming.storage import Place, Shape, Slot, Storage, interleaved, slots
from loralens.errors import MismatchError

__all__ = ["Match", "Shape", "fits", "match", "normal_form", "same_modules"]

Rename = Callable[[str], str]
Form = TypeVar("Form", bound=Hashable)
Forms = tuple[Callable[[str], Hashable], ...]
MOST_DROPPED = 16  # leading parts; prefixes of the field's formats have at most four
MOST_LEADS = 64  # prefixes of the base that are tried; real ones have one or two
_STATED: Forms = (  # ways to read a name along with the text encoder that it states
    lambda name: (encoder(name), inner_form(name)),
    lambda name: (number := encoder(name), bare_form(name) if number else inner_form(name)),
)
_FORMS: Forms = (*_STATED, inner_form, bare_form)  # the last two where one name states none: a base of one encoder
_AS_STORED = "reading names as the base is stored"


@final
@dataclass(frozen=True, slots=True)
class Match:
    """Which weight of the base each module adapts.

    Attributes
    ----------
    keys : mapping of str to str
        Module name → key of the weight in the base checkpoint; of the first one, where it lies in several.
    edit : str
        What was done to the names, in words; empty where nothing was.
    rename : callable
        The name in the base of any other module that the adapter speaks of: the same edit; where names were read by
        their normal form, the one name in the base of that form, else the name as it is.
    places : mapping of str to tuple of Place
        Of the modules whose weight is no whole stored tensor of that name: what of which tensors it is, in the order
        of its outputs.
    """

    keys: Mapping[str, str]
    edit: str
    rename: Rename = str
    places: Mapping[str, tuple[Place, ...]] = field(default_factory=dict)

    @property
    def by_storage(self) -> bool:
        """Whether the base is stored under other names, or in other pieces, than its modules have."""
        return self.edit.startswith(_AS_STORED)

    def __str__(self) -> str:
        count = len(self.keys)
        return f"{count}/{count} modules match" + (f" after {self.edit}" if self.edit else "")


def match(
    modules: Mapping[str, Shape],
    base: Mapping[str, Shape],
    *,
    allow_missing: bool = False,
    storage: Storage | None = None,
) -> Match:
    """Which weight of the base each module adapts.

    Parameters
    ----------
    modules : mapping of str to tuple of int
        Module name → (out, in) of its update.
    base : mapping of str to tuple of int
        Key → shape of every tensor of the base checkpoint.
    allow_missing : bool
        Leave out modules without a weight: the edit that finds most of them is taken. One at least must be found.
    storage : Storage, optional
        Of the base, for one that is matched many times.

    Raises
    ------
    MismatchError
        Some module finds no weight, or several; the message holds the nearest names.
    """
    best = Match({}, "")
    for edit, rename in _edits(modules, base):
        keys = {name: _weight_key(rename(name), shape, base) for name, shape in modules.items()}
        candidate = Match({name: key for name, key in keys.items() if key}, edit, rename)
        # The first edit that fits all modules wins: edits are ordered from the least to the most change.
        if len(candidate.keys) == len(modules):
            return candidate
        best = max(best, candidate, key=lambda option: len(option.keys))
    for stored in _by_storage(modules, base, storage or Storage(base)):
        best = max(best, stored, key=lambda option: len(option.keys))
        if len(stored.keys) == len(modules):
            return stored
    by_form = Match(_by_normal_form(modules, base), "reading underscores as dots", _form_reader(base))
    best = max(best, by_form, key=lambda option: len(option.keys))
    if len(by_form.keys) == len(modules) or (allow_missing and best.keys):
        return best
    raise _no_match_error(modules, base, best)


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
    """Leading dotted parts common to all names, the last part of each left alone; `MOST_DROPPED` at most."""
    paths = [name.split(".", MOST_DROPPED)[:-1] for name in names]
    shared: list[str] = []
    for parts in zip(*paths, strict=False):
        # The first part in which names differ belongs to the modules themselves.
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return shared


def _prefixes(names: list[str], base: Mapping[str, Shape]) -> list[str]:
    """Prefixes under which the first module stands in the base, shortest first; `MOST_LEADS` at most."""
    if not names:
        return []
    first = weight_name(names[0])
    ends = (f".{first}.weight", f".{first}")
    prefixes = {key[: -len(end) + 1] for key in base for end in ends if key.endswith(end)}
    return sorted(prefixes, key=lambda lead: (len(lead), natural_key(lead)))[:MOST_LEADS]


def _weight_key(name: str, shape: Shape, base: Mapping[str, Shape]) -> str | None:
    """The base's key of a module's weight, if its shape fits."""
    plain = weight_name(name)
    for key in (f"{plain}.weight", plain):
        if key in base and fits(shape, base[key], expert=plain != name):
            return key
    return None


def fits(update: Shape, weight: Shape, *, expert: bool) -> bool:
    """Whether ΔW (out, in) is an update of a stored weight: itself, transposed, a convolution, or a matrix of a stack.

    Of a stack of several it is that only as an ``expert``, which has a number in its name.
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
            return storage.places([Slot(rename(slot.name), slot.expert) for slot in slots(name)])

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
                if len(module_places) > 1 or first.parts > 1 or first.number != _number(name):
                    parts[name] = module_places
        yield Match(keys, " and ".join(filter(None, (_AS_STORED, edit))), home, parts)


def _number(name: str) -> int | None:
    stacked = expert(name)
    return stacked.number if stacked else None


def _fits_places(update: Shape, places: tuple[Place, ...], base: Mapping[str, Shape]) -> bool:
    """Whether ΔW (out, in) is an update of what lies in these places."""
    first = places[0]
    shapes = [base[place.key] if place.number is None else base[place.key][1:] for place in places]
    if len(places) == 1 and first.parts == 1:
        return fits(update, shapes[0], expert=False)
    # Only matrices can be put below each other or divided.
    if any(len(shape) != 2 for shape in shapes):
        return False
    if len(places) == 1:
        return bool(part_axes(update, shapes[0], first.parts, alternate=interleaved(first.key, base)))
    rows, widths = sum(shape[0] for shape in shapes), {shape[1] for shape in shapes}
    are_whole = all(place.parts == 1 for place in places)
    return are_whole and len(widths) == 1 and (rows, *widths) in (update, update[::-1])


def part_axes(update: Shape, matrix: Shape, parts: int, *, alternate: bool) -> list[int]:
    """Along which axes of a stored matrix its outputs may lie, if ΔW (out, in) is an update of one part of them.

    The likelier first. Of parts that ``alternate`` it is known that they lie along the columns.
    """
    rows, columns = matrix
    axes = []
    if not alternate and rows % parts == 0 and (rows // parts, columns) in (update, update[::-1]):
        axes.append(0)
    if columns % parts == 0 and (columns // parts, rows) == update:
        axes.append(1)
    return axes


def _form_reader(base: Iterable[str]) -> Rename:
    """From a name to the one module of the base that has one of its forms."""
    names = {key.rpartition(".")[0] for key in base}
    alone = [(form, _unique_forms(names, form)) for form in _FORMS]

    def rename(name: str) -> str:
        likely = (same.get(form(name)) for form, same in alone)
        return next((module for module in likely if module and may_be_same(name, module)), name)

    return rename


def _unique_forms(names: Iterable[str], form: Callable[[str], Form]) -> dict[Form, str]:
    """Form → the name that has it, where no other of ``names`` has it too."""
    forms: dict[Form, list[str]] = {}
    for name in names:
        forms.setdefault(form(name), []).append(name)
    return {same: alike[0] for same, alike in forms.items() if len(alike) == 1}


def same_modules(first: Iterable[str], second: Iterable[str]) -> dict[str, str]:
    """Names of the first adapter → names that the second has for the same modules.

    By name, else by normal form, else by slots, where one name of either side has them; in the order of ``first``. The
    others are left out. Layers of two text encoders are never the same.
    """
    first, second = list(first), set(second)
    pairs = {name: name for name in first if name in second}
    forms: Forms = (*_STATED, inner_form, slots)
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
    """Keys by each of the forms, of the modules that find exactly one.

    A base that is one text encoder alone is no two of an adapter: what two of them find is left out.
    """
    matches: dict[str, str] = {}
    for form in _FORMS:
        forms: dict[Hashable, list[str]] = {}
        for key in base:
            forms.setdefault(form(key.removesuffix(".weight")), []).append(key)
        for name, shape in modules.items():
            plain = weight_name(name)
            keys = [key for key in forms.get(form(plain), []) if may_be_same(plain, key)]
            keys = [key for key in keys if fits(shape, base[key], expert=plain != name)]
            if len(keys) == 1:
                matches.setdefault(name, keys[0])
    encoders: dict[str, set[int]] = {}
    for name, key in matches.items():
        encoders.setdefault(key, set()).add(encoder(name))
    # Two encoders of the adapter cannot both be the one encoder of this base.
    return {name: key for name, key in matches.items() if len(encoders[key]) == 1}


def _no_match_error(modules: Mapping[str, Shape], base: Mapping[str, Shape], best: Match) -> MismatchError:
    """The error that says which modules find no weight under the edit that finds most."""
    missing = [name for name in modules if name not in best.keys]
    renames = [best.rename, *(rename for _, rename in _edits(modules, base)), _form_reader(base)]
    name = missing[0]
    for rename in renames:
        sought = weight_name(rename(name))
        same = next((key for key in (f"{sought}.weight", sought) if key in base), None)
        if same:
            what = f"{name} is {modules[name]} here and {base[same]} in the base ({same}): another model"
            return MismatchError(what, fix="give the base that the adapter was trained on")
    what = f"{len(missing)} of {len(modules)} modules have no weight in the base, {name} among them"
    weights = [key.removesuffix(".weight") for key in base if key.endswith(".weight")]
    return MismatchError(what, fix=f"the nearest names there are {nearest(weight_name(best.rename(name)), weights)}")
