"""How pages are read: blocks, commands, and when an output is the one that is shown."""

from pathlib import Path

import pytest

from tests.docs.blocks import blocks, commands, same

PAGE = """
# A page

```console real
$ loralens inspect a \\
    --json
{"x": 1}
$ true
```

```json
{"x": "integer"}
```

```toml recipe.toml
a = 1
```
"""


def test_a_page_is_cut_into_blocks_and_blocks_into_commands(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE, encoding="utf-8")
    console, plain, recipe = blocks(page, tmp_path)
    assert (console.language, console.real, console.where) == ("console", True, "page.md:5")
    assert (plain.file, recipe.file) == (None, "recipe.toml")
    first, second = commands(console)
    assert (first.text, first.shown) == ("loralens inspect a \\\n    --json", ('{"x": 1}',))
    assert (second.text, second.shown, second.line) == ("true", (), 8)


@pytest.mark.parametrize(
    ("shown", "printed", "equal"),
    [
        (["a  b"], ["a      b", ""], True),
        (["a", "…"], ["a", "b", "c"], True),
        (["…", "c"], ["a", "b", "c"], True),
        (["about … s"], ["about 12 s"], True),
        (["x.…[0]"], ["x.y[0]"], True),
        (["error 0.1235"], ["error 0.1234"], True),
        (["error 0.1235"], ["error 0.1335"], False),
        (["1.075e-06"], ["1.076e-06"], True),
        (["-0.95"], ["+0.95"], False),
        (["8 of 8"], ["7 of 8"], False),
        (["59 % off"], ["58 % off"], True),
        (["15,533 bytes"], ["15,540 bytes"], True),
        (["15,533 bytes"], ["16,533 bytes"], False),
    ],
)
def test_what_counts_as_the_same_output(shown: list[str], printed: list[str], equal: bool) -> None:
    assert same(shown, printed) is equal
