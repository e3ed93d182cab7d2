"""The base model that the names and shapes of modules show."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, final

from loralens.core.image_models import likely_models
from loralens.fleet.bases.architectures import NUMBER, STYLES, KnownBase, bare_base_name, known_bases
from loralens.fleet.catalogue.members import Signature


@final
@dataclass(frozen=True, slots=True)
class Identification:
    """What names and shapes say about the base model.

    Attributes
    ----------
    name : str
        The base, or empty if several or none fit.
    candidates : tuple of str
        Every base of the table whose weights have these names and shapes, best first; none if no base fits.
    """

    name: str
    candidates: tuple[str, ...] = ()


class BlockModule(NamedTuple):
    """A module in a block: its name with ``#`` for numbers, the number of its block, and its shape."""

    pattern: str
    block: int
    shape: tuple[int, int]


def identify_base(signature: Signature) -> Identification:
    """The base model that the table of known bases gives for names and shapes.

    A base fits if it has every module of the adapter that is in a block, with its shape. The name is given only if
    exactly one of the bases that fit has its last block among those of the adapter. An adapter with no module in the
    last block could also be for a larger base that the table does not have.
    """
    image = likely_models(dict(zip(signature.names, signature.shapes, strict=True)))
    if image:
        names = tuple(model.name for model in image)
        return Identification(names[0] if len(names) == 1 else "", names)
    modules = block_modules(signature)
    fitting = [base for base in known_bases() if fits(base, modules)]
    last = _last_block(modules)
    complete = [base.name for base in fitting if base.blocks == last + 1]
    larger = [base.name for base in fitting if base.blocks > last + 1]
    return Identification(complete[0] if len(complete) == 1 else "", (*complete, *larger))


def block_modules(signature: Signature) -> list[BlockModule]:
    """The modules that are in blocks; heads and embeddings are not, as their sizes depend on task and vocabulary."""
    modules = []
    for name, shape in zip(signature.names, signature.shapes, strict=True):
        number = NUMBER.search(name)
        if number:
            modules.append(BlockModule(NUMBER.sub("#", name), int(number[0][:9]), shape))
    return modules


def fits(base: KnownBase, modules: list[BlockModule]) -> bool:
    """Whether a base has all these modules, with their shapes; no module fits no base."""
    shapes, prefix = _shapes(base), _prefix(base.style)
    return bool(modules) and all(
        module.block < base.blocks and shapes.get(prefix.sub("", module.pattern, count=1)) == module.shape
        for module in modules
    )


@cache
def _shapes(base: KnownBase) -> dict[str, tuple[int, int]]:
    return base.shapes()


@cache
def _prefix(style: str) -> re.Pattern[str]:
    return re.compile(f"^{STYLES[style].prefix}")


def infer_bases(signatures: Mapping[str, Signature], named: Mapping[str, Counter[str]]) -> Mapping[str, str]:
    """Digest of a signature → the base model that it shows; signatures that show none are left out.

    The table of known bases comes first. Where it does not decide, the neighbours do: adapters that name their base,
    have the same last block, and have a module in common by name (with the prefix of the model) and shape. They decide
    if they name exactly one base. If bases of the table fit, only these count.

    Parameters
    ----------
    signatures : mapping of str to Signature
        By their digests.
    named : mapping of str to Counter of str
        Digest → how many adapters with this signature name each base.
    """
    inferred = {}
    neighbours = _Neighbours({digest: signatures[digest] for digest in named if digest in signatures}, named)
    for digest, signature in signatures.items():
        identification = identify_base(signature)
        name = identification.name or neighbours.base_of(signature, identification)
        if name:
            inferred[digest] = name
    return inferred


@final
class _Neighbours:
    """The bases that adapters name, by the last block of their signature and by their modules."""

    def __init__(self, signatures: Mapping[str, Signature], named: Mapping[str, Counter[str]]) -> None:
        # An adapter with another last block is for another size of the model, or for another part of the same one.
        self._bases: dict[tuple[int, BlockModule], set[str]] = defaultdict(set)
        for digest, signature in signatures.items():
            # A name that the modules contradict says nothing about them.
            if bases := {base_name(base) for base in named[digest] if not contradicts(base, signature)}:
                modules = block_modules(signature)
                last = _last_block(modules)
                for module in modules:
                    self._bases[last, module] |= bases

    def base_of(self, signature: Signature, identification: Identification) -> str:
        """The one base that the neighbours of `infer_bases` name; empty if they name none or several."""
        modules = block_modules(signature)
        last = _last_block(modules)
        bases = {base for module in modules for base in self._bases.get((last, module), ())}
        if identification.candidates:
            bases &= set(identification.candidates)
        return bases.pop() if len(bases) == 1 else ""


def _last_block(modules: Sequence[BlockModule]) -> int:
    return max((module.block for module in modules), default=-1)


@cache
def base_name(base: str) -> str:
    """The name of a base in the table, if exactly one row is called so; otherwise its plain name."""
    rows = [row.name for row in known_bases() if row.is_called(base)]
    return rows[0] if len(rows) == 1 else bare_base_name(base)


def contradicts(base: str, signature: Signature) -> str:
    """Why an adapter with these names and shapes cannot belong to the base of this name; empty if it can.

    Only bases that the table knows can be contradicted.
    """
    rows = [row for row in known_bases() if row.is_called(base)]
    modules = block_modules(signature)
    if not rows or not modules or any(fits(row, modules) for row in rows):
        return ""
    row = rows[0]
    shapes, prefix = _shapes(row), _prefix(row.style)
    for module in modules:
        own = shapes.get(prefix.sub("", module.pattern, count=1))
        if own is None:
            return f"{row.name} has no module {module.pattern}"
        if own != module.shape:
            return f"{module.pattern} is {module.shape[0]} × {module.shape[1]}, and {own[0]} × {own[1]} in {row.name}"
    return f"it has block {max(module.block for module in modules)}, and {row.name} has {row.blocks} blocks"
