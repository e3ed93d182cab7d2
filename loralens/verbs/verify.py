"""The verb ``verify``: tests whether a merged model contains an adapter, and how faithfully."""

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Unpack, get_args, overload

from loralens.choices import MergeBits, RoundingMode
from loralens.core.lazy import LazyArray
from loralens.core.progress import progress
from loralens.core.threads import in_threads, processor_count
from loralens.errors import MismatchError, OptionError, place
from loralens.formats.models.checkpoint import model_config, open_checkpoint
from loralens.formats.models.model_files import model_files
from loralens.formats.models.model_location import resolve_path
from loralens.linalg.device import Device
from loralens.merging.plan import TensorPlan
from loralens.merging.tied_weights import Tied
from loralens.merging.verify import Verdict, have_same_values, verdicts
from loralens.verbs.inputs.adapters import Reading, stated_options
from loralens.verbs.inputs.choices import Blocks, as_globs, check_choice
from loralens.verbs.inputs.merge_inputs import read_merge_inputs
from loralens.verbs.inputs.weighted import Weighted, name_damaged, weighted_label, weighted_sources
from loralens.verbs.outputs.merges.certificate_check import CertificateResult, check_certificate
from loralens.verbs.outputs.merges.replay import Replay
from loralens.verbs.outputs.merges.verify_result import VerifyResult
from loralens.verbs.outputs.rules import option_names


@overload
def verify(merged: str | PathLike[str]) -> CertificateResult: ...
@overload
def verify(
    merged: str | PathLike[str],
    *,
    base: str | PathLike[str],
    adapter: Weighted,
    rounding: RoundingMode | None = None,
    seed: int | None = None,
    untie: bool | None = None,
    device: str = "cpu",
    modules: Sequence[str] = (),
    block: Blocks = (),
    **reading: Unpack[Reading],
) -> VerifyResult: ...
def verify(
    merged: str | PathLike[str],
    *,
    base: str | PathLike[str] | None = None,
    adapter: Weighted = (),
    rounding: RoundingMode | None = None,
    seed: int | None = None,
    untie: bool | None = None,
    device: str = "cpu",
    modules: Sequence[str] = (),
    block: Blocks = (),
    **reading: Unpack[Reading],
) -> VerifyResult | CertificateResult:
    """Test for every module of an adapter whether a merged model holds its update, by repeating the merge.

    exact: every bit is the one that loralens writes. rounded: the update is there in full, with another rounding.
    partial: the strength of the update is below 0.9 or above 1.1, or differs from what the rounding predicts. absent:
    the strength is below 0.1, as in the base or another model. If the rounding itself lost an update, it is partial or
    absent, even if every bit is the one that loralens writes. The answer for the model is that of its worst module.

    Without ``base`` and ``adapter`` every tensor is compared with its hash in the certificate that the merge left in
    the folder of ``merged``. That shows whether the model was changed since, and not whether an adapter is in it.

    The strength is the gain ⟨M − W, D⟩/‖D‖², with the merged weight M, the weight W of the base, and the update D. The
    formulas and the standard error of the gain are in `loralens.merging.verify`.

    Parameters
    ----------
    merged : path
        The model that may hold the adapter.
    base : path, optional
        The base model: a folder, a safetensors or GGUF file, or a Hub id in the local cache.
    adapter : path or Adapter, pair, mapping, or sequence of these, optional
        The adapters that may have been merged, with their weights: ``"a"``, ``("a", 0.7)`` or ``{"a": 0.7, "b": 0.3}``.
    rounding : str, optional
        How the merge rounded the new weights: ``nearest``, ``stochastic`` or ``feedback``. By default what the
        certificate of the merge says; without one ``nearest``, or ``stochastic`` for the codes of a low-bit base.
    seed : int, optional
        Seed of the random numbers for stochastic rounding, by default what the certificate says; without one 0.
    untie : bool, optional
        Whether the merge gave the head a weight of its own; by default as in ``merged``, or if the adapter needs one.
    device : str
        The device for computations on W: ``cpu``, ``cuda`` or ``cuda:N``. The result has the same bits on every device.
    modules : sequence of str
        Only modules whose name or kind matches one of these glob patterns.
    block : int, str or sequence of them
        Only modules in these blocks: ``3``, ``"4-8"``, or ``"IN04"`` of an image model.
    **reading : Reading
        How files are read: ``format``, ``alpha``, ``scale``, ``once``.

    Raises
    ------
    OptionError
        There is no such rounding or device, or a glob pattern matches no module; one of ``base`` and ``adapter`` is
        missing, or both are and there is no certificate.
    MismatchError
        The merged model lacks a tensor of the base, or the adapter belongs to another base.
    FormatError
        A file cannot be read.
    """
    modules = as_globs(modules, block)
    check_choice("rounding", rounding, get_args(RoundingMode))
    # () and an empty list from the command line mean that no adapter was given; an empty text is a wrong path.
    has_adapter = isinstance(adapter, str | PathLike) or bool(adapter)
    if base is None or not has_adapter:
        others_set = {"rounding": rounding, "seed": seed, "untie": untie, "device": device != "cpu"}
        _refuse_half(base is not None, has_adapter, {**others_set, "modules": modules, **stated_options(reading)})
        return check_certificate(merged)
    compute_device = Device.of(device)  # a device that does not exist is refused before the work
    # ``shown`` gives a shared weight under all its names, so that planned tensors are found whether or not the merge
    # untied them. ``tensors`` are multiplied by float8 scales; ``stored`` are as the file has them, and codes of a few
    # bits are decoded in both.
    checkpoint = open_checkpoint(Path(merged))
    merged_tie = Tied.of(checkpoint.tensors, model_config(Path(merged)) or {})
    tensors, files = merged_tie.ties.with_copies(checkpoint.tensors), model_files(resolve_path(Path(merged)))
    decoded = {key: checkpoint.tensors[key] for key in checkpoint.coded}
    stored = merged_tie.ties.with_copies({**files.tensors, **decoded})
    base_checkpoint = open_checkpoint(Path(base))
    base_tensors = base_checkpoint.tensors
    if untie is None and _has_untied(base_tensors, Path(base), stored, merged_tie):
        untie = True
    bits: MergeBits | None = "keep" if checkpoint.coded and base_checkpoint.coded else None
    sources = weighted_sources([adapter])
    inputs = read_merge_inputs(sources, base, reading, modules=modules, untie=untie, bits=bits, decoded=True)
    adapters = [weighted_label(one.label, one.weight) for one in inputs.adapters]
    for key in inputs.plan.tensors:
        if key not in tensors:
            raise MismatchError(f"{merged} has no {key}", fix="give a merged model of this base")
    replay = Replay.of(Path(merged), inputs, rounding=rounding, seed=seed, device=compute_device)

    def verdicts_on(key: str) -> list[Verdict]:
        """The verdicts on the modules of one tensor."""
        with place(key), name_damaged(inputs.labelled):
            if key in inputs.coded:
                return replay.verdicts_on_codes(key)
            # The merged model may have been written in another dtype than the base.
            merge = replay.prepare(key, stored[key].dtype if key in stored else tensors[key].dtype)
            return verdicts(merge, tensors[key] if merge.requantised else stored[key])

    module_verdicts, changed = _compare(inputs.plan.tensors, tensors, base_tensors, verdicts_on)
    # A file that changed while it was read would make the verdict meaningless.
    for model in (files, inputs.files):
        model.check_unchanged()
    coded = bool(inputs.coded)
    return VerifyResult(str(merged), str(base), replay.rounding, module_verdicts, changed, adapters, coded)


