"""The inputs of a merge, which `verify` and `unmerge` share: adapters with weights, the files of the base, the plan."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from numpy.typing import DTypeLike

from loralens.choices import MergeBits, ModelDtype, RoundingMode
from loralens.core.adapter import Adapter
from loralens.core.fingerprint import fingerprint
from loralens.core.lazy import LazyArray
from loralens.core.messages import progress, warn
from loralens.core.model_in_memory import ModelInMemory, ModelPath
from loralens.core.threads import in_threads, processor_count
from loralens.core.weights import CodedWeight
from loralens.errors import FormatError, LoraLensError, OptionError, place
from loralens.formats.files.atomic import Input, was_killed
from loralens.formats.files.container import Stored, read_json
from loralens.formats.files.json_text import dumps
from loralens.formats.files.location import AdapterPaths, find_adapter
from loralens.formats.files.outside import read_whole
from loralens.formats.models.checkpoint import Checkpoint, open_checkpoint
from loralens.formats.models.model_files import CONFIG, SINGLE, ModelFiles, resolve_path
from loralens.formats.models.model_writer import Change, CopyOptions, Fill, copy_bytes, write_model
from loralens.formats.records.merged_files import (
    BEFORE,
    CERTIFICATE,
    CertifiedAdapter,
    MergeSettings,
    certified_adapters,
    merge_settings,
)
from loralens.linalg.codes import BLOCK_TYPES, BlockType
from loralens.merging.changes import recast, recast_dtype
from loralens.merging.codec import PARTS, Codec, FloatCodec, GgmlCodec, GridCodec, Nf4Codec, ggml_shape, part_shape
from loralens.merging.merge_plan import MergePlan
from loralens.merging.merge_rounding import MergeRounding
from loralens.merging.planning import plan_merge
from loralens.tables.numbers import join_words, number
from loralens.verbs.merges.low_bit_base import NO_CODES, NewCodes, check_bits, check_codes, part_of, quantised_plan
from loralens.verbs.shared.adapters import Pair, labels, only_modules, read_adapter, warn_of_bases
from loralens.verbs.shared.options import Reading, check_choice

if TYPE_CHECKING:
    from loralens.formats.models.gguf_writer import NewTypes


@dataclass(frozen=True, slots=True)
class WeightedAdapter:
    """An adapter of a merge.

    Attributes
    ----------
    label : str
        Its path, or the name of an object in messages.
    adapter : Adapter
        Only the modules that are merged, with their tensors.
    weight : float
        The factor w of the update in W' = W + Σ w·ΔW.
    found : AdapterPaths or None
        Where it was read from; None for an object.
    """

    label: str
    adapter: Adapter
    weight: float
    found: AdapterPaths | None

    def record(self) -> dict[str, Any]:
        """Path, weight and fingerprint as a JSON object, for certificates and undo files.

        All numbers of the adapter are read for the fingerprint.
        """
        return {"path": self.label, "weight": self.weight, "fingerprint": fingerprint(self.adapter)}


@dataclass(frozen=True, slots=True)
class MergeInputs:
    """Adapters, the files of their base, and the plan of their merge.

    Attributes
    ----------
    base : str
        The path or Hub id that was given.
    checkpoint : Checkpoint
        The weights of the base as numbers.
    dtypes : mapping of str to dtype
        Key of a planned tensor → the dtype in which it is written, if that may be another than its own.
    dtype : str or None
        The dtype that was asked for, for the whole model.
    coded : mapping of str to CodedWeight
        The weights whose codes the merge moves, by the keys of the plan; empty if it writes floats.
    decoded : mapping of str to CodedWeight
        The weights that the base stores quantised and the merge takes as floats.
    bits : str or None
        The codes of the merged model; None for floats.
    quantised : NewCodes
        The weights of floats that the merged model stores as new codes.
    """

    base: str
    checkpoint: Checkpoint
    plan: MergePlan
    adapters: Sequence[WeightedAdapter]
    dtype: str | None = None
    dtypes: Mapping[str, np.dtype[Any]] = field(default_factory=dict)
    coded: Mapping[str, CodedWeight] = field(default_factory=dict)
    decoded: Mapping[str, CodedWeight] = field(default_factory=dict)
    bits: MergeBits | None = None
    quantised: NewCodes = NO_CODES

    @property
    def files(self) -> ModelFiles:
        """The files of the base."""
        return self.checkpoint.files

    @property
    def labelled(self) -> list[tuple[str, Adapter]]:
        """The adapters with their names in messages."""
        return [(term.label, term.adapter) for term in self.adapters]

    @property
    def planned(self) -> dict[str, str]:
        """The key of every tensor that the merge writes → the key of its plan; for codes the two may differ."""
        if self.bits == "nf4":
            codes = self.quantised.keys
            written = {key + part: key for key in self.plan.tensors if key in codes for part in PARTS}
            return written | {key: key for key in self.plan.tensors if key not in codes}
        named = {} if self.files.gguf else self.coded
        return {named[key].stored if key in named else key: key for key in self.plan.tensors}

    def changes(self) -> dict[str, Change]:
        """Dtype and shape of every tensor that the merge writes. Those of codes are the ones of the base."""
        stored = self.files.stored

        def change(written: str, key: str) -> Change:
            if key in self.coded:
                return Change(stored[written].dtype, stored[written].shape)
            type_ = self.block_type(key)
            if type_:
                return Change(np.dtype(np.uint8), ggml_shape(type_, self.plan.tensors[key]))
            if key in self.quantised.keys:
                return Change(*part_shape(part_of(written, key), self.plan.tensors[key]))
            return Change(self.dtype_of(key), self.plan.tensors[key].shape)

        return {written: change(written, key) for written, key in self.planned.items()}

    def codec(self, written: str, key: str, mode: RoundingMode, seed: int, dtype: DTypeLike | None = None) -> Codec:
        """How a tensor that the merge writes holds the weight of the plan ``key``; ``dtype`` is that of floats."""
        plan, rounding = self.plan.tensors[key], MergeRounding(mode, seed, key)
        gguf, type_ = self.files.gguf, self.block_type(key)
        if key in self.coded:
            # Only a record needs the stored tensor, whose key may be another than that of the weight.
            return GridCodec(plan, self.coded[key], rounding, written, self.files.stored.get(written))
        if type_ and gguf:
            return GgmlCodec(plan, type_, gguf.weights[written].order)
        if key in self.quantised.keys:
            return Nf4Codec(plan, part_of(written, key))
        return FloatCodec(plan, dtype or self.dtype_of(key), rounding)

    def dtype_of(self, key: str) -> np.dtype[Any]:
        """The dtype of floats in which a tensor of the plan is written."""
        return self.dtypes.get(key, self.plan.tensors[key].dtype)

    def block_type(self, key: str) -> BlockType | None:
        """The type of ggml that a weight of floats becomes; None if it becomes none."""
        types = self.quantised.types
        return BLOCK_TYPES[types.kinds[key]] if types and key in types.kinds else None

    @property
    def laid_anew(self) -> bool:
        """Whether the merge has no undo file: all weights are stored anew, or a GGUF file gets another tensor."""
        gguf = self.files.gguf
        new = gguf is not None and (self.dtype is not None or bool(self.plan.tensors.keys() - gguf.weights.keys()))
        return bool(self.quantised.keys) or new

    @property
    def narrowest(self) -> str:
        """The dtype of adapted weights with the fewest bytes, since rounding loses most of an update there."""
        dtypes = [self.dtype_of(key) for key, tensor in self.plan.tensors.items() if tensor.segments]
        # The name decides between float16 and bfloat16, so that a model with both is always described in the same way.
        return str(min(dtypes, key=lambda dtype: (dtype.itemsize, str(dtype)), default="float32"))

    def places(self, base: str = "the base") -> list[Input]:
        """All places that are read, each with its name in messages; ``base`` is the name of the base."""
        adapters = [place for adapter in self.adapters if adapter.found for place in adapter.found.inputs]
        # The given path may be a Hub id or a link, and then the files lie elsewhere.
        return [(base, self.files.root), (base, Path(self.base)), *adapters]

    def texts(self) -> dict[str, str]:
        """Name → new content of the files beside the weights that a merge changes, which is at most ``config.json``."""
        path = self.files.root / CONFIG
        if not self.plan.config or not path.is_file():
            return {}
        # A None in the plan removes a field, and a None in the file stays.
        removed = {name for name, value in self.plan.config.items() if value is None}
        content = {**read_json(path), **self.plan.config}
        return {CONFIG: dumps({name: value for name, value in content.items() if name not in removed})}

    def originals(self) -> dict[str, Any]:
        """What an undo file stores of the base besides numbers: dropped keys, texts that change, headers of shards."""
        root = self.files.root
        # The index of shards changes with new and untied tensors, and unmerge restores all files byte for byte.
        names = [*self.texts(), *(index.name for index in self.files.indices)]
        return {
            "dropped": list(self.plan.dropped),
            "texts": {name: read_whole(root / name).decode("utf-8") for name in names},
            # Without the first 8 bytes, which are the length of the header; as a view, since a header may be long.
            "headers": {shard.name: str(memoryview(shard.header)[8:], "utf-8") for shard in self.files.shards},
        }


@contextmanager
def base_on_disk(base: ModelPath) -> Iterator[Path | None]:
    """The folder of the files of a base in memory, which a merge copies; it is removed after the block.

    None for a base that has files of its own.
    """
    if not isinstance(base, ModelInMemory):
        yield None
        return
    from loralens.formats.files.adapter_files import write_safetensors  # few bases are in memory

    with TemporaryDirectory(prefix="loralens-base-") as name:
        folder = Path(name)
        # diffusers looks for weights under a name of its own.
        usual = SINGLE["_class_name" in base.config]
        write_safetensors(Stored(base.tensors, {"format": "pt"}), folder / usual)
        if base.config:
            (folder / CONFIG).write_text(dumps(base.config), encoding="utf-8")
        yield folder


def read_merge_inputs(
    adapters: Sequence[Pair],
    base: ModelPath,
    reading: Reading,
    *,
    modules: Sequence[str] = (),
    allow_missing: bool = False,
    untie: bool | None = None,
    dtype: str | None = None,
    bits: MergeBits | None = None,
    decoded: bool = False,
    folder: Path | None = None,
) -> MergeInputs:
    """Read the adapters, open the base, and plan the merge. No number of the base is read yet.

    Parameters
    ----------
    adapters : sequence of (path or Adapter, float)
    base : path or model
        The base model. For ``unmerge --adapter`` it is the merged one, which has the same tensors.
    reading : Reading
    modules : sequence of str
        Only modules whose name or kind matches one of these glob patterns.
    allow_missing : bool
        Leave out modules that have no weight in the base.
    untie : bool, optional
        Whether a head that shares the embedding's weight gets a weight of its own; by default if the adapters need it.
    dtype : str, optional
        NumPy's name of the dtype of the merged model; by default every tensor keeps its own.
    bits : str, optional
        ``keep``: the weights of a low-bit base stay codes.
    decoded : bool
        Take quantised weights as float32 even without a dtype, to compare with them.
    folder : Path, optional
        The files of a base in memory, see `base_on_disk`.

    Raises
    ------
    FormatError
        A file cannot be read, or an adapter was trained on a changed base.
    MismatchError
        Adapters and base do not fit together.
    OptionError
        A glob pattern matches no module, an option contradicts the adapters, or the base is quantised and
        nothing says what the merged model stores.
    """
    weighted = _read_weighted(adapters, base, reading, modules)
    checkpoint = open_checkpoint(folder or base)
    stored = checkpoint.files.tensors
    if not decoded:
        check_bits(str(base), checkpoint, [term.adapter for term in weighted], bits=bits, dtype=dtype)
    scales = {key: scale for key, (_, scale) in checkpoint.float8.items()}
    # The scales of float8 weights are not weights, and would look like tensors that nothing adapts. Neither are the
    # codes of low-bit weights, which are planned as the numbers that they stand for.
    tensors = {key: tensor if key in checkpoint.coded else stored[key] for key, tensor in checkpoint.tensors.items()}
    try:
        planned = plan_merge(
            [(term.adapter, term.weight) for term in weighted],
            tensors,
            config=checkpoint.config,
            conv1d=checkpoint.conv1d,
            allow_missing=allow_missing,
            untie=untie,
            dtype=dtype,
            scales=scales,
        )
    except LoraLensError as error:
        # A FormatError is about an adapter alone; every other error is about an adapter and this base.
        names = ", ".join(term.label for term in weighted)
        raise error.at(names if isinstance(error, FormatError) else str(base)) from None
    inputs = MergeInputs(str(base), checkpoint, planned, weighted, dtype, bits=bits)
    return _with_output(inputs, tensors)


def _read_weighted(
    adapters: Sequence[Pair], base: ModelPath, reading: Reading, modules: Sequence[str]
) -> list[WeightedAdapter]:
    """The adapters, each with only the modules that match; a warning if they belong to different bases."""
    names = labels([source for source, _ in adapters])
    weighted: list[WeightedAdapter] = []
    for label, (source, weight) in zip(names, adapters, strict=True):
        # applies_all is set because a merge also applies magnitudes and full differences, which other verbs leave out.
        found = None if isinstance(source, Adapter) else find_adapter(source)
        adapter = read_adapter(found or source, reading, base=base, applies_all=True, label=label)
        with place(label):
            weighted.append(WeightedAdapter(label, only_modules(adapter, modules), weight, found))
    warn_of_bases(names, [term.adapter for term in weighted])
    return weighted


def _with_output(inputs: MergeInputs, tensors: Mapping[str, LazyArray]) -> MergeInputs:
    """The inputs with what the merged model stores: the codes of the base, new codes, or floats of some dtype."""
    files, planned, bits, dtype, checkpoint = inputs.files, inputs.plan, inputs.bits, inputs.dtype, inputs.checkpoint
    if bits == "keep":
        coded = {key: weight for key, weight in checkpoint.coded.items() if key in planned.tensors}
        with place(inputs.base):
            check_codes(planned, coded)
        return replace(inputs, coded=coded)
    if bits is not None:
        with place(inputs.base):
            planned, new = quantised_plan(planned, files, checkpoint.config, bits)
        return replace(inputs, plan=planned, quantised=new)
    if files.gguf:
        from loralens.formats.models.gguf_writer import float_dtypes  # GGUF takes 15 ms to import, and few bases are

        # The writer decodes what the merge does not change; vectors stay float32, as llama.cpp wants them.
        kinds = float_dtypes(files.gguf, np.dtype(dtype)) if dtype else {}
        # A new head has the dtype that was asked for, or that of the embedding.
        dtypes = {key: kinds.get(key, np.dtype(dtype or tensor.dtype)) for key, tensor in planned.tensors.items()}
        return replace(inputs, dtypes=dtypes, decoded=checkpoint.coded)
    codes = {weight.stored for weight in checkpoint.coded.values()}
    planned = recast(
        planned,
        tensors,
        dtype,
        scales={key: scale for key, (_, scale) in checkpoint.float8.items()},
        coded=checkpoint.coded,
        without=[key for key in files.tensors if key not in tensors or key in codes],
        config=checkpoint.config,
    )
    # This comes after recast, which adds the tensors of which only the dtype changes.
    dtypes = {key: recast_dtype(tensor, dtype) for key, tensor in planned.tensors.items()}
    return replace(inputs, plan=planned, dtypes=dtypes, decoded=checkpoint.coded)


def record_path(model: Path, name: str, *, folder: bool | None = None) -> Path:
    """The usual place of an undo file or a certificate: in the model's folder, or beside its only file.

    Beside a file it is ``MODEL.NAME``, so that the records of several models in one folder are told apart. ``folder``
    says which a model is that does not exist yet.
    """
    if folder is None:
        model = resolve_path(model)
        folder = model.is_dir()
    return model / name if folder else model.with_name(f"{model.stem}.{name}")


def check_subtracted(merged: Path, inputs: MergeInputs) -> None:
    """Warn if the adapters to be subtracted are not those in the certificate of the merged model, if there is one."""
    certificate = record_path(merged, CERTIFICATE)
    merged_in = certified_adapters(certificate)
    requested = [CertifiedAdapter(fingerprint(one.adapter), one.weight) for one in inputs.adapters]
    # The update of one of several adapters can be subtracted alone.
    if merged_in and sorted(requested) != sorted(merged_in):
        weights = " and ".join(number(one.weight) for one in merged_in)
        warn(
            f"{merged}: {certificate.name} says that other adapters were merged, or with other weights ({weights})",
            "give the adapters that it names, with these weights, or use the undo file",
        )


def warn_of_repeats(adapters: Sequence[Mapping[str, Any]], inputs: MergeInputs) -> None:
    """Warn of an adapter that is given twice, or that an earlier merge put into the base.

    ``adapters`` are as a certificate records them.
    """
    paths: dict[str, list[str]] = {}
    for each in adapters:
        paths.setdefault(each["fingerprint"], []).append(each["path"])
    # The certificate of the last merge, and in a folder those of the merges before it.
    earlier, certificate = dict[str, str](), record_path(inputs.files.root, CERTIFICATE)
    while certificate.is_file():
        for one in certified_adapters(certificate):
            earlier.setdefault(one.fingerprint, certificate.name)
        certificate = certificate.parent / BEFORE / CERTIFICATE if inputs.files.root.is_dir() else Path()
    for merged_in, same in paths.items():
        if len(same) > 1:
            what = (
                f"{same[0]} is given {len(same)} times"
                if len({*same}) == 1
                else f"{join_words(same)} are the same adapter"
            )
            warn(f"{what}, which is merged with the sum of the weights", "give it once")
        if merged_in in earlier:
            warn(
                f"{same[0]} was merged into {inputs.base} before, as {earlier[merged_in]} says: it is added a second "
                "time",
                "give the model without it as --base, or undo this merge with loralens unmerge",
            )


def settings_of(merged: Path) -> MergeSettings:
    """How a merged model was made, by the certificate in its folder or beside it; damaged words count as unknown."""
    settings = merge_settings(record_path(merged, CERTIFICATE))
    return settings if settings.rounding in get_args(RoundingMode) else settings._replace(rounding=None)


def choose_rounding(rounding: RoundingMode | None, *, bits: MergeBits | None, dtype: ModelDtype) -> RoundingMode:
    """The rounding of a merge: the one that was asked for, or else the one that keeps the adapter.

    Raises
    ------
    OptionError
        The rounding does not exist, or does not go with the output.
    """
    check_choice("bits", bits, get_args(MergeBits))
    if bits is not None and dtype != "keep":
        raise OptionError("--bits and --dtype exclude each other", fix="give --bits for codes, or --dtype for floats")
    if rounding is None:
        # Almost no update reaches the next code, so rounding to the nearest would lose it.
        rounding = "stochastic" if bits == "keep" else "nearest"
    check_choice("rounding", rounding, get_args(RoundingMode))
    if bits != "keep":
        if bits is not None and rounding != "nearest":
            raise OptionError(
                f"--bits {bits} rounds to the nearest code, as its own software does", fix="leave out --rounding"
            )
        return rounding
    if rounding == "feedback":
        raise OptionError(
            "error feedback shrinks an update on a coarse grid: it keeps 0.1 to 0.4 of it",
            fix="use --rounding stochastic",
        )
    if rounding == "nearest":
        warn("rounding to the nearest code loses nearly all of an adapter", "leave out --rounding")
    return rounding


def copy_model(
    label: str,
    files: ModelFiles,
    target: Path | None,
    *,
    changes: Mapping[str, Change],
    fill: Fill,
    copies: Mapping[str, LazyArray] | None = None,
    dtype: str | None = None,
    types: "NewTypes | None" = None,
    options: CopyOptions = CopyOptions(),  # noqa: B008 - it is frozen
) -> None:
    """Write a changed copy of a model; without a target, compute all its tensors and write none of them.

    The parameters are those of `write_model`. ``label`` is the text beside the progress bar. ``copies`` are the
    unchanged tensors that have to be read even without a target. ``dtype`` is NumPy's name of the dtype of a copy in
    floats. Only the writer of GGUF needs ``dtype`` and ``types``. For safetensors ``changes`` says which dtypes are
    written.
    """
    if target is None:

        def compute(key: str) -> None:
            for rows in fill(key):
                if step:
                    step(rows.nbytes)

        unchanged = copies or {}
        with progress(label, copy_bytes(unchanged, changes)) as step:
            in_threads(compute, [*changes, *unchanged], processor_count())
        return
    options = replace(options, threads=processor_count())
    if not files.gguf:
        with progress(label, copy_bytes(files.tensors, changes)) as step:
            write_model(files, target, changes=changes, fill=fill, options=replace(options, step=step))
        return
    # What reads and writes GGUF takes 15 ms to import, and few bases are GGUF.
    from loralens.formats.models.gguf_writer import float_types, gguf_copy_bytes, write_gguf_copy

    types = float_types(files.gguf, np.dtype(dtype)) if dtype else types
    with progress(label, gguf_copy_bytes(files.gguf, changes, types)) as step:
        write_gguf_copy(files, target, changes=changes, fill=fill, types=types, options=replace(options, step=step))


def warn_if_killed(model: Path) -> None:
    """Warn of a model beside which a killed merge left its unfinished copy: the records may be those of that merge."""
    if was_killed(model):
        warn(
            f"{model}: a run that was to replace it was killed, so its records may be those of that run",
            "repeat that merge with --overwrite",
        )
