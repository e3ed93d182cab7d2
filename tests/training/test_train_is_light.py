"""The package imports torch when something of it is used, not before."""

import subprocess
import sys

import pytest

import loralens.training


def test_importing_the_package_imports_neither_torch_nor_numpy() -> None:
    code = "import sys, loralens, loralens.training; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy"} & set(done.stdout.split())


def test_public_names_are_there() -> None:
    pytest.importorskip("torch")
    for name in loralens.training.__all__:
        assert getattr(loralens.training, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = loralens.training.nonsense
