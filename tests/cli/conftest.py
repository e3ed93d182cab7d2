"""What several files of tests of the command line share."""

from pathlib import Path

import pytest

from tests import models


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model with a template for conversations, where TRL is installed."""
    pytest.importorskip("trl")
    from tests.training.test_dialogues import PLAIN

    folder = models.folder(models.llama(), tmp_path_factory.mktemp("home") / "llama")
    (folder / "chat_template.jinja").write_text(PLAIN, encoding="utf-8")
    return folder
