"""A dry run of `merge` says how large the undo file would be, to the byte."""

from pathlib import Path
from typing import Any

import pytest

import loralens
from tests.bases import sharded, tensors
from tests.conftest import small_adapter
from tests.verbs.low_bit_bases import nf4_base, pair_adapter
from tests.verbs.test_merge_gguf import adapter_for, base_of


def case(kind: str, tmp_path: Path) -> tuple[Any, Path, dict[str, Any]]:
    """An adapter, a base, and options."""
    if kind == "shards":
        return small_adapter(), sharded(tmp_path / "base", tensors()), {}
    if kind == "gguf":
        base = base_of(tmp_path / "base.gguf", "Q4_1")
        return adapter_for(base), base, {"bits": "keep"}
    options = {"bits": "keep"} if kind == "codes" else {"dtype": "bf16"}
    return pair_adapter(), nf4_base(tmp_path / "base"), options


@pytest.mark.parametrize("kind", ["shards", "codes", "codes to floats", "gguf"])
def test_a_dry_run_says_the_size_of_the_undo_file(kind: str, tmp_path: Path) -> None:
    adapter, base, options = case(kind, tmp_path)
    out = tmp_path / ("out.gguf" if kind == "gguf" else "out")
    rehearsed = loralens.merge(adapter, base=base, dry_run=True, **options)
    written = loralens.merge(adapter, base=base, output=out, **options)
    assert written.undo_file is not None
    assert rehearsed.undo_size == written.undo_size == written.undo_file.stat().st_size
    assert rehearsed.undo_file is None
    totals = [result.certificate["total"] for result in (rehearsed, written)]
    assert totals[0] == totals[1]
    bits = f"(patches of {totals[0]['undo_bits_per_weight']:.2f} bits per changed weight)"
    assert rehearsed.sentences() == [f"undo file: would have {rehearsed.undo_size:,} bytes {bits}"]


def test_without_an_undo_file_there_is_no_size(tmp_path: Path) -> None:
    base = sharded(tmp_path / "base", tensors())
    result = loralens.merge(small_adapter(), base=base, dry_run=True, undo="none")
    assert result.undo_size is None
    assert result.certificate["total"]["undo_bytes"] is None
    assert result.sentences() == []
