"""loralens-q: what goes in comes out, what was there before comes back, and damage is said."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

import loralens
from loralens.cli.main import main
from loralens.compression.loss import losses, total_error
from loralens.core.adapter import Extra, Finding
from loralens.core.few_bits.quantised import NAME
from loralens.core.lazy import LazyArray
from loralens.core.lowrank import Layout
from loralens.core.scaling import Scaling
from loralens.errors import FormatError, LoraLensError, MismatchError, OptionError
from loralens.formats.dialects.quantised import reader as quantised
from loralens.formats.dialects.quantised.writer import write
from loralens.formats.dialects.sizes import file_size
from loralens.formats.dialects.table import FORMATS
from loralens.formats.files.container import RECORD, Stored, read_safetensors
from tests.conftest import real_adapters
from tests.formats.test_fuzz import read_everything
from tests.marks import examples
from tests.tolerances import INT4, INT8

CONFORMANCE = Path(__file__).parent.parent / "conformance"
CONFIG = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "conv", "embed"], "strange": [1.5]}


def adapter() -> loralens.Adapter:
    """A linear layer, a convolution and an embedding of odd sizes and rank 3, as PEFT has them, and three extras."""
    rng = np.random.default_rng(2)
    scaling = Scaling("alpha/r", 6, 3, "adapter_config.json")
    sizes = {"q_proj": (7, 5, Layout()), "conv": (9, 27, Layout("conv", (3, 3))), "embed": (5, 31, Layout("embedding"))}
    modules = {
        f"model.{name}": loralens.LowRank(
            rng.standard_normal((out, 3)).astype(np.float32), rng.standard_normal((3, in_)).astype(np.float32), 2.0,
            scaling=scaling, layout=layout,
        )
        for name, (out, in_, layout) in sizes.items()
    }  # fmt: skip
    prefix = "base_model.model.model."
    magnitude = LazyArray.of(rng.standard_normal(7).astype(np.float32))
    head = LazyArray.of(rng.standard_normal((2, 7)).astype(np.float16))
    bias = LazyArray.of(np.arange(7.0))
    return loralens.Adapter(
        modules=modules,
        extra={
            f"{prefix}q_proj.lora_magnitude_vector": Extra("magnitude", "model.q_proj", magnitude, "weight"),
            "base_model.model.score.weight": Extra("saved", "score", head),
            f"{prefix}q_proj.bias": Extra("bias", "model.q_proj", bias, "bias"),
        },
        config=CONFIG,
        metadata={"format": "pt", "note": "ä"},
        base_model="org/base",
        findings=(Finding("note", "of-old", "said before", "nothing"),),
    )


def relative(one: loralens.Adapter, other: loralens.Adapter) -> float:
    """The largest relative error of any module, from dense updates."""
    return max(
        float(np.linalg.norm(module.dense() - other[name].dense()) / (np.linalg.norm(module.dense()) or 1))
        for name, module in one.items()
    )


@pytest.mark.parametrize(("bits", "limit"), [(8, 1.5 * INT8), (4, 1.5 * INT4), (3, 0.5), (16, 2e-4)])
def test_written_and_read(bits: int, limit: float, tmp_path: Path) -> None:
    before = adapter()
    loralens.save(before, tmp_path / "out", format=NAME, bits=bits)
    (file,) = (tmp_path / "out").iterdir()
    assert file.name == "adapter_quantised.safetensors"
    assert file.stat().st_size == file_size(before, "loralens-q", bits=bits)
    back = loralens.load(tmp_path / "out")
    assert (back.format, back.base_model, back.config, back.findings) == (NAME, "org/base", CONFIG, before.findings)
    assert relative(before, back) <= limit
    for name, module in before.items():
        assert (back[name].scale, back[name].scaling, back[name].layout) == (2.0, module.scaling, module.layout)
        assert back[name].dtype == np.float32
        assert back[name].parameters == module.parameters
    assert list(back.extra) == list(before.extra)
    for key, extra in before.extra.items():
        there = back.extra[key]
        assert (there.role, there.module, there.parameter) == (extra.role, extra.module, extra.parameter)
        assert there.tensor.read().tobytes() == extra.tensor.read().tobytes()
        assert there.tensor.dtype == extra.tensor.dtype
    assert RECORD not in back.metadata  # it says all of that itself


def test_untouched_it_is_the_same_file_to_the_bit(tmp_path: Path) -> None:
    loralens.save(adapter(), tmp_path / "one.safetensors", format=NAME, bits=4)
    back = loralens.load(tmp_path / "one.safetensors")
    loralens.save(back, tmp_path / "two.safetensors", bits=8)  # nothing is left to round
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    assert all(back[name].origin for name in back)


def test_expanded_it_is_what_it_was(tmp_path: Path) -> None:
    before = adapter()
    loralens.save(before, tmp_path / "plain")
    loralens.save(loralens.load(tmp_path / "plain"), tmp_path / "q", format=NAME)
    small = loralens.load(tmp_path / "q")
    loralens.save(small, tmp_path / "again", format="peft")
    first, again = loralens.load(tmp_path / "plain"), loralens.load(tmp_path / "again")
    assert again.format == "peft"
    assert (again.config, again.metadata) == (first.config, first.metadata)
    assert {k: v.tensor.read().tobytes() for k, v in again.extra.items()} == {
        k: v.tensor.read().tobytes() for k, v in first.extra.items()
    }
    for name, module in small.items():
        np.testing.assert_array_equal(again[name].B, module.B)
        np.testing.assert_array_equal(again[name].A, module.A)
        assert again[name].scale == module.scale
        assert again[name].layout == module.layout


def test_fewer_directions_are_another_rank_in_the_configuration(tmp_path: Path) -> None:
    before = adapter()
    bits = {"model.q_proj": [8, 4], "model.conv": [5], "model.embed": [16, 8, 2]}
    loralens.save(before, tmp_path / "q", format=NAME, bits=bits)
    small = loralens.load(tmp_path / "q")
    assert {name: module.rank for name, module in small.items()} == {name: len(each) for name, each in bits.items()}
    assert (tmp_path / "q" / "adapter_quantised.safetensors").stat().st_size == file_size(
        before, "loralens-q", bits=bits
    )
    loralens.save(small, tmp_path / "again", format="peft")
    again = loralens.load(tmp_path / "again")
    assert {name: module.rank for name, module in again.items()} == {name: len(each) for name, each in bits.items()}
    assert all(module.scale == 2.0 for module in again.modules.values())
    assert again.config["strange"] == [1.5]


def test_a_changed_module_is_rounded_anew_and_others_stay(tmp_path: Path) -> None:
    loralens.save(adapter(), tmp_path / "q.safetensors", format=NAME)
    back = loralens.load(tmp_path / "q.safetensors")
    changed = replace(back, modules={**back.modules, "model.q_proj": back["model.q_proj"].without_origin()})
    loralens.save(changed, tmp_path / "two.safetensors", bits=4)
    two = loralens.load(tmp_path / "two.safetensors")
    assert two["model.q_proj"].nbytes < back["model.q_proj"].nbytes
    np.testing.assert_array_equal(two["model.conv"].B, back["model.conv"].B)


def test_an_unknown_scale_stays_unknown(tmp_path: Path) -> None:
    loralens.save(replace(adapter(), extra={}), tmp_path / "peft")
    (tmp_path / "peft" / "adapter_config.json").unlink()
    (tmp_path / "peft" / "adapter_model.safetensors").rename(tmp_path / "bare.safetensors")
    bare = loralens.load(tmp_path / "bare.safetensors")
    assert [finding.code for finding in bare.findings] == ["alpha-unknown"]
    loralens.save(bare, tmp_path / "q", format=NAME)
    back = loralens.load(tmp_path / "q")
    assert [finding.code for finding in back.findings] == ["alpha-unknown"]
    assert {module.scaling.formula for module in back.modules.values()} == {"unknown"}
    assert loralens.load(tmp_path / "q", scale=3.0)["model.q_proj"].scale == 3.0


def test_text_that_is_odd_and_harmless_comes_back() -> None:
    odd = "a\u00a0b\u00ad"
    extra = {odd: Extra("other", odd, LazyArray.of(np.ones(2)))}
    back = quantised.read(write(replace(adapter(), extra=extra, findings=(Finding("note", odd, odd, odd),))))
    assert back.extra[odd].module == odd
    assert back.findings[0].text == odd


def test_options_that_make_no_sense(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"model\.conv: 17 are not the bit widths"):
        loralens.save(adapter(), tmp_path / "q", format=NAME, bits=17)
    with pytest.raises(OptionError, match="bits for nowhere"):
        loralens.save(adapter(), tmp_path / "q", format=NAME, bits={"nowhere": [8]})
    lycoris = loralens.load(CONFORMANCE / "lycoris-loha-wide")
    with pytest.raises(MismatchError, match="loralens convert --rank"):
        loralens.save(lycoris, tmp_path / "q", format=NAME)
    assert not (tmp_path / "q").exists()


@pytest.mark.some(12)
@pytest.mark.parametrize("case", sorted(folder.name for folder in CONFORMANCE.iterdir() if folder.is_dir()))
def test_every_dialect_goes_in_is_told_apart_and_comes_back(case: str, tmp_path: Path) -> None:
    """Its extras lie in the file too, and must not make it another dialect's."""
    folder = CONFORMANCE / case
    if not (folder / "expected.safetensors").is_file():
        pytest.skip("no case")
    named = folder / "load.json"
    said = json.loads(named.read_text()) if named.is_file() else {}
    (file,) = (f for f in folder.iterdir() if f.suffix != ".json" and f.name != "expected.safetensors")
    source = loralens.load(file, **said)
    pairs = {name: module for name, module in source.items() if isinstance(module, loralens.LowRank)}
    if not pairs:
        pytest.skip("no pairs")
    source = replace(source, modules=pairs)
    loralens.save(source, tmp_path / "q.safetensors", format=NAME, bits=16)
    there = read_safetensors(tmp_path / "q.safetensors")
    assert [form.name for form in FORMATS if form.detect(there)] == [NAME]
    back = loralens.load(tmp_path / "q.safetensors")
    assert relative(source, back) <= 2e-4
    expanded = quantised.expand(back)
    origin = source if source.format != NAME else quantised.expand(source)
    assert (expanded.format, expanded.config, expanded.metadata) == (origin.format, origin.config, origin.metadata)
    assert list(expanded.extra) == list(source.extra)


