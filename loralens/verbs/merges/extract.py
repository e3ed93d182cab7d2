"""The verb ``extract``: makes an adapter from the difference of two models."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

from loralens.choices import FLOAT_TYPES, TARGET_FORMATS, FloatType, Noise, TargetFormat
from loralens.core.adapter import Adapter
from loralens.core.messages import note, progress, tell_findings, warn
from loralens.core.model_in_memory import ModelInMemory, ModelPath
from loralens.core.names import some
from loralens.core.ranks import Rule
from loralens.core.threads import processor_count
from loralens.errors import OptionError, place
from loralens.exports import takes_options
from loralens.formats.models.checkpoint import Checkpoint
from loralens.formats.models.transformers_names import use_memory_names
from loralens.merging.checkpoint_difference import NoiseEdge
from loralens.merging.extraction import ExtractedModule, Extraction, extract_adapter
from loralens.tables.numbers import count, fixed, number, percent
from loralens.tables.table import ALWAYS, Column, Columns, Keys, Table, label_column, rows_key, shape_columns
from loralens.verbs.files.output import OutputFormat, Target, Written
from loralens.verbs.shared.adapters import read_checkpoint
from loralens.verbs.shared.options import RULES, ModuleChoice, RankRules, check_choice, numpy_dtype, option_names

ModuleRow = tuple[str, ExtractedModule]  # the name of a module, and the quality of its pair

# The residue is the root mean square of what a pair leaves over, in units of the rounding noise. It is about 1 if only
# rounding is left (0.97 to 0.98 in its page). At 2 the energy is four times that of rounding, so three quarters
# of the energy have another cause.
FULL = 2.0
RENAMED = "modules are called in the adapter as transformers 5 calls them in memory, where PEFT looks for them"
NAMED = 5  # most tensors that a message names; the others are counted


def _measure(key: str, title: str = "", **options: Any) -> Column[ModuleRow]:
    """A column with an attribute of `ExtractedModule`, which is also its key."""
    return Column(key, f"1.{key}", title, **options)


COLUMNS: Columns[ModuleRow] = (
    label_column("name", "module", "0"),
    *shape_columns("1.shape", "out × in"),
    _measure("rank", "r", priority=ALWAYS),
    _measure("frobenius", "‖ΔW‖", text=number, priority=6),
    _measure("relative_error", "error", text=percent, priority=ALWAYS),
    _measure("energy_kept", "energy kept", text=fixed(".2%"), priority=5),
    _measure("svd_error", type=float),
    _measure("noise", type=float),
    Column("residue", "1.residue", "left / noise", number, priority=4),
)
# It has a title only if some module has an edge: without --noise-edge the column would be empty for people.
EDGE_COLUMN: Column[ModuleRow] = Column("noise_edge", "1.edge", priority=2, type=float)


@dataclass(frozen=True, slots=True, repr=False)
class ExtractResult(Written):
    """The adapter between two models, and how well it represents their difference.

    Attributes
    ----------
    base, tuned : str
        The paths of the models.
    format : str
        The dialect of the adapter.
    extraction : Extraction
        The adapter, the quality of its pairs, and the differences that it lacks.
    """

    base: str
    tuned: str
    target: Target
    format: str
    extraction: Extraction

    @property
    def adapter(self) -> Adapter:
        """The extracted adapter."""
        return self.extraction.adapter

    @property
    def modules(self) -> Mapping[str, ExtractedModule]:
        """How well the pair of every module represents its difference."""
        return self.extraction.modules

    def tables(self) -> list[Table[ModuleRow]]:
        """The modules that differ, one per row."""
        edges = any(module.edge is not None for module in self.modules.values())
        edge = replace(EDGE_COLUMN, title="edge", text=number) if edges else EDGE_COLUMN
        return [Table(f"{self.tuned} − {self.base}", (*COLUMNS, edge), list(self.modules.items()))]

    def conclusion(self) -> list[str]:
        """How well the adapter represents the difference of the models."""
        error = percent(self.extraction.relative_error)
        content = f"the difference of {self.tuned} and {self.base} in {count(len(self.modules), 'module')}"
        sentences = [self.target.conclusion(f"{content}, with an error of {error} (‖D−BA‖/‖D‖)")]
        if self.extraction.unchanged:
            sentences.append(f"{count(self.extraction.unchanged, 'module')} unchanged.")
        return sentences

    def sentences(self) -> list[str]:
        """The error of a randomised SVD, and the size of the adapter."""
        extra = self.adapter.extra
        sentences = []
        # 0 for dense SVDs, whose error is rounding.
        randomised = max((module.svd_error for module in self.modules.values()), default=0.0)
        if randomised:
            sentences.append(
                f"svd         randomised: √Σσ² known within {percent(randomised)}; --exact computes dense SVDs"
            )
        sentences.append(f"parameters  {self.adapter.parameters:,}")
        if extra:
            roles = ", ".join(sorted({tensor.role for tensor in extra.values()}))
            sentences.append(f"extra       {len(extra)} tensors kept in full ({roles})")
        return [*sentences, f"format      {self.format}"]

    @classmethod
    def json_keys(cls) -> Keys:
        """The keys of the JSON object."""
        return (
            "base",
            "tuned",
            Column("target", "target.written"),
            "format",
            rows_key("modules", (*COLUMNS, EDGE_COLUMN), source=lambda result: result.tables()[0]),
            *(Column(("total", key), f"extraction.{key}") for key in ("relative_error", "share")),
            Column(("total", "parameters"), "extraction.adapter.parameters"),
            Column(("total", "unchanged"), "extraction.unchanged"),
            Column("extra", lambda result: list(result.extraction.adapter.extra), type=list[str]),
            rows_key(
                "left_out", (Column("key"), Column("why"), Column("frobenius", "norm")), source="extraction.left_out"
            ),
            Column("notes", "extraction.notes"),
        )


@takes_options
def extract(
    base: ModelPath,
    tuned: ModelPath,
    *,
    target: Target,
    rules: RankRules,
    noise_edge: Noise | None = None,
    uniform: bool = False,
    exact: bool = False,
    to: TargetFormat = "peft",
    dtype: FloatType = "f32",
    drop_extra: bool = False,
    selection: ModuleChoice,
) -> ExtractResult:
    """Make an adapter from the difference of two models: of a full fine-tune, or of a merge by another tool.

    One rule of ranks or ``noise_edge`` has to be given. Every weight matrix that differs becomes a pair of factors;
    embeddings only if ``modules`` names them (* for all). Norms, biases and new heads are copied in full. Whatever
    differs and is not in the adapter is listed. Modules have the names of ``tuned``; for PEFT those that transformers 5
    has in memory.

    Parameters
    ----------
    base : path or model
        The base model: a folder, a safetensors or GGUF file, or a Hub id in the local cache.
    tuned : path or model
        The fine-tuned or merged model, in the same forms.
    noise_edge : str, optional
        Instead of a rule, keep the directions whose singular values stand above the noise. 'rounding' is the noise of
        rounding to the dtype of ``tuned``. 'median' estimates unknown noise from the median of all singular values, if
        the difference has full rank. [default without a value: rounding]

        The estimate is that of Gavish and Donoho (2014).
    uniform : bool
        Give all modules the same rank, padded with zeros, as LoRAX and mlx-lm require.
    exact : bool
        Take dense SVDs in float64, which is slow for large matrices.
    to : str
        The dialect to write.
    dtype : str
        The dtype of all factors.
    drop_extra : bool
        Leave out what is not a matrix: norms, biases and new heads.
    target : Target
        The options ``output``, ``overwrite``, ``dry_run``.
    rules : RankRules
        The options ``rank``, ``energy``, ``error``, ``sv_ratio``, ``sv_cumulative``, ``parameters``, ``size``.
    selection : ModuleChoice
        The options ``modules``, ``block``.

    Raises
    ------
    OptionError
        No rule or several were given, a choice does not exist, no matrix differs, or the output overlaps with an input.
    FormatError
        A file cannot be read, or a difference has NaN or infinity.

    Notes
    -----
    Large matrices take a randomised SVD with a fixed seed, whose error is stated; the error of every pair is measured
    on all entries.

    Examples
    --------
    $ loralens extract --base model --tuned tuned --rank 8 -o adapter
    """
    check_choice("to", to, TARGET_FORMATS)
    check_choice("dtype", dtype, FLOAT_TYPES)
    rule = _rule(noise_edge, rules)
    target.check_inputs({"the base": base, "the tuned model": tuned})
    target.check_format(to)  # before the SVDs, which may take hours
    form = OutputFormat.with_base(to, base)
    before, after = read_checkpoint(base), read_checkpoint(tuned)

    def renamed(adapter: Adapter) -> Adapter:
        # PEFT looks for modules in memory, where transformers 5 renames and stacks some of those in the files.
        return use_memory_names(adapter, after.config) if to == "peft" else adapter

    _check_noise(rule, after, tuned)
    # Vectors (norms, biases) are copied, and take no time worth showing.
    total = sum(tensor.size for tensor in after.tensors.values() if tensor.ndim > 1)
    with place(tuned), progress("extracting", total) as step:
        extraction = extract_adapter(
            before.tensors,
            after.tensors,
            rule,
            base_config=before.config,
            tuned_config=after.config,
            # A path means nothing to other programs if there is none.
            base_model=base.name if isinstance(base, ModelInMemory) else str(base),
            modules=selection.globs,
            one_rank=uniform,
            # Either may lack a config.json that says so, and both store their weights in the same way.
            conv1d=after.conv1d or before.conv1d,
            exact=exact,
            dtype=numpy_dtype(dtype),
            drop_extra=drop_extra,
            # Names are a part of the file, and count against a budget of bytes.
            size=lambda adapter: form.size(renamed(adapter)),
            threads=processor_count(),
            step=step,
        )
    adapter = renamed(extraction.adapter)
    # Only the adapter gets other names: the table of modules keeps those of the files.
    if list(adapter) != list(extraction.adapter):
        extraction = replace(extraction, adapter=adapter, notes=(*extraction.notes, RENAMED))
    if target.written:
        # The reader's messages about the new file are given to the user now.
        back, _ = form.write(extraction.adapter, target)
        tell_findings(str(target.written), back.findings)
    _tell(extraction)
    return ExtractResult(str(base), str(tuned), target, to, extraction)


def _rule(noise_edge: Noise | None, rules: RankRules) -> Rule | NoiseEdge:
    """The rule that was given, which may be the edge of the noise.

    Raises
    ------
    OptionError
        No rule or several were given, or there is no such noise.
    """
    check_choice("noise_edge", noise_edge, get_args(Noise))
    rule = rules.optional()
    if noise_edge is not None:
        # The edge finds a rank by itself, so a rule beside it would contradict it. A ceiling would not.
        if rule and rule.name != "rank":
            what = f"--noise-edge and {option_names(*rules.stated.keys() - {'rank'})} exclude each other"
            raise OptionError(what, fix="give one of them")
        return NoiseEdge(noise_edge, int(rule.value) if rule else None)
    if rule is None:
        raise OptionError(
            "no option says how many directions to keep",
            fix=f"give one of {option_names(*RULES)} and --noise-edge",
        )
    return rule


def _check_noise(rule: Rule | NoiseEdge, tuned: Checkpoint, path: ModelPath) -> None:
    """Refuse the rule ``rounding`` for float8 weights with scales and for quantised weights.

    They are read multiplied by their scales, so the spacing of the numbers does not show how they were rounded.
    """
    if isinstance(rule, Rule) or rule.noise != "rounding":
        return
    kinds = ["float8 weights with scales"] if tuned.float8 else []
    kinds += ["quantised weights"] if tuned.coded else []
    if kinds:
        raise OptionError(
            f"{path}: the rounding noise of {kinds[0]} is not known here",
            fix="give --noise-edge median, or one of the other rules",
        )


def _tell(extraction: Extraction) -> None:
    """Tell the user the notes, the differences that the adapter lacks, and the modules whose rank is too small."""
    for text in extraction.notes:
        note(text)
    # One message for each reason, since a model may have hundreds of tensors that were left out for the same one.
    for why in dict.fromkeys(tensor.why for tensor in extraction.left_out):
        keys = [tensor.key for tensor in extraction.left_out if tensor.why == why]
        warn(f"{len(keys)} left out, {why}: {some(keys, NAMED)}")
    # The errors are those of the pairs alone, and say nothing about matrices without one.
    if extraction.share < 1:
        note(f"the adapter's modules hold {fixed('.2%')(extraction.share)} of the energy of all differences")
    full = [name for name, module in extraction.modules.items() if module.residue > FULL]
    if full:
        note(
            f"in {count(len(full), 'module')} more is left over than rounding explains (left / noise), as the "
            f"difference has more directions than were kept: {some(full)}"
        )