def _compare(
    planned: Mapping[str, TensorPlan],
    tensors: Mapping[str, LazyArray],
    base_tensors: Mapping[str, LazyArray],
    verdicts_on: Callable[[str], list[Verdict]],
) -> tuple[list[Verdict], list[str]]:
    """The verdicts on all planned tensors, and the other tensors that are not those of the base."""

    def replay(key: str) -> list[Verdict]:
        results = verdicts_on(key)
        if step:
            step(planned[key].source.size)
        return results

    def differs(key: str) -> bool:
        changed = key not in tensors or not have_same_values(base_tensors[key], tensors[key])
        if step:
            step(base_tensors[key].size)
        return changed

    # The whole model is compared, so that changes elsewhere are reported too.
    untouched, threads = [key for key in base_tensors if key not in planned], processor_count()
    # Progress counts entries, since the sizes of tensors differ by orders of magnitude.
    sizes = [planned[key].source.size for key in planned] + [base_tensors[key].size for key in untouched]
    with progress("replaying the merge", sum(sizes)) as step:
        replayed = in_threads(replay, list(planned), threads)
        changed = in_threads(differs, untouched, threads)
    return [verdict for of_tensor in replayed.values() for verdict in of_tensor], [k for k in untouched if changed[k]]


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


def _has_untied(
    base_tensors: Mapping[str, LazyArray], base: Path, stored: Mapping[str, LazyArray], merged_tie: Tied
) -> bool:
    """Whether a merge stored a weight of its own for a copy of the embedding, whether or not the adapter needs that."""
    copies = Tied.of(base_tensors, model_config(base) or {}).missing
    return any(key in stored and key not in merged_tie.missing for key in copies)
