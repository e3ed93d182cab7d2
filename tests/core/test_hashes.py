"""Hashes: those of `hashlib` whatever code computes them, and OpenSSL only where much is hashed."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from loralens.core import hashes
from loralens.core.hashes import MUCH, blake2b, sha256, sha256_hex


@pytest.mark.parametrize("openssl", [True, False])
@pytest.mark.parametrize("nbytes", [0, 1000, MUCH])
def test_they_are_those_of_hashlib(nbytes: int, openssl: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not openssl:
        monkeypatch.delitem(sys.modules, "_hashlib", raising=False)
    data = np.random.default_rng(0).integers(0, 256, nbytes, np.uint8).tobytes()
    hasher = sha256(nbytes)
    hasher.update(data[:7])
    hasher.update(data[7:])
    assert hasher.digest() == hashlib.sha256(data).digest()
    assert hasher.hexdigest() == sha256_hex(data) == hashlib.sha256(data).hexdigest()
    assert blake2b(data, digest_size=16).digest() == hashlib.blake2b(data, digest_size=16).digest()


def test_a_python_without_code_of_its_own_takes_hashlib(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.delitem(sys.modules, "_hashlib", raising=False)
    monkeypatch.setattr(hashes, "import_module", missing)
    assert sha256_hex(b"abc") == hashlib.sha256(b"abc").hexdigest()


@pytest.mark.parametrize(("nbytes", "loaded"), [("MUCH - 1", "False"), ("MUCH", "True")])
def test_openssl_is_loaded_where_much_is_hashed(nbytes: str, loaded: str) -> None:
    code = f"import sys; from loralens.core.hashes import *; sha256({nbytes}); print('_hashlib' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == f"{loaded}\n"
    )
