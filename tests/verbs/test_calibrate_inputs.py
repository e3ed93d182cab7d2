"""`calibrate --inputs`: H = E[x xᵀ] of every distinct input, half of it of general texts; and sweeps with it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import loralens
from loralens.cli.main import main
from loralens.errors import FormatError, OptionError
from loralens.formats.records.input_moments import load_input_moments, write_input_moments
from loralens.formats.records.moments import load_moments
from loralens.verbs.outputs import calibrate_inputs
from tests import models
from tests.bases import MODULES
from tests.formats.conftest import quiet_torch as quiet_torch  # a fixture: found here by its name
from tests.verbs.low_bit_bases import SHAPE, nf4_base, pair_adapter

torch = pytest.importorskip("torch")

GENERAL = ("the tree and the mat", "a cat slept on it and ran", "under the dog")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home") / "llama"
    models.folder(models.llama(), folder)
    return folder


def measured(llama: Path, target: Path, **options: Any) -> Any:
    return loralens.calibrate(
        model=llama, data=list(models.TEXTS), inputs=True, output=target, threads=1, batch=3, **options
    )


def dense(name: str, parts: tuple[tuple[str, ...], ...]) -> Any:
    """The mean over the parts of E[x xᵀ], from one text at a time and in float64."""
    model, tokenizer = models.llama(), models.tokenizer()
    rows: list[Any] = []
    layer = model.get_submodule(name)
    with (
        torch.no_grad(),
        layer.register_forward_pre_hook(lambda _, x: rows.append(x[0].double().reshape(-1, x[0].shape[-1]))),
    ):
        means = []
        for texts in parts:
            rows.clear()
            for text in texts:
                model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False))
            X = torch.cat(rows)
            means.append((X.T @ X / len(X)).numpy())
    return np.mean(means, axis=0)


def test_every_distinct_input_is_measured_half_and_half(llama: Path, tmp_path: Path, quiet_torch: None) -> None:
    result = measured(llama, tmp_path / "H.safetensors", general=list(GENERAL))
    moments = load_input_moments(tmp_path / "H.safetensors")
    first = "model.layers.0.self_attn.q_proj"
    assert moments.inputs["model.layers.0.self_attn.v_proj"] == first
    assert moments.inputs["model.layers.1.mlp.up_proj"] == "model.layers.1.mlp.gate_proj"
    assert len(moments.tensors) == len(result.inputs) == 8
    assert "lm_head" not in moments.inputs
    for name in (first, "model.layers.1.mlp.down_proj"):
        expected = dense(name, (models.TEXTS, GENERAL))
        np.testing.assert_allclose(moments.read(name), expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())
    assert moments.source["general_texts"] == 3
    assert "half and half" in result.conclusion()[0]


def test_several_passes_give_the_same_matrices(
    llama: Path, tmp_path: Path, quiet_torch: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(llama, tmp_path / "a.safetensors", general="none")
    monkeypatch.setattr(calibrate_inputs, "memory_budget", lambda: 2 * 4 * 16**2)
    measured(llama, tmp_path / "b.safetensors", general="none")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_modules_restrict_it_and_a_dry_run_writes_nothing(llama: Path, tmp_path: Path, quiet_torch: None) -> None:
    target = tmp_path / "H.safetensors"
    dry = measured(llama, target, general="none", modules=["down_proj"], block=0, dry_run=True)
    assert [row.name for row in dry.inputs] == ["model.layers.0.mlp.down_proj"]
    dry = measured(llama, target, general="none", modules=["down_proj"], dry_run=True)
    assert not target.exists()
    assert [row.name for row in dry.inputs] == [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    assert dry.nbytes == 2 * 4 * 24**2
    with pytest.raises(OptionError, match="no module matches"):
        measured(llama, target, modules=["nothing"])


@pytest.mark.slow
def test_no_general_texts_are_said_in_one_word_by_the_command_too(
    llama: Path, tmp_path: Path, quiet_torch: None
) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(models.TEXTS))
    target = tmp_path / "H.safetensors"
    line = ["calibrate", "--model", llama, "--inputs", "--data", tmp_path / "texts.txt", "--general", "none"]
    done = CliRunner().invoke(main, [*map(str, line), "-o", str(target), "--threads", "1", "--batch", "3"])
    assert done.exit_code == 0, done.output
    source = load_input_moments(target).source
    assert (source["general"], source["general_texts"]) == ("none", 0)
    measured(llama, tmp_path / "python.safetensors", general=Path("none"))
    own = load_input_moments(tmp_path / "python.safetensors")
    for name, matrix in load_input_moments(target).tensors.items():
        np.testing.assert_array_equal(matrix.read(), own.read(name))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter": "x"}, "--adapter does not go"),
        ({"out_side": True}, "--out-side does not go"),
        ({"output": None}, "too large for memory"),
        ({"inputs": False}, "need the adapter"),
    ],
)
def test_options_that_do_not_go_together(llama: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    keywords: dict[str, Any] = {"inputs": True, "output": tmp_path / "H.safetensors", **options}
    with pytest.raises(OptionError, match=message):
        loralens.calibrate(keywords.pop("adapter", None), model=llama, data=list(models.TEXTS), **keywords)


def test_each_file_of_moments_is_refused_where_the_other_is_meant(
    llama: Path, tmp_path: Path, quiet_torch: None
) -> None:
    measured(llama, tmp_path / "H.safetensors", general="none")
    with pytest.raises(FormatError, match="inputs of a base's layers"):
        load_moments(tmp_path / "H.safetensors")
    models.saved(models.adapter(models.llama(), ("q_proj",)), tmp_path / "adapter")
    small = tmp_path / "K.safetensors"
    loralens.calibrate(tmp_path / "adapter", model=llama, data=list(models.TEXTS), output=small)
    with pytest.raises(OptionError, match="bottlenecks"):
        load_input_moments(small)


def test_the_sentence_about_inputs_says_what_positions_are(llama: Path, tmp_path: Path, quiet_torch: None) -> None:
    said = str(measured(llama, tmp_path / "H.safetensors", general="none"))
    assert "inputs measured at all" in said
    assert "positions (tokens) of the texts" in said


@pytest.mark.slow
def test_general_texts_of_every_machine() -> None:
    texts, label = calibrate_inputs.general_texts(None, 20)
    assert len(texts) == 20
    assert label
    assert all(len(text.text) > 20 for text in texts)


def moments_file(path: Path, *, seed: int = 0, width: int = SHAPE[1], modules: Sequence[str] = tuple(MODULES)) -> Path:
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((300, width)) + rng.standard_normal((300, 3)) @ rng.standard_normal((3, width))
    H = (X.T @ X / 300).astype(np.float32)
    write_input_moments(
        path,
        {MODULES[0]: width},
        dict.fromkeys(modules, MODULES[0]),
        model="m",
        source={},
        fill=lambda put: put(MODULES[0], H, 300),
    )
    return path


def test_a_sweep_is_merged_verified_and_undone(tmp_path: Path) -> None:
    base, adapter = nf4_base(tmp_path / "base"), pair_adapter(1e-3)
    moments = moments_file(tmp_path / "H.safetensors")
    out = tmp_path / "out"
    swept = loralens.merge(adapter, base=base, output=out, bits="keep", rounding="sweep", moments=moments)
    assert swept.certificate["total"]["swept"] == len(MODULES)
    assert swept.certificate["rounding"] == {
        "mode": "sweep",
        "seed": 0,
        "moments": load_input_moments(moments).digest,
    }
    assert abs(swept.certificate["total"]["gain"] - 1) < 0.05
    assert "on the measured inputs, by a sweep" in " ".join(swept.conclusion())
    assert loralens.verify(out, base=base, adapter=adapter, moments=moments).verdict == "exact"
    assert loralens.verify(out, base=base, adapter=adapter).verdict == "rounded"
    with pytest.raises(loralens.LoraLensError, match="not the moments with which"):
        loralens.verify(out, base=base, adapter=adapter, moments=moments_file(tmp_path / "other.safetensors", seed=1))
    loralens.unmerge(out, output=tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


def test_moments_of_another_width_or_of_other_layers_are_refused(tmp_path: Path) -> None:
    base = nf4_base(tmp_path / "base")
    options: dict[str, Any] = {"base": base, "output": tmp_path / "out", "bits": "keep", "rounding": "sweep"}
    with pytest.raises(loralens.LoraLensError, match="moments of 64 inputs"):
        loralens.merge(pair_adapter(), moments=moments_file(tmp_path / "H.safetensors", width=64), **options)
    stranger = tmp_path / "stranger.safetensors"
    write_input_moments(
        stranger, {"x": 4}, {"x": "x"}, model="m", source={}, fill=lambda put: put("x", np.eye(4, dtype=np.float32), 1)
    )
    with pytest.raises(FormatError, match="no moments for any weight that changes"):
        loralens.merge(pair_adapter(), moments=stranger, **options)


def test_a_matrix_that_was_changed_is_refused(tmp_path: Path) -> None:
    path = moments_file(tmp_path / "H.safetensors")
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(FormatError, match="not as it was measured"):
        load_input_moments(path).read(MODULES[0])
