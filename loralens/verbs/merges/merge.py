"""The verb ``merge``: merges adapters into a base model, with a certificate of what arrived and an undo patch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, get_args

from loralens.choices import FLOAT_TYPES, MergeBits, ModelDtype, RoundingMode
from loralens.core.messages import note, warn
from loralens.core.model_in_memory import ModelPath
from loralens.core.names import some
from loralens.errors import OptionError
from loralens.exports import takes_options
from loralens.formats.records.merged_files import CERTIFICATE, NAME
from loralens.linalg.device import Device
from loralens.merging.fidelity import Fidelity
from loralens.merging.merge_plan import MergePlan
from loralens.merging.merge_record import CODE_COLUMNS, MODULE_COLUMNS, MergedModule, module_columns
from loralens.tables.numbers import count, fixed, number, percent
from loralens.tables.table import Column, Keys, Rows, Table
from loralens.verbs.files.output import Target, Written
from loralens.verbs.merges.merge_inputs import (
    MergeInputs,
    base_on_disk,
    choose_rounding,
    read_merge_inputs,
    record_path,
    warn_of_repeats,
)
from loralens.verbs.merges.merge_run import MergeRun
from loralens.verbs.models.texts import TextSource
from loralens.verbs.shared.adapters import Weighted, weighted_label, weighted_sources
from loralens.verbs.shared.options import ModuleChoice, Reading, check_choice

# A merge warns of an update with a smaller gain or a larger error. The gain is stricter than the 0.9 below which verify
# calls an update partial. At an error of 0.2, what rounding adds to the update has a fifth of its norm. Its page
# shows what a gain of 0.965 and an error of 0.35 do to the embeddings of MiniLM.
SWALLOWED = 0.95
DAMAGED = 0.2
# On the grid of a quantised model an error of several times the update is usual: the noise is spread over all inputs,
# and little of it lies in the directions of the adapter. At 3 to 8 times the update, adapters kept at least 85 % of the
# loss that they gain (the last column of the table in docs/commands/merge.md); at 22 times they did not.
NOISY = 15.0  # noise relative to the update from which the merge warns
# With codes, clipping usually takes 4 % of the gain. In small modules chance changes the gain by another 4 %.
CLIPPED = 0.8


def is_damaged(fidelity: Fidelity) -> bool:
    """Whether rounding takes a noticeable part of an update, or adds much to it."""
    if fidelity.codes:
        return fidelity.gain < CLIPPED or fidelity.error > NOISY
    return fidelity.gain < SWALLOWED or fidelity.error > DAMAGED


def undamaged_sentence(modules: int, *, codes: bool) -> str:
    """The sentence on the modules that are not damaged."""
    gain, error = _limits(codes)
    return f"{count(modules, 'module')} undamaged (gain ≥ {gain}, error ≤ {error})"


def modules_title(modules: Sequence[MergedModule], *, codes: bool) -> str:
    """The title of the table of modules, with the number of those that are damaged."""
    title, gain, error = count(len(modules), "updated module"), *_limits(codes)
    damaged = sum(is_damaged(module.fidelity) for module in modules)
    return f"{title}, {damaged} damaged (gain < {gain} or error > {error})" if damaged else title


def _limits(codes: bool) -> tuple[str, str]:
    """The gain below which a module is damaged, and the error above which it is."""
    return (f"{CLIPPED}", f"{NOISY:g}") if codes else (f"{SWALLOWED}", f"{DAMAGED}")


def conclusion_on_codes(total: Mapping[str, Any], *, written: bool) -> list[str]:
    """How much of an update arrived in codes, and how many of them changed; or would, if no model was written."""
    way = "by stochastic rounding" if total["drawn"] else "by rounding to the nearest code"
    own = total["subspace_error"]
    error = "" if own is None else f" and an error of {number(own)} in its own directions"
    changed, clipped = _percent(total["changed"]), _percent(total["clipped"])
    were = "were" if written else "would be"
    return [
        f"The update {'arrived' if written else 'would arrive'} with a gain of {total['gain']:.4f}{error}, {way}.",
        f"{changed} of the codes {'changed' if written else 'would change'}, {clipped} {were} clipped, and the noise "
        f"{'is' if written else 'would be'} {number(total['relative_error'])} times the update.",
    ]


def _percent(share: float) -> str:
    """A share in percent, however small: beside another percentage, a power of ten would be read as one too."""
    return f"{100 * share:.3g} %"


def conclusion_on_texts(certificate: Mapping[str, Any]) -> list[str]:
    """What the merge did to the predictions on texts; nothing if it was not measured."""
    texts = certificate.get("texts")
    if not texts:
        return []
    own, general = texts["in_domain"], texts["general"]
    gained = own["loss_base"] - own["loss_unmerged"]
    share = (own["loss_base"] - own["loss_merged"]) / gained if gained > 0 else None
    kept_text = "" if share is None else f": it keeps {percent(share)} of what the adapter gains"
    divergences = number(own["kl_unmerged_merged"], 2), number(general["kl_unmerged_merged"], 2)
    return [
        f"On these texts the loss of the merged model is {_losses(own)}{kept_text}. "
        f"Its divergence from the unmerged model is {divergences[0]}.",
        f"On general texts the loss is {_losses(general)}, and the divergence {divergences[1]}.",
    ]


def _losses(texts: Mapping[str, Any]) -> str:
    """The loss of the merged model on some texts, and those of the other two."""
    return f"{texts['loss_merged']:.3f} (unmerged {texts['loss_unmerged']:.3f}, base {texts['loss_base']:.3f})"


def warn_of_noise(modules: Sequence[MergedModule]) -> None:
    """Warn if the noise of codes hides an update, or the ends of the grid clip much of it."""
    coded = [(module.fidelity, module.fidelity.codes) for module in modules if module.fidelity.codes]
    noisy = [fidelity for fidelity, _ in coded if fidelity.error > NOISY]
    if noisy:
        worst = max(noisy, key=lambda fidelity: fidelity.error)
        ways = (
            "serve the adapter unmerged (for llama.cpp: loralens convert --to gguf), or write floats with --dtype bf16"
        )
        warn(
            f"{len(noisy)} of {len(coded)} updates are weak compared with a step of the codes; worst is "
            f"{worst.module}: noise {worst.error:.0f} times the update",
            ways,
        )
    lost = [fidelity for fidelity, codes in coded if codes and fidelity.gain < CLIPPED and codes.rounding != "nearest"]
    if lost:
        worst = min(lost, key=lambda fidelity: fidelity.gain)
        warn(
            f"{len(lost)} of {len(coded)} updates arrived in part; worst is {worst.module}: gain {worst.gain:.2f}",
            "write floats with --dtype bf16, where every update arrives in full",
        )


# Given in place of a file, which is then not written. A word, since leaving the option out means the default place.
NONE = "none"


@dataclass(frozen=True, slots=True, repr=False)
class MergeResult(Written):
    """A merge: the tensors that changed, and how much of every update arrived.

    Attributes
    ----------
    measured : bool
        Whether the updates that arrived were measured.
    modules : sequence of MergedModule
        The fidelity of every update; empty if it was not measured.
    certificate : mapping
        The certificate as a JSON object.
    undo_file, certificate_file : Path or None
        The places of the two files; None for a file that was not written.
    undo_size : int or None
        The bytes of the undo file, also of one that a dry run would write; None for a merge without one.
    """

    target: Target
    measured: bool
    modules: Sequence[MergedModule]
    certificate: Mapping[str, Any]
    undo_file: Path | None = None
    certificate_file: Path | None = None
    undo_size: int | None = None

    def conclusion(self) -> list[str]:
        """What was merged into what; then how much of the update arrived, and with which error."""
        total = self.certificate["total"]
        adapters = [weighted_label(each["path"], each["weight"]) for each in self.certificate["adapters"]]
        merged = f"{self.certificate['base']['path']} with {' + '.join(adapters)} merged in"
        sentences = [self.target.conclusion(f"{merged}, {count(total['tensors'], 'tensor')} changed")]
        if not self.measured:
            sentences.append("How much of the update arrived was not measured, as there is no certificate.")
        # An adapter of modules_to_save alone has no update whose gain could be measured.
        elif self.modules:
            if "changed" in total:
                sentences += conclusion_on_codes(total, written=self.target.written is not None)
            else:
                sentences.append(self._arrival(total))
        return [*sentences, *conclusion_on_texts(self.certificate)]

    def _arrival(self, total: Mapping[str, Any]) -> str:
        """How much of the updates arrived in floats."""
        # The gain of an update is 1 where all of it arrived; the error is what rounding adds.
        arrived = "arrived" if self.target.written else "would arrive"
        gain, error = fixed(".4f")(total["gain"]), percent(total["relative_error"])
        sentence = f"update {arrived} with a gain of {gain} and an error of {error} from rounding."
        if not total["overflowed"]:
            return f"The {sentence}"
        # Gain and error are those of the weights that stay finite.
        return f"{count(total['overflowed'], 'weight')} became infinite. Elsewhere the {sentence}"

    def tables(self) -> list[Table[MergedModule]]:
        """The adapted modules, one per row."""
        return [
            Table(
                modules_title(self.modules, codes="changed" in self.certificate["total"]),
                module_columns(self.modules),
                self.modules,
                uneventful=lambda row: not (is_damaged(row.fidelity) or row.fidelity.overflowed),
                sum_up=lambda modules: undamaged_sentence(modules, codes="changed" in self.certificate["total"]),
            )
        ]

    def sentences(self) -> list[str]:
        """The undo file and its size, and the certificate."""
        sentences, bits = [], self.certificate["total"]["undo_bits_per_weight"]
        if self.undo_size is not None:
            file = f"{self.undo_file}, " if self.undo_file else "would have "
            share = f" (patches of {_bits_text(bits)} bits per changed weight)" if bits is not None else ""
            sentences.append(f"undo file: {file}{self.undo_size:,} bytes{share}")
        if self.certificate_file:
            sentences.append(f"certificate: {self.certificate_file}")
        return sentences

    @classmethod
    def json_keys(cls) -> Keys:
        """The keys of the certificate, from which `record` takes their values."""
        means = ("gain", "relative_error", "subspace_error", "predicted_gain", "predicted_relative_error")
        shares = ("unmoved", "predicted_unmoved", "undo_bits_per_weight")
        of_codes = ("changed", "clipped", "mean_move", "noise", "predicted_changed", "predicted_clipped")
        counts = dict.fromkeys(("tensors", "overflowed"), int) | {"undo_bytes": int | None, "drawn?": int}
        codes = [replace(column, may_lack=True) for column in CODE_COLUMNS]
        return (
            Column("base", type={"path": str, "sha256": str | None}),
            Column("result", type={"sha256": str | None, "tensors": dict[str, Any] | None}),
            Column("adapters", type=({"path": str, "weight": float, "fingerprint": str},)),
            *(Column(key, type=list[str]) for key in ("names", "missing", "notes")),
            Column("rounding", type={"mode": str, "seed?": int}),
            Column("dtype", type=str),
            Column("bits", type=str, may_lack=True),
            Column("modules", type=Rows(MergedModule, (*MODULE_COLUMNS, *codes))),
            Column("total", type=counts | dict.fromkeys((*means, *shares, *(f"{key}?" for key in of_codes)), float)),
            Column("texts", type=dict[str, Any], may_lack=True),
            Column("files", type=dict[str, int], may_lack=True),
        )

    def record(self) -> dict[str, Any]:
        """The certificate as a JSON object."""
        return dict(self.certificate)


def _bits_text(bits: float) -> str:
    text = f"{bits:.2f}"
    # Two decimals are too few where hardly a code changed.
    return number(bits, 2) if bits and text == "0.00" else text


@takes_options
def merge(
    *adapters: Weighted,
    base: ModelPath,
    target: Target,
    undo: str | PathLike[str] | None = None,
    certificate: str | PathLike[str] | None = None,
    measure: bool = False,
    rounding: RoundingMode | None = None,
    seed: int = 0,
    dtype: ModelDtype = "keep",
    bits: MergeBits | None = None,
    data: TextSource | None = None,
    allow_missing: bool = False,
    untie: bool | None = None,
    device: str = "cpu",
    selection: ModuleChoice,
    reading: Reading,
) -> MergeResult:
    """Merge adapters into a base model: W' = W + Σ w·ΔW, rounded once.

    All other tensors and the files beside the weights are copied byte for byte. In the shell ADAPTER:0.7 has the weight
    0.7. By default OUT also holds an undo patch, from which `loralens.unmerge` restores the base bit for bit, and a
    certificate of how much of every update arrived, which --json prints.

    Parameters
    ----------
    *adapters : path, Adapter or model, pair, or mapping
        The adapters and their weights w, 1 by default: ``"a"``, ``("a", 0.7)`` or ``{"a": 0.7, "b": 0.3}``.
    base : path or model
        The base model: a folder, a safetensors or GGUF file, or a Hub id in the local cache.
    output : path, optional
        The folder to write, or the file if the base is a single file, such as a GGUF file.
    undo : path, optional
        Where the undo patch is written; 'none' writes none. [default: undo.loralens in OUT; for a file OUT.gguf
        OUT.undo.loralens]
    certificate : path, optional
        Where the certificate is written; 'none' writes none. [default: merge_certificate.json in OUT; for a file
        OUT.gguf OUT.merge_certificate.json]
    measure : bool
        Measure how much of every update arrived, even if no certificate is written.
    rounding : str, optional
        How the new weights are rounded. [default: nearest; stochastic with ``bits`` keep]

        To the nearest code almost no update would arrive, so codes are rounded stochastically.
    seed : int
        The seed of stochastic rounding.
    dtype : str
        The dtype of the merged model; 'keep' leaves every tensor in its own.
    bits : str, optional
        The codes of the merged model. 'keep' is for a quantised base: its codes move, and its scales and its layout
        stay. The others merge in floats and quantise once: 'nf4' a base in safetensors, as bitsandbytes does, and
        'q4_1' and 'q8_0' a GGUF base. A quantised base needs this or ``dtype``.
    data : path or iterable, optional
        Texts of the adapter's domain. The certificate then has the loss of the merged model on them, and its divergence
        from the base with the unmerged adapter.

        The adapter should not have been trained on them. The same is measured on general texts.
    allow_missing : bool
        Leave out modules that have no weight in the base.
    untie : bool, optional
        Give an lm_head that shares the embedding's weight a weight of its own, or not. [default: if the adapter needs
        one]
    device : str
        The device for computations on W: cpu, cuda or cuda:N. The result has the same bits on every device.
    target : Target
        The options ``output``, ``overwrite``, ``dry_run``.
    selection : ModuleChoice
        The options ``modules``, ``block``.
    reading : Reading
        The options ``format``, ``alpha``, ``scale``, ``once``.

    Raises
    ------
    OptionError
        ``output`` is missing, a choice or the device does not exist, a file would be lost at ``output``, or the base is
        quantised and nothing says what the merged model stores.
    FormatError
        A file cannot be read.
    MismatchError
        Adapters and base do not fit together.

    Notes
    -----
    The update is computed in float32 in a defined order, so the result has the same bits on every machine. The output
    appears complete or not at all.

    Examples
    --------
    $ loralens merge adapter --base model -o merged
    $ loralens merge adapter:0.7 other:0.3 --base model -o merged
    """
    check_choice("dtype", dtype, get_args(ModelDtype))
    rounding = choose_rounding(rounding, bits=bits, dtype=dtype)
    if not target.is_wanted:
        raise OptionError("no output is given for the merged model", fix="give -o OUT, or --dry-run")
    compute_device = Device.of(device)  # a device that does not exist is refused before the work
    with base_on_disk(base) as folder:
        inputs = read_merge_inputs(
            weighted_sources(adapters),
            base,
            reading,
            modules=selection.globs,
            allow_missing=allow_missing,
            untie=untie,
            dtype=FLOAT_TYPES.get(dtype),
            bits=bits,
            folder=folder,
        )
        _tell_plan(inputs.plan)
        undo_file, certificate_file = (
            _undo_file(target, undo, inputs),
            _record_file(target, certificate, CERTIFICATE, inputs),
        )
        # Measuring is the only purpose of a dry run; it says how large the patches would be without a place for them.
        measured = target.dry_run or measure or certificate_file is not None
        run = MergeRun(
            inputs,
            rounding=rounding,
            seed=seed,
            fidelity=measured,
            undo=undo_file is not None or (target.dry_run and str(undo) != NONE and not inputs.laid_anew),
            device=compute_device,
            data=data,
        )
        warn_of_repeats(run.adapters, inputs)
        if target.written is None:
            run.rehearse()
            undo_file = certificate_file = None
        else:
            run.write(target.written, undo=undo_file, certificate=certificate_file, overwrite=target.overwrite)
        undo_bytes = undo_file.stat().st_size if undo_file else run.undo_size()
        _warn_of_losses(run.modules(), inputs, rounding)
        return MergeResult(target, measured, run.modules(), run.certificate(), undo_file, certificate_file, undo_bytes)


def _record_file(target: Target, path: str | PathLike[str] | None, name: str, inputs: MergeInputs) -> Path | None:
    """The place of the undo file or the certificate; None if it is not written."""
    if path is not None:
        return None if str(path) == NONE else Path(path)
    return None if target.output is None else record_path(target.output, name, folder=inputs.files.root.is_dir())


def _undo_file(target: Target, path: str | PathLike[str] | None, inputs: MergeInputs) -> Path | None:
    """The place of the undo file; None for a merge that lays the model out anew.

    Raises
    ------
    OptionError
        Such a merge is to have an undo file.
    """
    file = _record_file(target, path, NAME, inputs)
    if not inputs.laid_anew:
        return file
    if path is not None and file is not None:
        raise OptionError("such a merge has no undo file: the model is laid out anew", fix="leave out --undo")
    note("no undo file is written: what the base stores is not in the result, so keep the base")
    return None


def _tell_plan(plan: MergePlan) -> None:
    """Tell the user how names were matched, what the plan notes, and which modules are left out."""
    # Names that match unchanged need no message.
    for text in (*(str(match) for match in plan.matches if match.edit), *plan.notes):
        note(text)
    if plan.missing:
        note(f"left out, as the base has no place for them: {some(plan.missing)}")


def _warn_of_losses(modules: Sequence[MergedModule], inputs: MergeInputs, rounding: RoundingMode) -> None:
    """Warn if a weight overflows or rounding damages an update, and say how to avoid it."""
    if inputs.coded:
        warn_of_noise(modules)
    # New codes move every number, whatever the adapter does.
    if inputs.coded or inputs.quantised.keys:
        return
    dtype = inputs.narrowest
    arrived = [module.fidelity for module in modules]
    overflowed = sum(fidelity.overflowed for fidelity in arrived)
    if overflowed:
        # bfloat16 has the range of float32, so there the update itself is too large.
        narrow = dtype not in ("float32", "bfloat16")
        fix = "write --dtype f32 (or bf16)" if narrow else "check the adapter's α and scale"
        warn(f"{overflowed:,} weights became infinite, because they are too large for {dtype}", fix)
    spoilt = {fidelity.module: fidelity.non_finite for fidelity in arrived if fidelity.non_finite}
    if spoilt:
        where = f"{count(sum(spoilt.values()), 'adapted weight')} of the base"
        warn(f"NaN or infinity in {where}, which the merge leaves as it is: {some(spoilt)}", "download the base again")
    damaged = [fidelity for fidelity in arrived if is_damaged(fidelity)]
    # In float32 there is no wider dtype to recommend.
    if not damaged or dtype == "float32":
        return
    # Modules are compared by their error, because noise can hide an update whose gain is 1.
    worst = max(damaged, key=lambda fidelity: fidelity.error)
    # float16 has 3 bits of mantissa more than bfloat16, but some models overflow in it.
    ways = ["write --dtype f32" + (" (or f16, where the model runs in it)" if dtype == "bfloat16" else "")]
    ways.append("serve the adapter unmerged")
    # Stochastic rounding keeps the strength, but its noise is larger: it only helps where the update itself is lost.
    # Feedback is not recommended, since it is exact only for inputs along the adapter's own directions (see its page).
    if rounding == "nearest" and any(fidelity.gain < SWALLOWED for fidelity in damaged):
        ways.append("take --rounding stochastic: full strength at the price of noise")
    warn(
        f"rounding to {dtype} damages {len(damaged)} of {len(arrived)} updates; worst is {worst.module}: "
        f"gain {fixed('.2f')(worst.gain)}, error {worst.error:.2f}",
        f"{', '.join(ways[:-1])}, or {ways[-1]}",
    )
