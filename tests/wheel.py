"""The wheel as a stranger gets it: built, looked into, installed into an empty environment, and used there.

``make wheel`` runs it. It is no test of the suite: the environment takes its time, and wants a package index.
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePath, PurePosixPath

ROOT = Path(__file__).parent.parent
COMPILED = ("*.so", "*.pyd")  # made anew for the wheel, where there is a compiler
SOURCES = ("loralens", "pyproject.toml", "README.md", "LICENSE")
PYTHON = Path("Scripts", "python.exe") if sys.platform == "win32" else Path("bin", "python")

ADAPTER = """
import numpy as np, loralens
rng = np.random.default_rng(0)
names = [f"model.layers.{i}.self_attn.{kind}" for i in range(2) for kind in ("q_proj", "v_proj")]
modules = {n: loralens.LowRank(rng.standard_normal((32, 4)), rng.standard_normal((4, 24)), 2.0) for n in names}
loralens.save(loralens.Adapter(modules=modules), "adapter")
"""


def build(work: Path) -> Path:
    """The wheel, built from a copy: a build folder in the tree would leave modules in it that are gone."""
    copy = work / "source"
    copy.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__", *COMPILED))
        else:
            shutil.copy(source, copy / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", work, copy], check=True)
    (wheel,) = work.glob("loralens-*.whl")
    return wheel


def _is_compiled(path: PurePath) -> bool:
    return any(path.match(pattern) for pattern in COMPILED)


def check_contents(wheel: Path) -> None:
    """Every file of the package is in it, and nothing else but its metadata."""
    with zipfile.ZipFile(wheel) as file:
        held = {PurePosixPath(name) for name in file.namelist() if not name.endswith("/")}
    package = {path for path in held if not path.parts[0].endswith(".dist-info") and not _is_compiled(path)}
    source = {
        PurePosixPath(path.relative_to(ROOT).as_posix())
        for path in (ROOT / "loralens").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not _is_compiled(path)
    }
    assert source - package == set(), f"not in the wheel: {sorted(map(str, source - package))}"
    assert package - source == set(), f"in the wheel and not in the package: {sorted(map(str, package - source))}"
    assert PurePosixPath("loralens/py.typed") in package
    assert any(path.name == "LICENSE" for path in held)


def install(wheel: Path, work: Path) -> Path:
    """The Python of an environment that holds the wheel, what it requires, and nothing else."""
    home = work / "empty"
    subprocess.run([sys.executable, "-m", "venv", home], check=True)
    python = home / PYTHON
    pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--no-compile", wheel], check=True)
    return python


def use(python: Path, work: Path) -> None:
    """What a newcomer types first, in a folder that is not the tree."""
    home = work / "elsewhere"
    home.mkdir()

    def run(*arguments: object, code: int = 0) -> str:
        done = subprocess.run(list(map(str, arguments)), cwd=home, capture_output=True, text=True, check=False)
        said = f"{' '.join(map(str, arguments))}\n{done.stdout}{done.stderr}"
        assert done.returncode == code, said
        assert "Traceback" not in done.stderr, said
        return done.stdout + done.stderr

    loralens = python.parent / "loralens"
    version = run(loralens, "--version")
    assert version.startswith("loralens, version "), version
    assert run(python, "-m", "loralens", "--version") == version
    assert "spectrum" in run(python, "-m", "loralens", "--help")
    where = run(python, "-c", "import loralens; print(loralens.__file__)")
    assert Path(where.strip()).is_relative_to(work), f"the tree was used, not the wheel: {where}"
    commands = run(python, "-c", "from loralens.verbs import COMMANDS; print(*COMMANDS)").split()
    for name in commands:
        run(loralens, name, "--help")
    run(python, "-c", ADAPTER)
    assert "4 modules" in run(loralens, "spectrum", "adapter")
    run(loralens, "spectrum", "adapter", "--plot", "spectrum.png")
    run(loralens, "doctor", "adapter")
    run(loralens, "compress", "adapter", "--rank", "2", "-o", "smaller")
    run(loralens, "similarity", "adapter", "smaller")
    if "report" in commands:
        run(loralens, "report", "adapter", "smaller", "-o", "report.html")
    survey = run(loralens, ".")
    assert "2 adapters: 1 fine, " in survey or "2 adapters: 2 fine" in survey, survey
    demo = run(loralens, "demo")
    assert "smaller than out/demo/adapters/reuters-r64" in demo, demo
    assert "Left out" in demo, demo
    run(python, "-c", "import sys, importlib.util as u; sys.exit(any(map(u.find_spec, ('torch', 'transformers'))))")
    (home / "texts.txt").write_text("one line\n", encoding="utf-8")
    (home / "model").mkdir()
    (home / "model" / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}', encoding="utf-8")
    refused = run(loralens, "behave", "--model", "model", "--data", "texts.txt", "adapter", code=2)
    assert "-m pip install 'torch>=2.4' 'transformers>=4.45'" in refused, refused


def main() -> None:
    """Build, look, install, use."""
    with tempfile.TemporaryDirectory(prefix="loralens-wheel-") as folder:
        work = Path(folder).resolve()
        wheel = build(work)
        check_contents(wheel)
        use(install(wheel, work), work)
        print(f"{wheel.name}: {wheel.stat().st_size / 1024:.0f} KiB, installs into an empty environment and runs there")


if __name__ == "__main__":
    main()
