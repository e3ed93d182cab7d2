"""A place is tried before it is worked for, and nothing is left of the trial."""

from pathlib import Path

import pytest

from loralens.errors import FormatError, OptionError
from loralens.formats.files.disk import check_new_folder


def test_a_place_and_what_is_none(tmp_path: Path) -> None:
    check_new_folder(tmp_path / "new")
    check_new_folder(tmp_path / "deep" / "er" / "new")
    (tmp_path / "file").write_text("")
    with pytest.raises(FormatError, match="file/new: cannot be written: Not a directory"):
        check_new_folder(tmp_path / "file" / "new")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    with pytest.raises(OptionError, match="link: is a link to nothing"):
        check_new_folder(tmp_path / "link")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]
