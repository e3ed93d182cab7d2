"""Hashes that do not load OpenSSL where little is hashed. `hashlib` always loads it, which takes 4 MiB."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

# Python's own C code, which `hashlib` uses too where there is no OpenSSL. BLAKE2b is never OpenSSL's in `hashlib`.
if TYPE_CHECKING:
    from hashlib import blake2b as blake2b
else:
    try:
        from _blake2 import blake2b as blake2b
    except ImportError:  # a Python that was built without it, or is not CPython
        from hashlib import blake2b as blake2b

MUCH = 1 << 20  # bytes from which OpenSSL is worth its memory: it hashes 1,700 MiB/s, and Python's own code 300


class Hasher(Protocol):
    """The hash of the bytes so far."""

    def update(self, data: Any, /) -> None:
        """Add the bytes of a buffer."""

    def digest(self) -> bytes:
        """The hash."""

    def hexdigest(self) -> str:
        """The hash in hexadecimal digits."""


def sha256(nbytes: int) -> Hasher:
    """A new SHA-256; ``nbytes`` says about how much will be hashed, on which only time and memory depend."""
    if nbytes < MUCH and "_hashlib" not in sys.modules:
        try:
            return _own_sha256()
        except ImportError:
            pass
    from hashlib import sha256 as fast

    return fast()


def sha256_hex(data: bytes | memoryview) -> str:
    """The SHA-256 of a buffer in hexadecimal digits."""
    hasher = sha256(memoryview(data).nbytes)
    hasher.update(data)
    return hasher.hexdigest()


def _own_sha256() -> Hasher:
    """Python's own SHA-256; an ImportError if it has none."""
    hasher: Hasher = import_module("_sha2" if sys.version_info >= (3, 12) else "_sha256").sha256()
    return hasher
