"""The record of a conversion: believed as far as the file agrees with it, and never trusted to be sound."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loralens
from loralens import Adapter, LowRank
from loralens.core import Finding, Scaling
from loralens.formats import Stored
from loralens.formats.dialects import conversion_record
from loralens.formats.files.container import RECORD

A, B = "lora_unet_a", "lora_unet_b"


def module(scale: float = 0.5, scaling: Scaling | None = None) -> LowRank:
    return LowRank(np.ones((3, 2), np.float32), np.ones((2, 4), np.float32), scale, scaling=scaling)


def file(*names: str, **more: Any) -> Adapter:
    return Adapter(modules={name: module() for name in names or (A, B)}, format="kohya", **more)


def entry(name: str, **scaling: Any) -> dict[str, Any]:
    said = {"rule": "alpha/r", "alpha": 1.0, "rank": 2, "origin": "alpha in the file", **scaling}
    return {"name": name, "scale": 0.5, "scaling": said}


def said(**modules: Any) -> dict[str, Any]:
    return {"format": "kohya", "base_model": "org/base", "modules": {A: entry("unet.a"), B: entry("unet.b"), **modules}}


def test_names_scales_and_the_base_come_back() -> None:
    back = conversion_record.apply(file(), said())
    assert list(back) == ["unet.a", "unet.b"]
    assert back["unet.a"].scaling == Scaling("alpha/r", 1.0, 2, "alpha in the file")
    assert (back.base_model, back.findings) == ("org/base", ())


def test_what_the_file_says_otherwise_is_the_files() -> None:
    other = {**entry("unet.a"), "scale": 0.25}
    back = conversion_record.apply(
        file(A, B, "c", base_model="file/base"), said(**{A: other, "gone": entry("unet.gone")})
    )
    assert list(back) == ["c", "unet.a", "unet.b"]
    assert (back["unet.a"].scale, back.base_model) == (0.5, "file/base")
    assert [finding.code for finding in back.findings] == ["record-disagrees"]


@pytest.mark.parametrize(
    "bad",
    [
        3, [], {}, {"name": "unet.a", "scale": 0.5},
        *({**entry("unet.a"), "scale": x} for x in (float("nan"), 10**400, True, "1")),
        *(entry("unet.a", alpha=x) for x in (float("nan"), 10**400, True, "1")),
        *(entry("unet.a", rank=x) for x in (0, 2.0)),
        *(entry("unet.a", **x) for x in ({"rule": "none"}, {"origin": 3}, {"origin": "\x1b[2J"}, {"more": 1})),
        *(entry(x) for x in ("", "\x1b[2J", None, "unet.b", "c")),
    ],
    ids=lambda bad: ascii(bad)[:60],
)  # fmt: skip
def test_a_damaged_record_says_nothing(bad: Any) -> None:
    """Nor of the modules that it has right: half of the names are worse than none. The file has a module "c" too."""
    adapter = file(A, B, "c")
    assert conversion_record.apply(adapter, said(**{A: bad})) is adapter


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "[" * 100_000])
def test_metadata_that_hold_no_record(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(bytes(16))
    assert conversion_record.read_record(Stored({}, {RECORD: text}), path) is None
    assert conversion_record.read_record(Stored({}), path) is None
    assert conversion_record.read_record(Stored({}, {RECORD: json.dumps(said())}), path) == said()


def test_a_scale_that_nobody_knew_is_not_known_afterwards(tmp_path: Path) -> None:
    unknown = module(1.0, Scaling("unknown", rank=2))
    warning = Finding("warning", "alpha-unknown", "nothing says α", "give --alpha")
    loralens.save(Adapter(modules={"q": unknown}, format="loralib", findings=(warning,)), tmp_path / "out")
    back = loralens.load(tmp_path / "out")
    assert back["q"].scaling.formula == "unknown"
    assert [finding.code for finding in back.findings] == ["alpha-unknown"]
