"""What is printed does nothing to a terminal, whatever files and folders are called; closed streams are no crash."""

import ast
import fcntl
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

import loralens
import loralens.cli.terminal
from loralens.cli.main import main
from loralens.errors import FormatError, visible
from tests.bases import sharded, tensors
from tests.cli.terminals import read_until

RUN = [sys.executable, "-m", "loralens"]
HARMFUL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
NAMES = {
    "escape": "a\x1b[31m\x1b]0;title\x07",
    "c1": "a\x9b2J\x85b",
    "bidi": "a\u202egnp.exe\u2066",
    "line": "a\nerror: fake",
    "return": "a\rb",
    "tab": "a\tb",
    "bytes": os.fsdecode(b"a\xff\xfe"),
}
MOVING = "a\nerror: fake\tb\rc\x1b[31m"  # the cursor, in every way
named = pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)


def said(*words):
    """Exit code and output of a command, in which nothing is harmful."""
    done = CliRunner().invoke(main, [*map(str, words)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert not HARMFUL.search(done.output), ascii(done.output)
    assert "\t" not in done.output, ascii(done.output)
    assert "\nerror: fake" not in f"\n{done.output}", ascii(done.output)
    return done.exit_code, done.output


@pytest.fixture
def made(small, tmp_path):
    def make(name):
        try:
            return shutil.copytree(small, tmp_path / name)
        except OSError as error:
            pytest.skip(f"this file system has no such names: {error}")

    return make


def test_visible_text_stays_as_it_is_and_everything_else_is_an_escape():
    assert visible("ΔW‖ é 漢") == "ΔW‖ é 漢"
    assert visible("a\x1b\n\x9b\u202e\udcff\ud800") == r"a\x1b\x0a\x9b\u202e\xff\ud800"
    assert visible("a\n\tb", keep="\n\t") == "a\n\tb"


def test_what_a_library_prints_is_harmless_too(capsys):
    """Tables, JSON and warnings of libraries go past `say`: the streams themselves make them harmless."""
    with loralens.cli.terminal.harmless_output():
        print("a\x1b[2J\tb\n\u202e")
        sys.stderr.writelines(["a\rb\n"])
    shown = capsys.readouterr()
    assert shown.out == "a\\x1b[2J\tb\n\\u202e\n"
    assert shown.err == "a\\x0db\n"


def test_errors_show_every_name_in_one_line():
    error = FormatError("the shard \x1b[2J is gone", fix="get\u202eit").at("a\nerror: fake")
    assert str(error) == "a\\x0aerror: fake: the shard \\x1b[2J is gone\n  fix: get\\u202eit"


def test_lines_with_names_are_printed_by_the_one_function_that_makes_them_lines():
    """``click.echo`` of an f-string would let a name in it begin a line of its own; `say` does not."""
    raw = []
    for file in Path(loralens.cli.terminal.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("click.echo", "click.secho", "print"):
                text = ast.unparse(node)
                if (
                    any(isinstance(word, ast.JoinedStr) for word in node.args)
                    and "json" not in text
                    and "nl=False" not in text
                ):
                    raw.append(f"{file.name}: {text}")
    assert [line for line in raw if not line.startswith("main.py: click.echo(f'error: ")] == []


@named
@pytest.mark.parametrize("words", [["inspect"], ["doctor"], ["survey"], ["spectrum", "--modules", "nothing"]])
def test_names_of_folders_reach_no_terminal(words, name, made):
    folder = made(name)
    said(words[0], folder if words[0] != "survey" else folder.parent, *words[1:])


@named
def test_names_of_missing_files_and_wrong_options(name, made):
    for words in (
        ["inspect", f"/nowhere/{name}"], ["spectrum", f"--{name}"], [name], [f"--{name}"],
        ["spectrum", "a", "--plot", f"{name}.wrong"], ["merge", "a", "--dtype", name],
        ["compress", "a", "--rank", name], ["combine", f"{made(name)}:nan", "a", "-o", "b"],
    ):  # fmt: skip
        code, _ = said(*words)
        assert code in (1, 2)


@pytest.mark.parametrize("where", ["module", "base model"])
def test_names_in_an_adapter_are_said_in_one_line(where, made, small, tmp_path):
    folder = made("a")
    if where == "module":
        file = folder / "adapter_model.safetensors"
        save_file({key.replace("q_proj", f"q{MOVING}"): X for key, X in load_file(file).items()}, file)
    else:
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": f"tiny/{MOVING}"}))
    base = sharded(tmp_path / "base", tensors(size=2.0))
    for words in (
        ["inspect"], ["doctor"], ["spectrum"], ["compress", "--rank", "1", "-o", tmp_path / "c"],
        ["combine", small, "-o", tmp_path / "p"], ["convert", "--to", "comfyui", "-o", tmp_path / "k"],
        ["merge", "--base", base, "--dry-run"], ["doctor", "--base", base], ["report", "-o", tmp_path / "r.html"],
        ["report", small, "--base", base, "-o", tmp_path / "s.html"], ["similarity", small], ["similarity"],
        ["amplify", "--base", base], ["drop", "--modules", "*q*", "--dry-run"], ["survey"], ["equal", small],
    ):  # fmt: skip
        said(words[0], folder, *words[1:])


# A report with its pictures takes half a second.
@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_reports_show_such_names_as_escapes(name, made, tmp_path):
    folder = made(name)
    assert said("report", folder, "-o", tmp_path / "r.html", "--markdown")[0] == 0
    for file in ("r.html", "r.md"):
        assert not HARMFUL.search((tmp_path / file).read_text("utf-8"))


def test_tables_of_a_real_terminal_are_coloured_and_names_in_them_are_not(made):
    folder = made(NAMES["escape"])
    master, slave = pty.openpty()
    wide = os.environ | {"COLUMNS": "400"}  # so that no line ends within the name, however long the folder's path is
    process = subprocess.Popen([*RUN, "spectrum", str(folder)], stdout=slave, stderr=slave, env=wide)
    shown = read_until(master, slave, process.wait)
    assert process.returncode == 0
    assert "\x1b[36m\x1b[1m" in shown  # ours: the title
    assert r"\x1b[31m" in shown
    assert "\x1b[31m" not in shown


def closed(words, *numbers):
    """A run whose streams of these numbers are closed before it begins."""
    shut = " ".join(f"{number}>&-" if number else "<&-" for number in numbers)
    line = " ".join(['"$@"', shut])
    return subprocess.run(["sh", "-c", line, "sh", *RUN, *map(str, words)], capture_output=True, text=True, check=False)


@pytest.mark.some(1)
@pytest.mark.parametrize("words", [["spectrum"], ["inspect", "--json"], ["spectrum", "--csv"]])
def test_a_closed_standard_output_is_one_message(words, small):
    done = closed([*words, small], 1)
    assert done.returncode == 2
    assert done.stderr.count("error:") == done.stderr.count("fix:") == 1
    assert "the output cannot be written" in done.stderr


@pytest.mark.slow
def test_a_closed_standard_error_loses_only_what_is_said_there(small):
    done = closed(["spectrum", small], 2)
    assert done.returncode == 0
    assert "model.layers.0.self_attn.q_proj" in done.stdout
    assert closed(["spectrum", "nothing"], 2).returncode == 2


@pytest.mark.slow
def test_with_all_streams_closed_no_file_takes_their_place(small, tmp_path):
    """A file that is opened gets the lowest free number, and what is printed would stand in it."""
    closed(["compress", small, "--rank", "1", "-o", tmp_path / "out"], 0, 1, 2)
    assert len(loralens.load(tmp_path / "out")) == 6
    assert len(loralens.load(small)) == 6


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_standard_error_is_no_traceback(small):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*RUN, "spectrum", "nothing"], stdout=subprocess.PIPE, stderr=full, check=False)
    assert done.returncode == 2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space are Linux's")
def test_too_little_memory_is_one_message(tmp_path):
    import resource

    pair = loralens.LowRank(np.ones((40_000, 64), np.float32), np.ones((64, 40_000), np.float32))
    loralens.save(loralens.Adapter(modules={"q": pair}), tmp_path / "big")
    line = [*RUN, "compress", str(tmp_path / "big"), "--rank", "4", "-o", str(tmp_path / "out")]
    done = subprocess.run(
        line,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (210 << 20, 210 << 20)),
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error:") == done.stderr.count("fix:") == 1
    assert not (tmp_path / "out").exists()


def errors_of(words: list[str], folder: Path, *, width: int | None) -> list[str]:
    """The lines on standard error, which is a terminal of that width, or a pipe."""
    if width is None:
        return subprocess.run([*RUN, *words], cwd=folder, capture_output=True, text=True).stderr.splitlines()
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    process = subprocess.Popen([*RUN, *words], cwd=folder, stdout=subprocess.PIPE, stderr=theirs)
    return read_until(ours, theirs, process.communicate).splitlines()


def test_a_message_breaks_between_words_on_a_terminal_and_nowhere_else(tmp_path: Path) -> None:
    words = ["inspect", "a-folder-with-a-name-of-some-length/and-a-file-that-does-not-exist.safetensors"]
    whole = errors_of(words, tmp_path, width=None)
    assert [line.split(":")[0].strip() for line in whole] == ["error", "fix"]
    broken = errors_of(words, tmp_path, width=60)
    # The path is a word that is longer than the line.
    assert all(len(line) <= 60 or words[1] in line for line in broken)
    assert len(broken) > len(whole)
    assert " ".join(" ".join(broken).split()) == " ".join(" ".join(whole).split())
    assert broken[-1].startswith("    ")


def test_a_command_in_a_message_is_not_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loralens.cli.terminal, "_terminal_width", lambda stream: 40)
    command = "  fix: `loralens compress a-long-name -o another-long-name --energy 0.99`"
    loralens.cli.terminal.say_message(f"note: {'word ' * 20}end\n{command}")
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == command
    assert max(map(len, lines[:-1])) <= 40
