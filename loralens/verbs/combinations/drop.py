"""The verb ``drop``: writes an adapter without some of its modules."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from loralens.core.adapter import Adapter
from loralens.core.selection import select
from loralens.errors import OptionError, place
from loralens.exports import takes_options
from loralens.tables.numbers import count
from loralens.tables.table import Column, Keys, Table
from loralens.verbs.combinations.combine import form_of, read_source
from loralens.verbs.files.convert import COLUMNS, NamedModule
from loralens.verbs.files.factor_rounding import RoundingCost, round_factors
from loralens.verbs.files.target import Target, Written
from loralens.verbs.shared.adapters import AdapterSource, find_source, labels, sources
from loralens.verbs.shared.option_values import Blocks, numpy_dtype, weights_by_module
from loralens.verbs.shared.options import BlockWeights, ModuleChoice, Reading, Writing


@dataclass(frozen=True, slots=True, repr=False)
class DropResult(Written):
    """An adapter without some of its modules.

    Attributes
    ----------
    source : str
        The path of the adapter, or the name of an object in messages.
    before, adapter : Adapter
        The whole adapter, and the remaining one as it is written.
    format : str
        The dialect of the result.
    rounding : RoundingCost
        The error that rounding adds to the remaining modules.
    """

    source: str
    before: Adapter
    adapter: Adapter
    format: str
    rounding: RoundingCost
    target: Target

    @property
    def dropped(self) -> list[str]:
        """The names of the dropped modules, in natural order."""
        return [name for name in self.before if name not in self.adapter]

    def listing(self) -> list[Table[NamedModule]]:
        """All modules, also the dropped ones. On a terminal the sentence with the counts is enough."""
        dropped: Column[NamedModule] = Column("dropped", lambda row: row[0] not in self.adapter, "dropped")
        title = f"{self.source}: {len(self.dropped)} of {len(self.before)} modules dropped"
        return [Table(title, (*COLUMNS, dropped), list(self.before.items()))]

    def conclusion(self) -> list[str]:
        """How many modules were dropped, and how many are left."""
        dropped = f"{self.source} without {len(self.dropped)} of its {count(len(self.before), 'module')}"
        return [self.target.conclusion(f"{dropped}; {len(self.adapter)} left ({self.format})")]

    def sentences(self) -> list[str]:
        """The error of rounding."""
        return [str(self.rounding)] if self.rounding.worst else []

    @classmethod
    def json_keys(cls) -> Keys:
        """The keys of the JSON object."""
        return (
            "source",
            Column("target", "target.written"),
            "format",
            Column("dropped", lambda result: sorted(result.dropped), type=list[str]),
            Column("left", "adapter.len", type=int),
            "rounding",
        )


@takes_options
def drop(
    adapter: AdapterSource,
    modules: str | Sequence[str] = (),
    *,
    blocks: BlockWeights,
    block: Blocks = (),
    writing: Writing,
    reading: Reading,
) -> DropResult:
    """Write an adapter without the modules that match a glob pattern, to see what they contribute.

    The other modules keep their stored bits. What belongs to a dropped module (a magnitude of DoRA, a bias on B) is
    dropped with it; heads and other tensors that were trained in full stay. With ``preset`` or ``block_weights``, the
    blocks of an image model that have the weight 0 are left out.

    Parameters
    ----------
    adapter : path or Adapter
    modules : str or sequence of str
        Leave out the modules whose name or kind matches this glob pattern, or has it as whole parts.
    block : int, str or sequence of them
        Leave out these blocks: 3, 4-8, or IN04 of an image model; with ``modules``, what both choose.
    blocks : BlockWeights
        The options ``preset``, ``block_weights``.
    writing : Writing
        The options ``output``, ``to``, ``base``, ``dtype``, ``allow_loss``, ``overwrite``, ``dry_run``.
    reading : Reading
        The options ``format``, ``alpha``, ``scale``, ``once``.

    Raises
    ------
    OptionError
        A glob pattern matches no module, nothing or everything would be dropped, a weight of a block is neither 0 nor
        1, the output overlaps with the source, or rounding
        costs too much.
    FormatError
        The file is not an adapter.

    Examples
    --------
    $ loralens drop adapter -m v_proj -o without-v
    """
    writing.check()
    target = Target.of(writing.output, overwrite=writing.overwrite, dry_run=writing.dry_run)
    original = find_source(*sources([[adapter]]))
    (label,) = labels([original])
    # As in the other verbs that combine: --alpha only counts if the file does not state its own.
    before = read_source(original, label, reading, writing.base)
    form = form_of(before, target, to=writing.to, base=writing.base)
    # The target is checked before the work, as in the other verbs.
    form.check_target(target, original)
    with place(label):
        gone = _to_drop(before, ModuleChoice(modules=modules, block=block).globs, blocks)
        # No reader accepts an adapter without modules.
        if len(gone) == len(before):
            raise OptionError("nothing would be left", fix="give a glob that some modules do not match")
    # A weight that was saved in full replaces that of the base, whatever else was trained in the module.
    extra = {key: each for key, each in before.extra.items() if each.module not in gone or each.role == "saved"}
    remaining = replace(before.without(gone), extra=extra)
    new = round_factors(remaining, numpy_dtype(writing.dtype))
    with place(label):
        cost = RoundingCost.between(remaining, new.modules, allow_loss=writing.allow_loss, dtype=writing.dtype)
    if target.output is not None:
        with place(target.output):
            written = form.encode(new)
        target.write(*written)
    return DropResult(label, before, new, form.name, cost, target)


def _to_drop(adapter: Adapter, globs: Sequence[str], blocks: BlockWeights) -> set[str]:
    """The modules that are left out."""
    weights = weights_by_module(adapter, blocks.preset, blocks.block_weights)
    if weights is None and not globs:
        raise OptionError(
            "nothing says what to drop", fix="give --modules GLOB, --block, --preset NAME or --block-weights"
        )
    weights = weights or {}
    between = sorted(set(weights.values()) - {0.0, 1.0})
    if between:
        what = f"a block has the weight {between[0]:g}, and drop leaves a block out (0) or keeps it (1)"
        raise OptionError(what, fix="use loralens scale for other weights")
    named = set(select(adapter, globs)) if globs else set()
    return named | {name for name, weight in weights.items() if weight == 0}