DAMAGE = {
    "a tensor is gone": (lambda tensors, said: tensors.pop("model.conv.q"), "model.conv.q is missing"),
    "an extra is gone": (
        lambda tensors, said: tensors.pop("extra/base_model.model.score.weight"),
        "extra/base_model.model.score.weight is missing",
    ),
    "a tensor too many": (lambda tensors, said: tensors.update(x=np.zeros(3)), "x is not in the description"),
    "a byte is gone": (lambda tensors, said: cut(tensors, slice(0, -1)), "bytes, and 3 directions"),
    "scales are gone": (lambda tensors, said: cut(tensors, slice(0, 3)), "cannot hold 3 directions"),
    "another dtype": (
        lambda tensors, said: tensors.update({"model.conv.q": tensors["model.conv.q"].astype(np.int32)}),
        "int32",
    ),
    "bits of no kind": (lambda tensors, said: poke(tensors, 0, 17), "its directions have 8 to 17 bits"),
    "other bits": (lambda tensors, said: poke(tensors, 0, 9), "bytes, and 3 directions"),
    "another shape": (lambda tensors, said: said["modules"]["model.conv"].__setitem__(0, 10), "bytes, and"),
    "no shape": (lambda tensors, said: said["modules"]["model.conv"].__setitem__(0, 0), "description is damaged"),
    "a kernel that does not fit": (lambda tensors, said: said["layouts"][0].__setitem__(1, [2]), "do not fit"),
    "a rank too high": (lambda tensors, said: said["modules"]["model.conv"].__setitem__(2, 10), "10 directions"),
    "no such scaling": (lambda tensors, said: said["modules"]["model.conv"].__setitem__(3, 1), "damaged"),
    "a scale beyond float64": (lambda tensors, said: said["scalings"][0].__setitem__(0, 10**400), "damaged"),
    "an infinite scale": (lambda tensors, said: said["scalings"][0].__setitem__(0, float("inf")), "damaged"),
    "no modules": (lambda tensors, said: (said["modules"].clear(), tensors.clear(), said["extra"].clear()), "no mod"),
    "another version": (lambda tensors, said: said.update(version=2), "of version 2, but this loralens knows 1"),
    "no version": (lambda tensors, said: said.pop("version"), "of version None"),
    "no scalings": (lambda tensors, said: said.pop("scalings"), "description is damaged"),
    "a source for no terminal": (lambda tensors, said: said.update(source="\x1b[2J"), "description is damaged"),
    "a source that is no name": (lambda tensors, said: said.update(source=3), "description is damaged"),
    "a configuration that is none": (lambda tensors, said: said.update(config=[]), "description is damaged"),
    "an extra without a role": (
        lambda tensors, said: said["extra"].update({"base_model.model.score.weight": ["saved"]}),
        "score.weight is damaged",
    ),
}


