"""The code blocks of a page: what they are, how each kind is run, and when an output is the one that is shown.

What readers see is the convention (it is told in docs/index.md): ``console`` blocks have commands behind ``$`` and what
these print; a line ``…`` stands for any lines, ``…`` within a line for anything. ``real`` behind the language: it needs
other people's adapters or the real base model; ``trained``: the project's own adapters, and that model. A word with a
dot is the file that a block is written to before the next one runs.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

FENCE = re.compile(r"^( *)(`{3,})(.*)$")
NUMBER = re.compile(r"[-+(×]?\d[\d,]*(\.\d+)?(e[-+]?\d+)?[%).,:;×]*")
ANY = "…"
LARGE = 4  # digits from which a whole number is a measure, not a count


@dataclass(frozen=True)
class Block:
    """One fenced block: its page, the line of its first line of text, the words behind the fence, the text."""

    page: str
    line: int
    words: tuple[str, ...]
    text: str

    @property
    def language(self) -> str:
        return self.words[0] if self.words else ""

    @property
    def real(self) -> bool:
        return "real" in self.words[1:]

    @property
    def trained(self) -> bool:
        return "trained" in self.words[1:]

    @property
    def file(self) -> str | None:
        return next((word for word in self.words[1:] if "." in word), None)

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path, root: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    lines = page.read_text(encoding="utf-8").splitlines()
    name = page.relative_to(root).as_posix()
    found: list[Block] = []
    start: tuple[int, str, str] | None = None
    for i, line in enumerate(lines):
        fence = FENCE.match(line)
        if start is None and fence:
            start = i, fence[2], fence[3].strip()
        elif start is not None and fence and fence[2] == start[1] and not fence[3].strip():
            text = "\n".join(lines[start[0] + 1 : i])
            words = tuple(start[2].split())
            found.append(Block(name, start[0] + 2, words, text))
            start = None
    assert start is None, f"{name}:{start[0] + 1}: this block never ends"  # type: ignore[index]
    return found


@dataclass(frozen=True)
class Command:
    """A command of a console block, and the lines that it is shown to print; None where nothing is shown."""

    line: int
    text: str
    shown: tuple[str, ...]


def commands(block: Block) -> list[Command]:
    """The commands behind ``$``; a backslash at the end of a line goes on in the next one."""
    found: list[tuple[int, list[str], list[str]]] = []
    for i, line in enumerate(block.text.splitlines()):
        if line.startswith("$ "):
            found.append((block.line + i, [line[2:]], []))
        elif found and found[-1][1][-1].endswith("\\") and not found[-1][2]:
            found[-1][1].append(line)
        elif found:
            found[-1][2].append(line)
        else:
            assert not line.strip(), f"{block.where}: an output without a command"
    return [Command(at, "\n".join(parts), tuple(shown)) for at, parts, shown in found]


def same(shown: Sequence[str], printed: Sequence[str]) -> bool:
    """Whether what was printed is what is shown; empty lines and the width of columns are free."""
    return _same_lines(_filled(shown), _filled(printed))


def _filled(lines: Sequence[str]) -> list[list[str]]:
    # A number and its percent sign are one word, so that the sign still says how near the number must be.
    return [line.replace(" %", "%").split() for line in lines if line.strip()]


def _same_lines(shown: list[list[str]], printed: list[list[str]]) -> bool:
    if not shown:
        return not printed
    if shown[0] == [ANY]:
        return any(_same_lines(shown[1:], printed[i:]) for i in range(len(printed) + 1))
    return bool(printed) and _same_words(shown[0], printed[0]) and _same_lines(shown[1:], printed[1:])


def _same_words(shown: list[str], printed: list[str]) -> bool:
    if not shown:
        return not printed
    if shown[0] == ANY:
        return any(_same_words(shown[1:], printed[i:]) for i in range(len(printed) + 1))
    return bool(printed) and _same_word(shown[0], printed[0]) and _same_words(shown[1:], printed[1:])


def _same_word(shown: str, printed: str) -> bool:
    if shown == printed:
        return True
    if ANY in shown:
        return fnmatchcase(printed, shown.replace("[", "[[]").replace("?", "[?]").replace(ANY, "*"))
    return bool(NUMBER.fullmatch(shown) and NUMBER.fullmatch(printed)) and _near(shown, printed)


def _near(shown: str, printed: str) -> bool:
    """Fractions and shares in % may differ in the last digit, large numbers by 1 %: machines round differently."""
    first, second = (re.sub(r"[^-+.e\d]", "", one).rstrip(".") for one in (shown, printed))
    if "." not in first and "e" not in first and len(first) < LARGE:
        return abs(int(first) - int(second)) <= ("%" in shown)
    digits, _, power = first.partition("e")
    unit = 10.0 ** (int(power or 0) - len(digits.partition(".")[2])) if "." in digits or power else 0.0
    one, two = float(first), float(second)
    return abs(one - two) <= max(1.01 * unit, 0.01 * abs(one))
