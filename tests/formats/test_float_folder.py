"""A package with a GGUF model under its name: the folder in floats that is made of it once."""

import io
import json
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFValueType

from loralens import FormatError, OptionError
from loralens.formats import open_checkpoint
from loralens.formats.files.location import existing_path, gguf_file, known_folder
from loralens.formats.models.model_files import resolve_path
from tests import ggufs
from tests.formats.files import model_config
from tests.formats.test_packages import Site, site  # noqa: F401 - a fixture

NAME = "llm-tiny"
# Letters in the spelling of byte-level BPE, a merge of two of them, and a token for padding.
TOKENS = ["<pad>", *"abcdefghijklmnopqrstuvwxyz", "Ġ", "ab", *(f"x{i}" for i in range(11))]

INTEGER = GGUFValueType.UINT32
# The metadata from which transformers makes a configuration and a tokenizer of these tokens.
VALUES = {
    "tokenizer.ggml.model": ("gpt2", GGUFValueType.STRING),
    "tokenizer.ggml.merges": (["a b"], GGUFValueType.ARRAY),
    "tokenizer.ggml.bos_token_id": (0, INTEGER), "tokenizer.ggml.eos_token_id": (0, INTEGER),
    "llama.feed_forward_length": (96, INTEGER), "llama.context_length": (32, INTEGER),
    "llama.vocab_size": (40, INTEGER), "llama.rope.freq_base": (10000.0, GGUFValueType.FLOAT32),
}  # fmt: skip


@pytest.fixture
def package(site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:  # noqa: F811
    """An installed package with a small GGUF model that has a tokenizer; the cache of the user is empty."""
    root = site.install(NAME, "llm_tiny/model.gguf")
    ggufs.write(root / "llm_tiny/model.gguf", ggufs.llama(), values=VALUES, tokens=TOKENS)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return root / "llm_tiny/model.gguf"


def test_a_name_is_found_and_nothing_is_made_of_it(package: Path, tmp_path: Path) -> None:
    assert gguf_file(NAME) == package
    # A name that stands in an adapter only says which model it is.
    assert existing_path(Path(NAME)) == known_folder(NAME) == package
    assert (model_config(package) or {})["hidden_size"] == 64
    assert not (tmp_path / "cache").exists()
    # A path to the file is the file: the quantised base.
    assert resolve_path(package) == package


@pytest.mark.slow
@pytest.mark.usefixtures("quiet_torch")
def test_the_folder_has_every_number_and_is_made_once(
    package: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import torch
    import transformers

    with caplog.at_level(logging.INFO, "loralens"):
        folder = resolve_path(Path(NAME))
        assert resolve_path(Path(NAME)) == folder
    assert [record.getMessage() for record in caplog.records] == [
        f"{NAME}: its weights are decoded once to float32, 0 MB in {folder}, which can be deleted later"
    ]
    assert folder.parent == tmp_path / "cache" / "loralens" / "models"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    numbers, stored = open_checkpoint(package).tensors, open_checkpoint(Path(NAME)).tensors
    assert stored.keys() == numbers.keys()
    for key, tensor in stored.items():
        assert tensor.dtype == np.float32
        np.testing.assert_array_equal(tensor.read(), numbers[key].read())
    # transformers' own reading of the GGUF file gives the same model.
    ours = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        package.parent, gguf_file=package.name, dtype=torch.float32
    ).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert transformers.AutoTokenizer.from_pretrained(folder)("abc").input_ids == [28, 3]
    # Another file under the same name is another folder.
    ggufs.write(package, ggufs.llama(seed=1))
    with pytest.raises(FormatError, match="transformers cannot make a configuration and a tokenizer"):
        resolve_path(Path(NAME))
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_it_needs_transformers(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(OptionError, match=r"a float model made from a GGUF file needs torch and transformers"):
        resolve_path(Path(NAME))
    assert not list((tmp_path / "cache" / "loralens" / "models").iterdir())


@pytest.mark.slow
@pytest.mark.usefixtures("quiet_torch")
def test_code_beside_a_gguf_file_never_runs(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers reads the configuration of a tokenizer beside the file, and would ask whether its code may run."""
    fields = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    (package.parent / "tokenizer_config.json").write_text(json.dumps(fields))
    (package.parent / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Own: pass\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 100))
    with pytest.raises(FormatError, match="cannot make a configuration and a tokenizer"):
        resolve_path(Path(NAME))
    assert not (tmp_path / "ran").exists()


def test_a_name_in_a_file_is_no_path(tmp_path: Path) -> None:
    """Nothing is opened because a file says its path."""
    for name in (str(tmp_path), "../base", "\\\\server\\share", "a/b/c", "", "a\0b", "~/x"):
        assert known_folder(name) is None, name
