"""One command, run in this process: as it comes, where it must succeed, and where it must refuse."""

import json
from typing import Any

import pytest
from click.testing import CliRunner, Result

from loralens.cli.main import main as main


class Command:
    """A command with the words that every call of it begins with."""

    def __init__(self, *words: str) -> None:
        self.words = words

    def run(self, *args: object) -> Result:
        return CliRunner().invoke(main, [*self.words, *map(str, args)])

    def good(self, *args: object) -> Result:
        result = self.run(*args)
        assert result.exit_code == 0, result.output
        return result

    def told(self, *args: object) -> Any:
        """What it says with --json."""
        return json.loads(self.good(*args, "--json").stdout)

    def refused(self, *args: object) -> str:
        """What it says where it must refuse."""
        result = self.run(*args)
        assert result.exit_code == 2, result.output
        assert not result.stdout
        return result.stderr


def near(one: Any, other: Any, where: str = "", *, rel: float = 1e-6) -> None:
    """Two JSON values, numbers to ``rel``."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            near(one[key], other[key], f"{where}/{key}", rel=rel)
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            near(a, b, f"{where}/{i}", rel=rel)
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=rel, abs=rel / 10), where
    else:
        assert one == other, where
