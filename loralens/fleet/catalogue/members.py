"""The rows of the catalogue: adapters, files that cannot be read, and signatures of names and shapes."""

from dataclasses import dataclass
from pathlib import Path
from typing import final

# Findings of the index itself, besides those of the readers.
ZERO_UPDATE = "zero-update"  # a module with ΔW = 0 whose scale is not 0
NON_FINITE = "non-finite"  # a head or another tensor that belongs to no pair holds NaN or Inf
UNREACHABLE = "unreachable"  # neither the file nor its folder could be reached at the last update
OF_INDEX = frozenset({ZERO_UPDATE, NON_FINITE, UNREACHABLE})


@final
@dataclass(frozen=True, slots=True)
class Member:
    """An adapter of a fleet, as the index has it.

    Attributes
    ----------
    number : int
        The number of its row in the catalogue. A file that changes keeps its number.
    slot : int
        The slot of its sketches in the file of the sketches.
    name : str
        Its path relative to the root of the fleet; the folder if the folder holds no other adapter.
    path : Path
        The file.
    real : str
        Identifies the file itself: two paths that lead to one file, through links, have the same text.
    bytes : int
        Bytes on disk.
    format : str
        The dialect.
    base : str or None
        The base model that the file or its configuration names.
    inferred : str or None
        The base model that names and shapes show; None if they show none.
    signature : str
        The digest of the names and shapes of its modules; `Fleet.signature` has them.
    modules, zero_modules : int
        The number of modules, and of modules with ΔW = 0.
    extras : int
        Trained tensors that belong to no pair: heads, biases, magnitudes.
    ranks : tuple of int
        The nominal ranks that occur, increasing.
    scales : tuple of float
        The scales that occur, increasing.
    parameters : int
        The number of parameters in pairs.
    frobenius : float
        ‖ΔW‖_F of the whole update.
    effective_rank : float
        Mean over the modules that are not 0; 0 if all are.
    fingerprint : str
        See `loralens.core.fingerprint`.
    findings : tuple of str
        Codes of findings, the most serious first.
    added : str
        When the file was first indexed: UTC, as ``2026-01-31 12:00:00``.
    """

    number: int
    slot: int
    name: str
    path: Path
    real: str
    bytes: int
    format: str
    base: str | None
    inferred: str | None
    signature: str
    modules: int
    zero_modules: int
    extras: int
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    parameters: int
    frobenius: float
    effective_rank: float
    fingerprint: str
    findings: tuple[str, ...]
    added: str


@final
@dataclass(frozen=True, slots=True)
class Unreadable:
    """A file that should be an adapter and cannot be read.

    Attributes
    ----------
    name, path, bytes
        As in `Member`.
    reason, fix : str
        Why it cannot be read, and what the user can do.
    """

    name: str
    path: Path
    bytes: int
    reason: str
    fix: str


@final
@dataclass(frozen=True, slots=True)
class Signature:
    """The names and shapes of the modules of one or more adapters.

    Attributes
    ----------
    keys : tuple of str
        The normalised names under which modules are compared, sorted; no model prefix.
    names : tuple of str
        The names in normal form with the prefix of the model, in the same order.
    shapes : tuple of pairs of int
        (out, in) of every module, in the same order.
    """

    keys: tuple[str, ...]
    names: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
