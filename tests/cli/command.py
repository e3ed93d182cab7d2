"""One command, run in this process: as it comes, where it must succeed, and where it must refuse."""

import json
from typing import Any

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

        result = self.run(*args)
        assert result.exit_code == 2, result.output
        assert not result.stdout
        return result.stderr
