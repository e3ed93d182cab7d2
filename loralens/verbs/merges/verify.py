"""The verb ``verify``: tests whether a merged model contains an adapter, and how faithfully."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from os import PathLike
from pathlib import Path
from typing import Any, Literal, cast, get_args

from loralens.choices import MergeBits, RoundingMode
from loralens.core.messages import progress
from loralens.core.model_in_memory import ModelPath
from loralens.core.names import some
from loralens.core.threads import in_threads, processor_count
from loralens.errors import FormatError, MismatchError, OptionError, place
from loralens.exports import takes_options
from loralens.formats.files.container import read_json
from loralens.formats.models.checkpoint import open_checkpoint
from loralens.formats.models.model_files import ModelFiles, model_files, resolve_path
from loralens.formats.records.merged_files import CERTIFICATE, FILES, file_sizes, is_certificate
from loralens.linalg.device import Device
from loralens.merging.codec import FloatCodec, hash_rows, prepare
from loralens.merging.merge_plan import have_same_values, matrix_blocks
from loralens.merging.merge_record import Hashed
from loralens.merging.planning import Tied
from loralens.merging.verify import HIGH, LOW, Outcome, Verdict, relation, verdicts
from loralens.tables.numbers import count, fixed, number
from loralens.tables.result import Tabular
from loralens.tables.table import ALWAYS, Column, Columns, Keys, Table, label_column, rows_key
from loralens.verbs.merges.merge import DAMAGED
from loralens.verbs.merges.merge_inputs import read_merge_inputs, record_path, settings_of, warn_if_killed
from loralens.verbs.shared.adapters import Weighted, check_on_disk, name_damaged, weighted_label, weighted_sources
from loralens.verbs.shared.options import ModuleChoice, Reading, check_choice, option_names

# The cosines from which the directions of two updates are called the same, and similar. Between step 750 of a run and
# its steps 400 and 100 the cosine is 0.99 and 0.70, and between two runs on one base 0.01. Chance alone
# gives 1/√(out·in), such as 0.003.
SAME = 0.9
RELATED = 0.3

OUTCOMES: tuple[Outcome, ...] = ("exact", "rounded", "partial", "absent")  # best first
# The outcomes with the answer yes, and exit code 0. A tool that rounds in another way has merged the adapter too.
GOOD: tuple[Outcome, ...] = ("exact", "rounded")

# The predicted gain is for machines: people read it in the sentence about a module whose gain differs from it.
COLUMNS: Columns[Verdict] = (
    label_column("name", "module", "module"),
    label_column("verdict", "verdict", "outcome"),
    Column("gain", "gain", "gain", fixed(".4f"), priority=ALWAYS),
    Column("predicted_gain", "predicted"),
    Column("relative_error", "error", "error", number, priority=5, matters="largest"),
    Column("different", "different", "entries differ", "{:,}".format, priority=4),
)


@dataclass(frozen=True, slots=True, repr=False)
class VerifyResult(Tabular):
    """Whether a merged model contains an adapter.

    Attributes
    ----------
    merged, base : str
        The paths of the models.
    rounding : str
        The rounding with which the merge was repeated.
    modules : sequence of Verdict
        One for every module of the adapter.
    others_changed : sequence of str
        The tensors that the adapter does not change, but that differ from those of the base.
    adapters : sequence of str
        The adapters, with their weights where these are not 1.
    in_codes : bool
        Whether the merge moved the codes of a low-bit base.
    """

    merged: str
    base: str
    rounding: RoundingMode
    modules: Sequence[Verdict]
    others_changed: Sequence[str]
    adapters: Sequence[str]
    in_codes: bool = False

    @property
    def verdict(self) -> Outcome:
        """The outcome of the worst module; ``exact`` if the adapter has no modules."""
        return max((verdict.outcome for verdict in self.modules), key=OUTCOMES.index, default="exact")

    @property
    def answer(self) -> bool:
        """Whether the model contains every module at full strength."""
        return self.verdict in GOOD

    @property
    def _bad(self) -> list[Verdict]:
        return [verdict for verdict in self.modules if verdict.outcome not in GOOD]

    def conclusion(self) -> list[str]:
        """Whether the model holds the adapter; if not, what it holds instead."""
        adapter, bad = " + ".join(self.adapters), self._bad
        if not self.modules:
            return [f"Nothing was compared: {adapter} changes no weight of {self.base}."]
        if self.verdict == "exact":
            return [self._exact_sentence(adapter)]
        if not bad:
            return [f"{self.merged} holds {adapter} at full strength, with another rounding than that of this merge."]
        of, names = count(len(self.modules), "module"), some(verdict.module for verdict in bad)
        # Names tell something only if other modules are better.
        extent = "" if len(bad) == len(self.modules) else f" in {len(bad)} of {of} ({names})"
        sentences = [f"{self.merged} does not hold {adapter}{extent}{self._content_text(bad)}."]
        if absent := [verdict.module for verdict in bad if verdict.outcome == "absent"]:
            every = len(absent) == len(self.modules) > 1
            where = (
                f"all {count(len(absent), 'module')}" if every else f"{count(len(absent), 'module')} ({some(absent)})"
            )
            sentences.append(f"It is absent in {where}.")
        return sentences

    def _exact_sentence(self, adapter: str) -> str:
        """That every bit is as the merge writes it; and what rounding did to the update, if it did much."""
        measured = [verdict for verdict in self.modules if verdict.norm]
        energy = sum(verdict.norm**2 for verdict in measured) or 1.0
        error = sqrt(sum((verdict.error * verdict.norm) ** 2 for verdict in measured) / energy)
        # Quantised weights and narrow dtypes take much of an update, or add noise; "exactly" would hide that.
        if not error > DAMAGED:
            return f"{self.merged} holds {adapter} exactly."
        gain = sum(verdict.gain * verdict.norm**2 for verdict in measured) / energy
        lost = f"a gain of {fixed('.3f')(gain)}, and adds an error of {number(error)} times the update"
        return f"{self.merged} is the merge of {adapter}, bit for bit; rounding leaves {lost}."

    @property
    def _taker(self) -> str:
        """What took an update away although the merge is as it should be."""
        if not self.in_codes:
            return "rounding to the dtype of the model"
        return "rounding to the nearest code" if self.rounding == "nearest" else "the limited range of the codes"

    def _content_text(self, bad: Sequence[Verdict]) -> str:
        """What these modules hold in place of the adapter, as the end of a sentence."""
        if all(verdict.by_rounding for verdict in bad):
            return f": {self._taker} takes the update"
        # The base itself moves by exactly 0, and what is left is exactly D.
        if all(verdict.norm and verdict.gain == 0 and verdict.error == 1 for verdict in bad):
            return ": the weights are those of the base"
        likeness = relation(bad)
        # Where a weight is replaced or has another shape, there are no directions to compare.
        if likeness is None:
            return ": the weights are others"
        part = number(abs(likeness.gain), 2)
        strength = "full strength" if part == "1" else f"{part} of the strength"
        cosine = fixed(".2f")(likeness.cosine)
        if likeness.cosine >= SAME:
            return f" as it is, but the same directions at {strength}: another weight, or another checkpoint of its run"
        if likeness.cosine <= -SAME:
            return f", but the same directions with the opposite sign at {strength}"
        if likeness.cosine >= RELATED:
            like = "as another checkpoint of its run has"
            return f" as it is, but similar directions (cosine {cosine}) at {strength}, {like}"
        return f": what was added to the base has other directions (cosine {cosine})"

    def _title(self) -> str:
        counts = ", ".join(
            f"{number} {outcome}"
            for outcome in OUTCOMES
            if (number := sum(verdict.outcome == outcome for verdict in self.modules))
        )
        return f"{count(len(self.modules), 'module')}: {counts}"

    def tables(self) -> list[Table[Verdict]]:
        """The modules, with the worst first."""
        # People look for what is wrong. Programs get the natural order of `listing`.
        worst_first = sorted(self.modules, key=lambda verdict: -OUTCOMES.index(verdict.outcome))
        return [
            Table(
                self._title(),
                COLUMNS,
                worst_first,
                uneventful=lambda verdict: verdict.outcome == "exact",
                sum_up=lambda exact: f"{count(exact, 'module')} in which every bit is as this merge writes it",
            )
        ]

    def listing(self) -> list[Table[Verdict]]:
        """The modules in natural order."""
        return [Table(self._title(), COLUMNS, self.modules)]

    def sentences(self) -> list[str]:
        """The reasons for the answer no as far as the numbers show them, and the other tensors that changed."""
        sentences: list[str] = []
        bad = self._bad
        # Two causes have two remedies: the rounding of the merge itself, and a merge other than the stated one. The
        # conclusion says whether the strength differs.
        by_rounding = [verdict.module for verdict in bad if verdict.by_rounding]
        unexplained = [
            verdict
            for verdict in bad
            if not verdict.by_rounding and verdict.outcome == "partial" and LOW <= verdict.gain <= HIGH
        ]
        if by_rounding:
            way = "merge with --dtype f32"
            if self.in_codes:
                way = "leave out --rounding nearest" if self.rounding == "nearest" else "write floats with --dtype bf16"
            sentences.append(
                f"note: in {len(by_rounding)} of them every bit is what this merge writes, and rounding takes the "
                f"rest: {way}, or serve the adapter unmerged: {some(by_rounding)}"
            )
        if unexplained:
            first = unexplained[0]
            gain = fixed(".4f")(first.gain)
            sentences.append(
                f"note: {first.module} has a gain of {gain}, where {self.rounding} rounding predicts "
                f"{first.predicted:.4f}: it was rounded otherwise, or changed since"
            )
        changed = len(self.others_changed)
        if changed:
            are = "is not that" if changed == 1 else "are not those"
            what = f"{count(changed, 'tensor')} that the adapter does not touch {are} of the base"
            sentences.append(f"note: {what}: {some(self.others_changed)}")
        return sentences

    @classmethod
    def json_keys(cls) -> Keys:
        """The keys of the JSON object."""
        return (
            "merged",
            "base",
            rows_key("modules", COLUMNS),
            "others_changed",
            "verdict",
        )


State = Literal["unchanged", "changed", "missing", "added"]
_FIX = "give --base and --adapter: the merge is then repeated and compared"


@dataclass(frozen=True, slots=True)
class CheckedTensor:
    """One row: a stored tensor, and whether it is as the certificate describes it."""

    name: str
    state: State


CERTIFICATE_CHECK_COLUMNS: Columns[CheckedTensor] = (
    label_column("name", "tensor"),
    label_column("state", "state"),
)


@dataclass(frozen=True, slots=True, repr=False)
class CertificateResult(Tabular):
    """Whether a merged model was changed since the merge that its certificate describes.

    The certificate lies beside the model, so whoever changed one may have changed the other too.

    Attributes
    ----------
    merged, certificate : str
        The paths of the model and of its certificate.
    base : str
        The base of the merge, as the certificate names it.
    adapters : sequence of str
        The adapters that were merged, with their weights where these are not 1.
    unchanged : bool
        Whether every tensor is as it was merged, and none was added.
    tensors : sequence of CheckedTensor
        Every tensor of the model and of the certificate.
    files_changed : sequence of str
        Other files of the merge that are gone or have another size. They do not lead to the answer no.
    """

    merged: str
    certificate: str
    base: str
    adapters: Sequence[str]
    unchanged: bool
    tensors: Sequence[CheckedTensor]
    files_changed: Sequence[str]

    @property
    def answer(self) -> bool:
        """Whether the model is unchanged."""
        return self.unchanged

    @property
    def changed(self) -> list[str]:
        """The names of the tensors that are not as they were merged."""
        return [tensor.name for tensor in self.tensors if tensor.state != "unchanged"]

    def conclusion(self) -> list[str]:
        """Whether the model is unchanged, or which tensors changed."""
        merge = f"the merge that the certificate describes ({' + '.join(self.adapters)} into {self.base})"
        if self.unchanged:
            return [f"{self.merged} is unchanged since {merge}."]
        changed, of = self.changed, count(len(self.tensors), "tensor")
        return [f"{self.merged}: {len(changed)} of {of} changed since {merge}: {some(changed)}."]

    def tables(self) -> list[Table[CheckedTensor]]:
        """The tensors, one per row."""
        return [
            Table(
                "tensors that are not as they were merged",
                CERTIFICATE_CHECK_COLUMNS,
                self.tensors,
                uneventful=lambda tensor: tensor.state == "unchanged",
                sum_up=lambda unchanged: f"{count(unchanged, 'tensor')} unchanged",
            )
        ]

    def sentences(self) -> list[str]:
        """Other files that changed, and what this comparison does not show."""
        sentences = []
        if self.files_changed:
            sentences.append(f"note: gone, or of another size than at the merge: {some(self.files_changed)}")
        return [*sentences, "To test whether an adapter is in the model, give --base and --adapter."]

    @classmethod
    def json_keys(cls) -> Keys:
        """The keys of the JSON object."""
        return (
            "merged",
            "certificate",
            "base",
            "adapters",
            "unchanged",
            rows_key("tensors", CERTIFICATE_CHECK_COLUMNS),
            "files_changed",
        )


def check_certificate(merged: str | os.PathLike[str]) -> CertificateResult:
    """Compare every tensor of a model with the hashes in the certificate of its merge.

    Raises
    ------
    OptionError
        There is no certificate in the model's folder, or beside a model that is a single file.
    FormatError
        The certificate is damaged, or a file cannot be read.
    """
    files, path = model_files(resolve_path(Path(merged))), record_path(Path(merged), CERTIFICATE)
    if not path.is_file():
        raise OptionError(f"{merged}: has no certificate of a merge ({path.name})", fix=_FIX)
    with place(path):
        if not is_certificate(path):
            raise FormatError("is not the certificate of a merge", fix=_FIX)
        certificate = read_json(path)
        listed, base, adapters = _stated(certificate)
    hashes = _hash_tensors(files)
    files.check_unchanged()
    tensors = []
    for key in sorted({*hashes, *listed}):
        state: State = "missing" if key not in hashes else "added" if key not in listed else "unchanged"
        if state == "unchanged" and hashes[key] != listed[key]:
            state = "changed"
        tensors.append(CheckedTensor(key, state))
    unchanged = all(row.state == "unchanged" for row in tensors)
    if not unchanged:
        warn_if_killed(files.root)
    changed_files = []
    if files.root.is_dir() and isinstance(sizes := certificate.get(FILES), dict):
        now = file_sizes(files.root)
        changed_files = [name for name, size in sizes.items() if now.get(name) != size]
    return CertificateResult(str(merged), str(path), base, adapters, unchanged, tensors, changed_files)


def _stated(certificate: Mapping[str, Any]) -> tuple[dict[str, Hashed], str, list[str]]:
    """The hashes of the tensors of the merged model, and the base and the adapters of the merge as text."""
    # These are all errors that wrong types and missing keys can cause.
    try:
        listed = {
            str(key): Hashed(str(tensor["dtype"]), tuple(tensor["shape"]), str(tensor["sha256"]))
            for key, tensor in certificate["result"]["tensors"].items()
        }
        adapters = [weighted_label(str(one["path"]), float(one["weight"])) for one in certificate["adapters"]]
        return listed, str(certificate["base"]["path"]), adapters
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise FormatError("its hashes or its adapters are missing or damaged", fix=_FIX) from error


def _hash_tensors(files: ModelFiles) -> dict[str, Hashed]:
    tensors = files.stored

    def hashed(key: str) -> Hashed:
        tensor = tensors[key]
        digest = hash_rows(matrix_blocks(tensor))
        if step:
            step(tensor.nbytes)
        return Hashed(str(tensor.dtype), tensor.shape, digest)

    with progress("hashing", sum(tensor.nbytes for tensor in tensors.values())) as step:
        return in_threads(hashed, list(tensors), processor_count())


@takes_options
def verify(
    merged: str | PathLike[str],
    *,
    base: ModelPath | None = None,
    adapter: Weighted = (),
    rounding: RoundingMode | None = None,
    seed: int | None = None,
    untie: bool | None = None,
    device: str = "cpu",
    selection: ModuleChoice,
    reading: Reading,
) -> VerifyResult | CertificateResult:
    """Test whether a merged model holds an adapter, module by module, by repeating the merge.

    Without ``base`` and ``adapter``: test whether the model is unchanged since its merge, by the certificate in its
    folder. The exit code is 1 if a tensor changed. Whether an adapter is in the model is not tested.

    A module is "exact" if every bit is the one that loralens writes, and "rounded" if the update is there in full, with
    another rounding. It is "partial" if the strength of the update is below 0.9 or above 1.1, or is not the one that
    the rounding predicts, and "absent" below 0.1, as in the base or in another model. Rounding itself may lose an
    update, which is then partial or absent although every bit is the one that loralens writes. The answer for the model
    is that of its worst module: the exit code is 0 for exact and rounded, 1 for partial and absent.

    Parameters
    ----------
    merged : path
        The model that may hold the adapter.
    base : path or model, optional
        The base model: a folder, a safetensors or GGUF file, or a Hub id in the local cache. Goes with ``adapter``.
    adapter : path, Adapter or model, pair, mapping, or sequence of these, optional
        An adapter that was merged, with weight W. Goes with ``base``.

        ``"a"``, ``("a", 0.7)`` or ``{"a": 0.7, "b": 0.3}``.
    rounding : str, optional
        How the merge rounded the new weights. [default: as its certificate says; without one nearest, and stochastic
        for the codes of a quantised base]
    seed : int, optional
        The seed of stochastic rounding. [default: as the certificate says; without one, 0]
    untie : bool, optional
        Whether the merge gave the head a weight of its own. [default: as in MERGED, or if the adapter needs one]
    device : str
        The device for computations on W: cpu, cuda or cuda:N. The result has the same bits on every device.
    selection : ModuleChoice
        The options ``modules``, ``block``.
    reading : Reading
        The options ``format``, ``alpha``, ``scale``, ``once``.

    Raises
    ------
    OptionError
        There is no such rounding or device, or a glob pattern matches no module; one of ``base`` and ``adapter`` is
        missing, or both are and there is no certificate.
    MismatchError
        The merged model lacks a tensor of the base, or the adapter belongs to another base.
    FormatError
        A file cannot be read.

    Notes
    -----
    Without ``base`` and ``adapter`` every tensor is compared with its hash in the certificate that the merge left in
    the folder of ``merged``. That shows whether the model was changed since, and not whether an adapter is in it.

    The strength is the gain ⟨M − W, D⟩/‖D‖², with the merged weight M, the weight W of the base, and the update D. The
    formulas and the standard error of the gain are in `loralens.merging.verify`.

    Examples
    --------
    $ loralens verify merged
    $ loralens verify merged --base model --adapter adapter
    """
    check_on_disk(merged)
    modules = selection.globs
    check_choice("rounding", rounding, get_args(RoundingMode))
    # () and an empty list from the command line mean that no adapter was given; an empty text is a wrong path.
    has_adapter = isinstance(adapter, str | PathLike) or bool(adapter)
    if base is None or not has_adapter:
        others_set = {"rounding": rounding, "seed": seed, "untie": untie, "device": device != "cpu"}
        _refuse_half(base is not None, has_adapter, {**others_set, "modules": modules, **reading.stated})
        return check_certificate(merged)
    compute_device = Device.of(device)  # a device that does not exist is refused before the work
    # ``shown`` gives a shared weight under all its names, so that planned tensors are found whether or not the merge
    # untied them. ``tensors`` are multiplied by float8 scales; ``stored`` are as the file has them, and codes of a few
    # bits are decoded in both.
    checkpoint = open_checkpoint(Path(merged))
    merged_tie, files = Tied.of(checkpoint.tensors, checkpoint.config), checkpoint.files
    tensors = merged_tie.ties.with_copies(checkpoint.tensors)
    decoded = {key: checkpoint.tensors[key] for key in checkpoint.coded}
    stored = merged_tie.ties.with_copies({**files.tensors, **decoded})
    base_checkpoint = open_checkpoint(base)
    base_tensors = base_checkpoint.tensors
    # The merge stored a weight of its own for a copy of the embedding, whether or not the adapter needs that.
    copies = Tied.of(base_tensors, base_checkpoint.config).missing
    if untie is None and any(key in stored and key not in merged_tie.missing for key in copies):
        untie = True
    bits: MergeBits | None = "keep" if checkpoint.coded and base_checkpoint.coded else None
    sources = weighted_sources([adapter])
    inputs = read_merge_inputs(sources, base, reading, modules=modules, untie=untie, bits=bits, decoded=True)
    adapters = [weighted_label(one.label, one.weight) for one in inputs.adapters]
    for key in inputs.plan.tensors:
        if key not in tensors:
            raise MismatchError(f"{merged} has no {key}", fix="give a merged model of this base")
    # Options come first, then the certificate, then the defaults.
    settings, coded = settings_of(Path(merged)), bool(inputs.coded)
    mode = rounding or cast("RoundingMode", settings.rounding or ("stochastic" if coded else "nearest"))
    number = settings.seed or 0 if seed is None else seed

    # Progress counts entries, since the sizes of tensors differ by orders of magnitude.
    planned, untouched = inputs.plan.tensors, [key for key in base_tensors if key not in inputs.plan.tensors]
    total = sum(plan.source.size for plan in planned.values()) + sum(base_tensors[key].size for key in untouched)
    with progress("replaying the merge", total) as step:

        def replay(key: str) -> list[Verdict]:
            with place(key), name_damaged(inputs.labelled):
                # The merged model may have been written in another dtype than the base.
                dtype = stored[key].dtype if key in stored else tensors[key].dtype
                codec = inputs.codec(key, key, mode, number, dtype)
                scaled = isinstance(codec, FloatCodec) and codec.requantised
                held = checkpoint.coded.get(key) if key in inputs.coded else tensors[key] if scaled else stored[key]
                found = verdicts(prepare(codec, device=compute_device), held)
            if step:
                step(planned[key].source.size)
            return found

        def differs(key: str) -> bool:
            changed = key not in tensors or not have_same_values(base_tensors[key], tensors[key])
            if step:
                step(base_tensors[key].size)
            return changed

        # The whole model is compared, so that changes elsewhere are reported too.
        replayed = in_threads(replay, list(planned), processor_count())
        different = in_threads(differs, untouched, processor_count())
    module_verdicts = [verdict for of_tensor in replayed.values() for verdict in of_tensor]
    changed = [key for key in untouched if different[key]]
    # A file that changed while it was read would make the verdict meaningless.
    for model in (files, inputs.files):
        model.check_unchanged()
    return VerifyResult(str(merged), str(base), mode, module_verdicts, changed, adapters, coded)


def _refuse_half(has_base: bool, has_adapter: bool, options: Mapping[str, Any]) -> None:
    """Refuse a comparison with the certificate if an option says that the merge is to be repeated.

    Raises
    ------
    OptionError
        The message names the option, and what goes with it.
    """
    if has_base or has_adapter:
        present, other = ("--base", "--adapter") if has_base else ("--adapter", "--base")
        raise OptionError(
            f"{present} is given without {other}", fix="give both, or neither to compare with the certificate"
        )
    stated = [name for name, value in options.items() if value not in (None, False, (), [])]
    if stated:
        raise OptionError(
            f"{option_names(stated[0])} is only used with --base and --adapter", fix="give them, or leave it out"
        )
