"""Whether a merged model is still as its merge wrote it: its tensors are compared with those of the certificate."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from loralens.core.names import some
from loralens.core.progress import progress
from loralens.core.threads import in_threads, processor_count
from loralens.errors import FormatError, OptionError, place
from loralens.formats.files.container import read_json
from loralens.formats.models.model_files import ModelFiles, model_files
from loralens.formats.models.model_location import resolve_path
from loralens.formats.records.merged import CERTIFICATE, FILES, file_sizes, is_certificate
from loralens.merging.matrix import MatrixRows
from loralens.merging.plan import as_matrix
from loralens.merging.record import hash_rows
from loralens.merging.summary import Hashed, model_hash
from loralens.tables.numbers import count
from loralens.tables.result import Tabular
from loralens.tables.table import ALWAYS, Column, Table
from loralens.verbs.inputs.merge_inputs import record_path
from loralens.verbs.inputs.weighted import weighted_label
from loralens.verbs.outputs.merges.model_copy import warn_if_killed

State = Literal["unchanged", "changed", "missing", "added"]
_FIX = "give --base and --adapter: the merge is then repeated and compared"


@dataclass(frozen=True, slots=True)
class CheckedTensor:
    """One row: a stored tensor, and whether it is as the certificate describes it."""

    name: str
    state: State


COLUMNS: tuple[Column[CheckedTensor], ...] = (
    Column("name", lambda row: row.name, "tensor", align="left", priority=ALWAYS),
    Column("state", lambda row: row.state, "state", align="left", priority=ALWAYS),
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
        Every tensor of the model and of the certificate; empty if the certificate does not list them, as older
        ones do not.
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

    def __repr__(self) -> str:
        return f"CertificateResult({'unchanged' if self.unchanged else 'changed'}, {len(self.tensors)} tensors)"

    def conclusion(self) -> list[str]:
        """Whether the model is unchanged, or which tensors changed."""
        merge = f"the merge that the certificate describes ({' + '.join(self.adapters)} into {self.base})"
        if self.unchanged:
            return [f"{self.merged} is unchanged since {merge}."]
        if not self.tensors:
            return [f"{self.merged} was changed since {merge}; which tensors, this older certificate does not say."]
        changed, of = self.changed, count(len(self.tensors), "tensor")
        return [f"{self.merged}: {len(changed)} of {of} changed since {merge}: {some(changed)}."]

    def tables(self) -> list[Table[CheckedTensor]]:
        """The tensors, one per row."""
        return [
            Table(
                "tensors that are not as they were merged",
                COLUMNS,
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

    def record(self) -> dict[str, Any]:
        """The result as a JSON object."""
        return {
            "merged": self.merged,
            "certificate": self.certificate,
            "base": self.base,
            "adapters": list(self.adapters),
            "unchanged": self.unchanged,
            "tensors": self.tables()[0].records(),
            "files_changed": list(self.files_changed),
        }


def check_certificate(merged: str | os.PathLike[str]) -> CertificateResult:
    """Compare every tensor of a model with the hashes in the certificate of its merge.

    Raises
    ------
    OptionError
        There is no certificate in the model's folder, or beside a model that is a single file.
    FormatError
        The certificate is damaged, or a file cannot be read.
    """
    root = resolve_path(Path(merged))
    files = model_files(root)
    path = record_path(root, CERTIFICATE, folder=root.is_dir())
    if not path.is_file():
        raise OptionError(f"{merged}: has no certificate of a merge ({path.name})", fix=_FIX)
    with place(path):
        if not is_certificate(path):
            raise FormatError("is not the certificate of a merge", fix=_FIX)
        certificate = read_json(path)
        stated_hash, listed = _hashes(certificate)
        base, adapters = _merge_of(certificate)
    hashes = _hash_tensors(files)
    files.check_unchanged()
    tensors = []
    for key in sorted({*hashes, *listed}) if listed else ():
        state: State = "missing" if key not in hashes else "added" if key not in listed else "unchanged"
        if state == "unchanged" and hashes[key] != listed[key]:
            state = "changed"
        tensors.append(CheckedTensor(key, state))
    unchanged = all(row.state == "unchanged" for row in tensors) if listed else model_hash(hashes) == stated_hash
    if not unchanged:
        warn_if_killed(root)
    changed_files = _changed_files(root, certificate) if root.is_dir() else []
    return CertificateResult(str(merged), str(path), base, adapters, unchanged, tensors, changed_files)


def _hashes(certificate: Mapping[str, Any]) -> tuple[str, dict[str, Hashed]]:
    """The hash of the merged model that a certificate states, and those of its tensors as far as it lists them."""
    try:
        result = certificate["result"]
        listed = {
            str(key): Hashed(str(tensor["dtype"]), tuple(tensor["shape"]), str(tensor["sha256"]))
            for key, tensor in (result.get("tensors") or {}).items()
        }
        model_sha256 = result["sha256"]
    # These are all errors that wrong types and missing keys can cause.
    except (KeyError, TypeError, AttributeError) as error:
        raise FormatError("its hashes are damaged", fix=_FIX) from error
    if not isinstance(model_sha256, str):
        raise FormatError("it states no hash of the merged model", fix=_FIX)
    return model_sha256, listed


def _merge_of(certificate: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The base and the adapters of the merge, as text."""
    try:
        adapters = [weighted_label(str(one["path"]), float(one["weight"])) for one in certificate["adapters"]]
        return str(certificate["base"]["path"]), adapters
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise FormatError("its list of adapters is damaged", fix=_FIX) from error


def _hash_tensors(files: ModelFiles) -> dict[str, Hashed]:
    tensors = files.stored

    def hashed(key: str) -> Hashed:
        tensor = tensors[key]
        digest = hash_rows(MatrixRows(tensor, as_matrix(tensor.shape)).blocks(), tensor.nbytes)
        if step:
            step(tensor.nbytes)
        return Hashed(str(tensor.dtype), tensor.shape, digest)

    with progress("hashing", sum(tensor.nbytes for tensor in tensors.values())) as step:
        return in_threads(hashed, list(tensors), processor_count())


def _changed_files(folder: Path, certificate: Mapping[str, Any]) -> list[str]:
    """The files that the merge wrote beside the weights, and that are gone or have another size."""
    listed = certificate.get(FILES)
    sizes = file_sizes(folder)
    return [name for name, size in listed.items() if sizes.get(name) != size] if isinstance(listed, dict) else []
