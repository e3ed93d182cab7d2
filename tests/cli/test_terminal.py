"""What is printed does nothing to a terminal, whatever files and folders are called; closed streams are no crash."""

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

import pytest
from safetensors.numpy import load_file, save_file

import loralens
import loralens.cli.terminal
from loralens import FormatError
from loralens.cli.commands import command_of
from loralens.cli.standard_error import progress_bar
from loralens.errors import visible
from loralens.verbs import COMMANDS
from tests.bases import sharded, tensors
from tests.cli.command import Command
from tests.models import low_rank
from tests.terminal import on_screen, read_until

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
    done = Command().run(*words)
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
        sys.stderr.write("a\rb\n")
    shown = capsys.readouterr()
    assert shown.out == "a\\x1b[2J\tb\n\\u202e\n"
    assert shown.err == "a\\x0db\n"


def test_errors_show_every_name_in_one_line():
    error = FormatError("the shard \x1b[2J is gone", fix="get\u202eit").at("a\nerror: fake")
    assert str(error) == "a\\x0aerror: fake: the shard \\x1b[2J is gone\n  fix: get\\u202eit"


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
        ["similarity", small], ["similarity"], ["survey"], ["equal", small],
    ):  # fmt: skip
        said(words[0], folder, *words[1:])


def test_tables_of_a_real_terminal_are_coloured_and_names_in_them_are_not(made):
    folder = made(NAMES["escape"])
    master, slave = pty.openpty()
    wide = os.environ | {"COLUMNS": "400"}  # so that no line ends within the name, however long the folder's path is
    process = subprocess.Popen([*RUN, "spectrum", str(folder)], stdout=slave, stderr=slave, env=wide)
    shown = read_until(master, slave, process.wait)
    assert process.returncode == 0
    assert "\x1b[1m/" in shown  # ours: the title
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


def errors_of(words: list[str], folder: Path, *, width: int | None) -> list[str]:
    """The lines on standard error, which is a terminal of that width, or a pipe."""
    if width is None:
        return subprocess.run([*RUN, *words], cwd=folder, capture_output=True, text=True).stderr.splitlines()
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    env = os.environ | {"NO_COLOR": "1"}
    process = subprocess.Popen([*RUN, *words], cwd=folder, stdout=subprocess.PIPE, stderr=theirs, env=env)
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


def test_a_command_in_a_message_can_be_copied(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loralens.cli.terminal, "_terminal_width", lambda stream: 40)
    command = "  fix: `loralens compress a-long-name -o another-long-name --energy 0.99`"
    loralens.cli.terminal.say_message(f"note: {'word ' * 20}end\n{command}")
    lines = capsys.readouterr().err.splitlines()
    assert max(map(len, lines)) <= 40
    start = next(i for i, line in enumerate(lines) if line.strip().startswith("fix: "))
    # As a shell joins the lines that are copied.
    assert " ".join("\n".join(lines[start:]).replace("\\\n", "").split()) == command.strip()


# ---- Colours, and the bar of progress


COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-8]|4[0-8]|9[0-7])(?:;\d+)*m")


def test_a_terminal_gets_colours_and_no_more_lines_than_it_has(tmp_path: Path) -> None:
    """The conclusion is last, next to the prompt; the rows that matter most are shown, and how many are left out."""
    modules = {
        f"model.layers.{i}.self_attn.{kind}_proj": low_rank(8, 8, scale=1.0 + 9 * (i == 33), seed=i)
        for i in range(40)
        for kind in "qkv"
    }
    loralens.save(loralens.Adapter(modules=modules, base_model="tiny/base"), tmp_path / "many")
    code, coloured = on_screen(["spectrum", str(tmp_path / "many")])
    code, plain = on_screen(["spectrum", str(tmp_path / "many")], NO_COLOR="1")
    assert code == 0
    assert COLOUR.search(coloured.replace("\x1b[1m", "\x1b[31m"))
    assert "\x1b" not in plain
    lines = plain.splitlines()
    assert len(lines) <= 23
    assert max(map(len, lines)) <= 80
    assert " ".join(lines[-2:]).endswith("on average.")
    first = next(i for i, line in enumerate(lines) if line.startswith("module ")) + 1
    shown = [line for line in lines[first:] if "self_attn" in line]
    assert all("…33.self_attn" in line for line in shown[:3])
    assert lines[first + len(shown)] == f"… {120 - len(shown)} more rows (these have the largest ‖ΔW‖F), -v shows all"
    assert "q_proj" in on_screen(["spectrum", str(tmp_path / "many"), "--verbose"])[1]
    assert len(on_screen(["spectrum", str(tmp_path / "many"), "-v"])[1].splitlines()) > 160


def test_several_adapters_share_a_screen(small: Path) -> None:
    code, shown = on_screen(["inspect", *3 * [str(small)]], NO_COLOR="1")
    assert code == 0
    assert len(shown.splitlines()) <= 23
    assert " ".join(shown.split()).count("adapter of rank 2") == 3


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "fleet"])
def test_the_help_of_a_command_fits_on_a_screen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It names every option, and a pipe has the explanations of all."""
    command = command_of(name)
    context = command.context_class(command, info_name=f"loralens {name}", max_content_width=100)
    whole = command.get_help(context)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    lines = command.get_help(context).splitlines()
    assert len(lines) <= 23
    assert all(len(line) <= 80 for line in lines if not line.startswith("  loralens "))  # an example to copy
    option = re.compile(r"(?<!\w)--[a-z]\w*(?:-\w+)*")
    named = set(option.findall("\n".join(lines)))
    # The second names of two options are not needed.
    assert {each for param in command.params for each in param.opts if each.startswith("--")} - named <= {
        *("--consumer", "--lambda", "--set", "--for")
    }
    assert named <= set(option.findall(whole))


@pytest.mark.parametrize(
    ("variables", "coloured"),
    [
        ({}, False),
        ({"FORCE_COLOR": "1"}, True),
        ({"CLICOLOR_FORCE": "1"}, True),
        ({"FORCE_COLOR": "0"}, False),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False),
    ],
)
def test_a_pipe_has_colours_only_where_the_user_asks(
    variables: dict[str, str], coloured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    said = Command().refused("inspect", "nothing-of-this-name")
    assert bool(COLOUR.search(said)) == coloured
    assert "error:" in said


def test_nothing_is_drawn_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("working", 10) as step:
        assert step is None
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_it_says_what_and_how_long(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress_bar("reading [the] base", 10) as step:
        assert step is not None
        step(4)
        step(6)
    out, err = capsys.readouterr()
    assert out == ""
    assert "reading [the] base" in err
    assert "left" in err
