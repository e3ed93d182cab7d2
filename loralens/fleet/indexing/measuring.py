"""Measuring files, in this process or in any other: paths in, plain data out."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from json import dumps
from math import fsum
from pathlib import Path
from typing import Any, Literal, final

import numpy as np

from loralens.analysis.inspection import count_non_finite
from loralens.core.adapter import Adapter
from loralens.core.fingerprint import BLOCK, fingerprint
from loralens.core.lazy import LazyArray, row_blocks
from loralens.core.lowrank import LowRank
from loralens.core.names import normal_form
from loralens.errors import FormatError, LoraLensError, OptionError
from loralens.fleet.catalogue.members import NON_FINITE, ZERO_UPDATE
from loralens.fleet.catalogue.slots import slot_bytes
from loralens.fleet.sketching.measures import AdapterMeasures, measure_adapter, norm_of_update
from loralens.formats.files.container import read_together
from loralens.formats.records.collection import FolderEntry, Status, examine_file

HEADER = 1 << 20  # bytes that are hashed of a file whose header has no stated length
KEPT = 8 << 20  # half of the freed bytes that stay with the process
IN_MEMORY = 16 << 20  # bytes up to which an adapter is read once and loaded, since it is measured and hashed
DIGITS = 5  # digits of a norm in the catalogue: its thousands of numbers are as short as that
LEVELS: tuple[Literal["error", "warning", "note"], ...] = ("error", "warning", "note")


@final
@dataclass(frozen=True, slots=True)
class MeasuredFile:
    """What was found out about one file.

    Attributes
    ----------
    path : str
        As it was given.
    status : str
        ``adapter``, ``unreadable`` or ``other``: a file that holds tensors and no LoRA pairs.
    reason, fix : str
        Why it is not an adapter, and what the user can do.
    slot : bytes
        The content of its slot.
    modules : str
        The signature, as the catalogue stores it.
    columns : mapping of str to value
        The other columns of the catalogue.
    """

    path: str
    status: Status
    reason: str = ""
    fix: str = ""
    slot: bytes = b""
    modules: str = ""
    columns: dict[str, Any] | None = None


def measure_files(
    root: str, paths: Sequence[str], once: bool
) -> list[MeasuredFile]:  # plain arguments, since they go to other processes and machines
    """Measure files by their paths relative to ``root``; a file that cannot be read has a reason."""
    if not Path(root).is_dir():
        raise OptionError(
            f"{root}: this folder is not there on the machine of a worker", fix="share it with all machines"
        )
    _keep_freed_memory()
    return [_measure_file(root, path, once=once) for path in paths]


@cache
def _keep_freed_memory() -> None:
    """Let the C library keep memory that is freed, since fresh pages for every adapter take a twentieth of the time.

    The library of GNU gives memory back to the system when twice as much is free as the largest block that it has
    mapped and freed. This block is one. It is never touched, so it takes no memory.
    """
    np.empty(KEPT, np.uint8)


def _measure_file(root: str, path: str, *, once: bool) -> MeasuredFile:
    try:
        entry = examine_file(Path(root) / path, once=once)
        if entry.adapter is None:
            return MeasuredFile(path, entry.status, entry.reason, entry.fix)
        return _measure(path, entry, entry.adapter)
    except LoraLensError as error:
        # The numbers may be damaged although the header can be read.
        reason, fix = ": ".join((*error.where, error.what)), error.fix
    # Its header was read, so another program changes or removes it, or the disk fails.
    except OSError as error:
        reason = f"cannot be read: {error.strerror or error}"
        fix = "index again when nothing else writes to it; if nothing does, check the disk"
    # A damaged file may make NumPy raise any of these, and one file must not end the index of thousands.
    except (MemoryError, ArithmeticError, ValueError, RecursionError) as error:
        reason, fix = (
            f"cannot be measured: {str(error) or type(error).__name__}",
            "check the file; loralens doctor says more",
        )
    return MeasuredFile(path, "unreadable", reason, fix)


def _measure(path: str, entry: FolderEntry, adapter: Adapter) -> MeasuredFile:
    if not len(adapter):
        raise FormatError("holds no modules", fix="save it again from the code that trained it")
    size = sum(module.nbytes for module in adapter.modules.values())
    if size > IN_MEMORY:
        measures, digest = measure_adapter(adapter), fingerprint(adapter)
    else:
        loaded = _loaded(adapter)
        measures, digest = measure_adapter(loaded), fingerprint(loaded)
    modules = dumps(_signature(adapter, measures), ensure_ascii=True)
    ranks = sorted({module.rank for module in adapter.modules.values()})
    effective = [rank for rank in measures.effective_ranks.values() if rank]
    columns = {
        "header": _header_digest(entry.path),
        "step": measures.sketch.step,
        "format": adapter.format,
        "base": adapter.base_model or None,
        "signature": blake2b(modules.encode(), digest_size=8).hexdigest(),
        "modules": len(adapter),
        "zero_modules": sum(norm == 0 for norm in measures.norms.values()),
        "extras": len(adapter.extra),
        "rank": ranks[-1],
        "ranks": dumps(ranks),
        "scales": dumps(sorted({module.scale for module in adapter.modules.values()})),
        "parameters": adapter.parameters,
        "frobenius": norm_of_update(measures.norms),
        "effective_rank": fsum(effective) / len(effective) if effective else 0.0,
        "norms": f"[{','.join(f'{norm:.{DIGITS}g}' for norm in measures.norms.values())}]",
        "fingerprint": digest,
        "findings": dumps(_findings(adapter, measures)),
    }
    return MeasuredFile(path, "adapter", slot=slot_bytes(measures.sketch), modules=modules, columns=columns)


def _loaded(adapter: Adapter) -> Adapter:
    """The same adapter in memory; a file is read in as few calls as possible, since there are thousands of them."""
    pairs = [module for module in adapter.modules.values() if isinstance(module, LowRank)]
    factors = iter(read_together([factor for pair in pairs for factor in pair.factors]))
    return adapter.map(
        lambda module: module.holding(next(factors), next(factors)) if isinstance(module, LowRank) else module.load()
    )


def _signature(adapter: Adapter, measures: AdapterMeasures) -> list[tuple[str, str, int, int]]:
    return [(key, normal_form(name), *adapter.modules[name].shape) for key, name in measures.names.items()]


def _findings(adapter: Adapter, measures: AdapterMeasures) -> list[str]:
    """The codes of findings that need no more than one pass: those of the reader, modules that are 0, and NaN in heads.

    The doctor has more checks, which take several times as long as everything else here.
    """
    by_level = sorted(adapter.findings, key=lambda finding: LEVELS.index(finding.level))
    zero = any(norm == 0 and adapter.modules[measures.names[key]].scale for key, norm in measures.norms.items())
    # A module with NaN has no norm and no sketch, so its file cannot be measured. A head with NaN has no part in them.
    spoilt = any(_holds_non_finite(extra.tensor) for extra in adapter.extra.values())
    codes = [NON_FINITE] * spoilt + [finding.code for finding in by_level] + [ZERO_UPDATE] * zero
    return list(dict.fromkeys(codes))


def _holds_non_finite(tensor: LazyArray) -> bool:
    """Whether a tensor holds NaN or Inf; a head may be as large as the embedding, so blocks of rows are read."""
    blocks = (rows for _, rows in row_blocks(tensor, BLOCK)) if tensor.size > BLOCK else iter([tensor.read()])
    return any(map(count_non_finite, blocks))


def _header_digest(file: Path) -> str:
    """The digest of the header of a safetensors file, or of the first bytes of another file."""
    # Without a buffer, which would take longer than both reads.
    with file.open("rb", buffering=0) as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        return blake2b(start + stream.read(min(length, HEADER)), digest_size=16).hexdigest()