def cut(tensors, part):
    tensors["model.conv.q"] = tensors["model.conv.q"][part]


def poke(tensors, place, value):
    tensors["model.conv.q"] = tensors["model.conv.q"].copy()
    tensors["model.conv.q"][place] = value


@cache
def written():
    stored = write(adapter())
    return {key: tensor.read() for key, tensor in stored.tensors.items()}, stored.metadata[NAME]


def parts():
    """The tensors, which nobody may write into, and the description, which is the caller's own."""
    tensors, text = written()
    return dict(tensors), json.loads(text)


def put_together(tensors, said):
    return Stored({key: LazyArray.of(array) for key, array in tensors.items()}, {NAME: json.dumps(said)})


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_said(damage, message: str) -> None:
    tensors, said = parts()
    damage(tensors, said)
    with pytest.raises(FormatError, match=message):
        read_everything(quantised.read(put_together(tensors, said)))


@pytest.mark.parametrize("text", ["", "[]", "{", '{"version": 1}', "[" * 100_000])
def test_descriptions_that_are_none(text: str) -> None:
    with pytest.raises(FormatError, match="description"):
        quantised.read(Stored({}, {NAME: text}))


def test_a_scale_that_is_nan_is_found_when_it_is_read() -> None:
    tensors, said = parts()
    conv = tensors["model.conv.q"] = tensors["model.conv.q"].copy()
    conv[3:7] = np.frombuffer(np.float32(np.nan).tobytes(), np.uint8)
    broken = quantised.read(put_together(tensors, said))
    assert np.isfinite(broken["model.conv"].A).all()
    with pytest.raises(FormatError, match="a scale is NaN or Inf"):
        _ = broken["model.conv"].B


