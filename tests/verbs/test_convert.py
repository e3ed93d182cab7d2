"""``loralens.convert``: paths and objects, one result, the command's numbers, and nothing written unasked."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loralens
from loralens import Adapter, OptionError, fingerprint
from loralens.choices import TARGET_FORMATS
from loralens.formats import FORMATS
from tests.bases import contents
from tests.cli.command import Command

told = Command("convert").told
DIALECTS = ["peft", "kohya", "diffusers", "comfyui", "mlx", "loralib"]


def test_target_formats_are_those_with_a_writer() -> None:
    assert set(TARGET_FORMATS) == {form.name for form in FORMATS if form.writer}


@pytest.mark.parametrize("to", DIALECTS)
def test_the_result_is_what_load_would_read(to: str, small: Path, tmp_path: Path) -> None:
    written = loralens.convert(small, to=to, output=tmp_path / "out")
    unwritten = loralens.convert(loralens.load(small), to=to)
    back = loralens.load(tmp_path / "out")
    for result in (written, unwritten):
        assert result.adapter.format == to
        assert fingerprint(result.adapter) == fingerprint(back)
        assert {str(module.scaling) for module in result.adapter.modules.values()} == {
            str(module.scaling) for module in back.modules.values()
        }
        assert all(np.array_equal(module.dense(), back[name].dense()) for name, module in result.adapter.items())


def test_prefixes_are_texts_or_a_mapping(small: Path) -> None:
    results = [
        loralens.convert(small, to="peft", prefix=each) for each in ("model.=m.", ["model.=m."], {"model.": "m."})
    ]
    assert {next(iter(result.adapter)) for result in results} == {"m.layers.0.self_attn.q_proj"}


def test_without_output_nothing_is_written(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = contents(small.parent)
    result = loralens.convert(small, to="kohya")
    assert isinstance(result.adapter, Adapter)
    assert contents(small.parent) == before
    assert not list(tmp_path.iterdir())
    assert not any("wrote" in line or "write" in line for line in result.sentences())
    assert (
        Command("convert")
        .good(small, "--to", "kohya", "--dry-run")
        .stdout.startswith(f"Would write: {small} as kohya, 6 modules, ")
    )
    assert "-o" in Command("convert").refused(small, "--to", "kohya")
    dry = loralens.convert(small, to="kohya", output=tmp_path / "out", dry_run=True)
    assert dry.conclusion()[0].startswith("Would write")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "lycoris"}, "choose one of peft, kohya"),
        ({"to": "kohya", "dtype": "f64"}, "choose one of f32, bf16, f16"),
        ({"to": "kohya", "prefix": "unet"}, "is not OLD=NEW"),
        ({"to": "kohya", "prefix": {"unet.": "x."}}, "matches nothing"),
        ({"to": "kohya", "rank": 4}, "not pairs yet"),
        ({"to": "kohya", "rank": 0}, "whole number from 1"),
        ({"to": "kohya", "alpha": 3.0}, "states its own scale"),
    ],
    ids=str,
)
def test_wrong_values_are_option_errors(options: dict[str, Any], message: str, small: Path) -> None:
    with pytest.raises(OptionError) as refusal:
        loralens.convert(small, **options)
    assert message in str(refusal.value)


@pytest.mark.parametrize(("layer", "fmt"), [("transformer_blocks.0.attn.to_q", "diffusers"), ("h.0.attn", "peft")])
def test_peft_is_said_to_find_no_module_below_the_component_of_a_pipeline(
    layer: str, fmt: str, caplog: pytest.LogCaptureFixture
) -> None:
    """PEFT 0.21.2 raises NoMatchingPeftModuleError on a transformer alone; a language model may have such names."""
    update = loralens.LowRank(np.ones((8, 2), np.float32), np.ones((2, 8), np.float32))
    converted = loralens.convert(Adapter(modules={f"transformer.{layer}": update}, format=fmt), to="peft")
    assert ("--prefix transformer.=" in caplog.text) == (fmt == "diffusers")
    assert list(converted.adapter) == [f"transformer.{layer}"]
