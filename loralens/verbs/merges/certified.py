"""What the certificates of earlier merges say about the adapters that are given now."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from loralens.choices import RoundingMode
from loralens.core.fingerprint import fingerprint
from loralens.core.messages import warn
from loralens.errors import OptionError
from loralens.formats.models.model_files import resolve_path
from loralens.formats.records.merged import (
    BEFORE,
    CERTIFICATE,
    CertifiedAdapter,
    MergeSettings,
    certified_adapters,
    merge_settings,
)
from loralens.tables.numbers import join_words, number
from loralens.verbs.merges.merge_inputs import MergeInputs, WeightedAdapter, record_path


def check_subtracted(merged: Path, inputs: MergeInputs) -> None:
    """Warn if the adapters to be subtracted are not those in the certificate of the merged model, if there is one."""
    root = resolve_path(merged)
    certificate = record_path(root, CERTIFICATE, folder=root.is_dir())
    merged_in = certified_adapters(certificate)
    if not merged_in:
        return
    requested = [CertifiedAdapter(fingerprint(one.adapter), one.weight) for one in inputs.adapters]
    if sorted(requested) == sorted(merged_in):
        return
    what, fix = _difference_of_adapters(inputs.adapters, requested, merged_in)
    # The update of one of several adapters can be subtracted alone.
    warn(f"{merged}: {certificate.name} says that {what}", f"{fix}, or use the undo file")


def _difference_of_adapters(
    adapters: Sequence[WeightedAdapter], requested: Sequence[CertifiedAdapter], merged_in: Sequence[CertifiedAdapter]
) -> tuple[str, str]:
    """In what the adapters that are given differ from those of a merge, and what to do about it.

    Parameters
    ----------
    adapters, requested : sequence
        The adapters that are given, and their records.
    merged_in : sequence of CertifiedAdapter
        The records of those that were merged.
    """
    # With several adapters, the weights alone do not tell which of them differs.
    if [one.fingerprint for one in requested] != [one.fingerprint for one in merged_in]:
        return "other adapters were merged than the given ones", "give the adapters that the certificate names"
    weights = ", ".join(number(one.weight) for one in merged_in)
    what = f"the adapter was merged with the weight {weights}, and not {number(requested[0].weight)}"
    if len(requested) > 1:
        what = f"the adapters were merged with the weights {weights}"
    right = zip(adapters, merged_in, strict=True)
    return what, "give " + " and ".join(f"{one.label}:{number(held.weight)}" for one, held in right)


def warn_of_repeats(adapters: Sequence[Mapping[str, Any]], inputs: MergeInputs) -> None:
    """Warn of an adapter that is given twice, or that an earlier merge put into the base.

    Parameters
    ----------
    adapters : sequence of mapping
        The adapters as a certificate records them.
    inputs : MergeInputs
    """
    paths = {each["fingerprint"]: each["path"] for each in reversed(adapters)}
    for fingerprint_given, times in Counter(each["fingerprint"] for each in adapters).items():
        path = paths[fingerprint_given]
        if times > 1:
            same = [each["path"] for each in adapters if each["fingerprint"] == fingerprint_given]
            what = f"{path} is given {times} times" if len({*same}) == 1 else f"{join_words(same)} are the same adapter"
            warn(f"{what}, which is merged with the sum of the weights", "give it once")
        for certificate in _certificates(inputs.files.root):
            if any(one.fingerprint == fingerprint_given for one in certified_adapters(certificate)):
                record_text = f"as {certificate.name} says: it is added a second time"
                warn(
                    f"{path} was merged into {inputs.base} before, {record_text}",
                    "give the model without it as --base, or undo this merge with loralens unmerge",
                )
                break


def _certificates(root: Path) -> Iterator[Path]:
    """The certificates of a model: that of the last merge, and in a folder those of the merges before it."""
    path = record_path(root, CERTIFICATE, folder=root.is_dir())
    while path.is_file():
        yield path
        if not root.is_dir():
            return
        path = path.parent / BEFORE / CERTIFICATE


def settings_of(merged: Path) -> MergeSettings:
    """How a merged model was made, by the certificate in its folder or beside it; damaged words count as unknown.

    Raises
    ------
    OptionError
        It was made by a sweep.
    """
    root = resolve_path(merged)
    settings = merge_settings(record_path(root, CERTIFICATE, folder=root.is_dir()))
    if settings.rounding == "sweep":
        raise OptionError(
            f"{merged}: its codes were moved by a sweep, which loralens no longer repeats",
            fix="restore its base by its undo file, or use the last commit that repeats a sweep, 31ab7467",
        )
    return settings if settings.rounding in get_args(RoundingMode) else settings._replace(rounding=None)