@pytest.mark.slow
@examples(150, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_description_gives_an_adapter_or_a_message(data: st.DataObject) -> None:
    tensors, said = parts()
    wrong = st.one_of(st.none(), st.integers(-2, 20), st.floats(), st.text(max_size=3), st.lists(st.integers(0, 3)))
    at: object = said
    while isinstance(at, dict | list) and at:
        key = data.draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
        if not isinstance(at[key], dict | list) or not at[key] or data.draw(st.booleans()):
            at[key] = data.draw(wrong)
            break
        at = at[key]
    try:
        read_everything(quantised.read(put_together(tensors, said)))
    except LoraLensError as error:
        assert error.fix  # noqa: PT017


# ---------------------------------------------------------------- from the shell


def run(*arguments: object) -> str:
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_every_command_reads_it(small: Path, tmp_path: Path) -> None:
    assert "Wrote" in run("convert", small, "-o", tmp_path / "q", "--to", NAME)
    assert "loralens-q" in run("inspect", tmp_path / "q")
    run("convert", tmp_path / "q", "-o", tmp_path / "back", "--to", "peft")
    assert json.loads((tmp_path / "back" / "adapter_config.json").read_text()) == json.loads(
        (small / "adapter_config.json").read_text()
    )
    told, plain = (json.loads(run("spectrum", path, "--json"))["adapters"][0] for path in (tmp_path / "q", small))
    for one, other in zip(told["modules"], plain["modules"], strict=True):
        assert one["name"] == other["name"]
        np.testing.assert_allclose(one["singular_values"], other["singular_values"], rtol=INT8)
    run("convert", tmp_path / "q", "-o", tmp_path / "kohya.safetensors", "--to", "kohya")


def real_cases() -> list[str]:
    folder = real_adapters()
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("neg-")) if folder else []


