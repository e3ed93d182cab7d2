"""The package imports torch when something of it is used, not before."""

import subprocess
import sys

import pytest

import loralens.training


def test_importing_the_package_imports_neither_torch_nor_numpy() -> None:
    code = "import sys, loralens, loralens.training; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy"} & set(done.stdout.split())


def test_fit_is_found_from_the_top() -> None:
    """Where nothing has imported the package. In the place of the module of `fit`, which takes seconds, is another."""
    code = (
        "import sys, types, loralens\n"
        "module = types.ModuleType('loralens.training.fitting')\n"
        "module.fit = 'found'\n"
        "sys.modules[module.__name__] = module\n"
        "print('loralens.training' in sys.modules, loralens.training.fit)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False found\n"


def test_public_names_are_there() -> None:
    pytest.importorskip("torch")
    for name in loralens.training.__all__:
        assert getattr(loralens.training, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = loralens.training.nonsense
