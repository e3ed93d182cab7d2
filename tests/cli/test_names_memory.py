"""Memory of whole commands: 50 MiB and ten times the file, of which nearly everything is names; what they load."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.formats.test_fuzz import packed
from tests.marks import slow_except

MODULES = 600
NAME = ".".join("abcdefghij"[i % 10] for i in range(600))  # 1,199 letters
# Python, NumPy and our own code take 41 to 43 MiB here. Other versions of them may take more.
ROOM = 8 << 20
# Ten times the file is promised for any number of modules. Long names of fewer modules take less, so less is allowed.
TIMES = 8
COMMANDS = {
    "inspect": "inspect adapter --json",
    "spectrum": "spectrum adapter --json",
    "doctor": "doctor adapter --base base",
    "compress": "compress adapter --rank 1 -o out --json",
    "convert": "convert adapter --to kohya -o out.safetensors",
    "report": "report adapter -o out.html",
    "report --base": "report adapter --base base -o out.html",
    "report of two": "report adapter second -o out.html",
    "merge": "merge adapter --base base -o out",
    "merge --json": "merge adapter --base base -o out --json",
    "unmerge": "unmerge merged -o out -v",
    "verify": "verify merged --base base --adapter adapter --json",
    "amplify": "amplify adapter --base base --no-cache",
    "amplify --json": "amplify adapter --base base --no-cache --json",
    "intruders": "intruders adapter --base base --cache cache --json",
    "intruders -v": "intruders adapter --base base --cache cache -v",
    "equal": "equal adapter adapter --json",
    "similarity": "similarity adapter adapter --json",
}
# Prints the most memory that the command has had, in bytes, as the last line.
MEASURE = """
import re, sys
from loralens.cli.main import main
main(sys.argv[1:], standalone_mode=False)
print(1024 * int(re.search("VmHWM:\\\\s+(\\\\d+) kB", open("/proc/self/status").read())[1]), file=sys.stderr)
"""
LOADED = """
import sys
from loralens.cli.main import main
main(sys.argv[1:], standalone_mode=False)
print(*sys.modules, file=sys.stderr)
"""


def make(folder: Path, count: int, name: str = NAME) -> int:
    """An adapter of modules of 8 numbers, its base, and their merge; returns the bytes of the adapter."""
    names = [f"{name}.{i}.m" for i in range(count)]
    key = "base_model.model.{}.lora_{}.weight"
    shapes = {"A": [1, 4], "B": [4, 1]}
    (folder / "adapter").mkdir()
    weights = packed({key.format(name, half): ("F16", shape) for name in names for half, shape in shapes.items()})
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(weights)
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["m"], "base_model_name_or_path": "base"}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    (folder / "base").mkdir()
    base = packed({f"{name}.weight": ("F32", [4, 4]) for name in names})
    (folder / "base" / "model.safetensors").write_bytes(base)
    (folder / "base" / "config.json").write_text("{}")
    run(folder, "merge adapter --base base -o merged", "from loralens.cli.main import run; run()")
    return len(weights)


def run(folder: Path, command: str, program: str) -> str:
    """What a command writes to standard error, run by this program in a process of its own."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    words = [sys.executable, "-c", program, *command.split()]
    done = subprocess.run(
        words, cwd=folder, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    folder = tmp_path_factory.mktemp("many")
    return folder, make(folder, MODULES)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("few")
    make(folder, 3, "model")
    return folder


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_takes_ten_times_the_names(command: str, many: tuple[Path, int], tmp_path: Path) -> None:
    folder, size = many
    for name in ("adapter", "base", "merged", "cache"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "second").symlink_to(folder / "adapter")
    peak = int(run(tmp_path, COMMANDS[command], MEASURE).splitlines()[-1])
    read = 2 * size if command in {"similarity", "report of two"} else size
    if command == "report --base":  # which shows every weight beside its update
        read += (folder / "base" / "model.safetensors").stat().st_size
    assert peak <= (50 << 20) + TIMES * read + ROOM, f"{peak / 2**20:.1f} MiB"


@pytest.mark.parametrize(
    "command", slow_except(["merge", "unmerge", "verify", "amplify", "intruders", "report --base"], "verify")
)
def test_a_command_loads_nothing_large_that_it_does_not_need(command: str, few: Path, tmp_path: Path) -> None:
    for name in ("adapter", "base", "merged"):
        (tmp_path / name).symlink_to(few / name)
    loaded = set(run(tmp_path, COMMANDS[command], LOADED).splitlines()[-1].split())
    # All of NumPy, also what tests and Fortran need; SciPy; the records of installed packages.
    needless = {"numpy.testing", "numpy.f2py", "scipy", "torch", "matplotlib", "importlib.metadata"}
    # NumPy's random numbers load OpenSSL, and no weight of this base is so large that something is estimated. Little is
    # hashed here, for which Python's own code does.
    assert not (needless | {"numpy.random", "_hashlib"}) & loaded


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_file_of_many_modules_is_converted_in_ten_times_its_size(tmp_path: Path) -> None:
    key = "base_model.model.model.layers.{}.mlp.experts.{}.up_proj.lora_{}.weight"
    shapes = {"A": [1, 32], "B": [32, 1]}
    headers = {key.format(i, j, half): ("F16", shapes[half]) for i in range(300) for j in range(100) for half in "AB"}
    (tmp_path / "adapter").mkdir()
    weights = packed(headers)
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(weights)
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}')
    peak = int(run(tmp_path, COMMANDS["convert"], MEASURE).splitlines()[-1])
    assert peak <= (50 << 20) + 10 * len(weights), f"{peak / 2**20:.1f} MiB"