@pytest.mark.some(2)
@pytest.mark.parametrize("case", real_cases())
def test_real_adapters_in_eight_and_four_bits(case: str, real: Path, tmp_path: Path) -> None:
    source = loralens.load(real / case, allow_pickle=True, strict=False)
    # At most 24 modules, evenly spread over all blocks and kinds; the limit holds for each of them.
    names = list(source)
    chosen = set(names[:: -(-len(names) // 24) | 1])
    source = source.without([name for name in names if name not in chosen])
    for bits, limit in ((8, INT8), (4, INT4)):
        file = tmp_path / f"{bits}.safetensors"
        loralens.save(source, file, format=NAME, bits=bits)
        assert total_error(losses(source, loralens.load(file))) <= limit
        assert [form.name for form in FORMATS if form.detect(read_safetensors(file))] == [NAME]


# ---------------------------------------------------------------- PEFT as the judge


@pytest.mark.usefixtures("quiet_torch")
@pytest.mark.parametrize("bits", [8, 4])
def test_peft_loads_what_comes_out_and_the_model_moves_as_said(bits: int, tmp_path: Path) -> None:
    torch, peft, transformers = (pytest.importorskip(name) for name in ("torch", "peft", "transformers"))
    torch.manual_seed(0)
    base = transformers.LlamaConfig(
        vocab_size=24, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip

    def model():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(base)

    config = peft.LoraConfig(r=5, lora_alpha=7, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"])
    trained = peft.get_peft_model(model(), config)
    for name, parameter in trained.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data = torch.randn_like(parameter)
    trained.save_pretrained(tmp_path / "trained")
    source = loralens.load(tmp_path / "trained")
    mixed = {name: [bits, bits, bits - 1] for name in source}
    loralens.save(source, tmp_path / "q", format=NAME, bits=mixed)
    run("convert", tmp_path / "q", "-o", tmp_path / "peft", "--to", "peft")

    small = loralens.load(tmp_path / "q")
    by_hand = model()
    ids = torch.arange(22).reshape(2, 11) % 24
    with torch.no_grad():
        for name, module in small.items():
            by_hand.get_submodule(name).weight += torch.from_numpy(module.dense()).float()
        by_hand.lm_head.weight.copy_(
            torch.from_numpy(np.array(small.extra["base_model.model.lm_head.weight"].tensor.read()))
        )
        expected = by_hand(ids).logits
        found = peft.PeftModel.from_pretrained(model(), tmp_path / "peft")(ids).logits
        assert (expected - model()(ids).logits).abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
