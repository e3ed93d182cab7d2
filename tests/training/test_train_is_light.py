"""The package imports torch when something of it is used, not before."""

import subprocess
import sys


def test_importing_the_package_imports_neither_torch_nor_numpy() -> None:
    code = "import sys, loralens, loralens.training; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy"} & set(done.stdout.split())
