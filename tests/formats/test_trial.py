"""A place is tried before it is worked for, and nothing is left of the trial."""

from pathlib import Path

import pytest

from loralens.errors import FormatError, OptionError
from loralens.formats.files.trial import check_place


def test_a_place_and_what_is_none(tmp_path: Path) -> None:
    check_place(tmp_path / "new")
    check_place(tmp_path / "deep" / "er" / "new")
    (tmp_path / "file").write_text("")
    with pytest.raises(FormatError, match="file/new: cannot be written: Not a directory"):
        check_place(tmp_path / "file" / "new")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    with pytest.raises(OptionError, match="link: is a link to nothing"):
        check_place(tmp_path / "link")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]
