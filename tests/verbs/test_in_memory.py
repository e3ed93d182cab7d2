"""Adapters and bases in every form that Python has: models, state dicts, results and objects instead of paths."""

import pickle
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loralens
from loralens import Adapter, LowRank, OptionError
from loralens.verbs import VERBS
from tests import models
from tests.marks import when_used

torch = when_used("torch")
peft = when_used("peft")


@pytest.fixture(scope="module")
def base() -> Any:
    return models.llama(tie_word_embeddings=True).to(torch.bfloat16)


@pytest.fixture
def model() -> Any:
    """A model of PEFT in bfloat16 with one trained adapter."""
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return models.shake(peft.get_peft_model(models.llama(tie_word_embeddings=True).to(torch.bfloat16), config), 0.125)


@pytest.fixture
def saved(model: Any, tmp_path: Path) -> str:
    model.save_pretrained(tmp_path / "saved")
    return str(tmp_path / "saved")


def forms(model: Any, saved: str) -> Iterator[Any]:
    state = peft.get_peft_model_state_dict(model)
    yield from (model, loralens.load(saved), (state, model.peft_config["default"]))
    yield state, model.peft_config["default"].to_dict()
    yield {key: value.float().numpy() for key, value in state.items()}, {"peft_type": "LORA", "r": 4, "lora_alpha": 6}


def test_every_form_is_the_adapter_that_peft_saves(model: Any, saved: str) -> None:
    expected = loralens.spectrum(saved)
    for form in forms(model, saved):
        result = loralens.spectrum(form)
        assert list(result) == list(expected)
        for name in expected:
            np.testing.assert_array_equal(result[name].s, expected[name].s)
        assert loralens.equal(form, saved).answer


def test_the_verbs_that_write_take_a_model_too(model: Any, saved: str, tmp_path: Path) -> None:
    for name, verb in (("compress", loralens.compress), ("scale", lambda a, **k: loralens.scale(a, 0.5, **k))):
        verb(model, output=tmp_path / f"{name}-1", **({"rank": 2} if name == "compress" else {}))
        verb(saved, output=tmp_path / f"{name}-2", **({"rank": 2} if name == "compress" else {}))
        one, other = (loralens.load(tmp_path / f"{name}-{number}") for number in (1, 2))
        assert one == other


def test_a_base_in_memory_gives_the_numbers_of_its_folder(base: Any, model: Any, tmp_path: Path) -> None:
    folder = str(models.folder(base, tmp_path / "base"))
    for verb in (loralens.spectrum, loralens.amplify, loralens.intruders, loralens.inspect, loralens.doctor):
        options = {"no_cache": True} if verb in (loralens.amplify, loralens.intruders) else {}
        in_memory = verb(model, base=base, **options).to_csv()
        # A PEFT model is a base too: its weights without the adapter.
        assert in_memory == verb(model, base=model, **options).to_csv()
        assert in_memory == verb(model, base=folder, **options).to_csv()


def test_a_merge_into_a_model_in_memory_is_that_into_its_folder(base: Any, model: Any, tmp_path: Path) -> None:
    folder = models.folder(base, tmp_path / "base")
    loralens.live(model).merge(base, output=tmp_path / "one")
    loralens.merge(model, base=folder, output=tmp_path / "other")
    one, other = ((tmp_path / name / "model.safetensors") for name in ("one", "other"))
    from safetensors.numpy import load_file

    first, second = load_file(one), load_file(other)
    assert first.keys() == second.keys()
    assert all(first[key].tobytes() == second[key].tobytes() for key in first)
    assert loralens.verify(tmp_path / "one", base=base, adapter=model).answer
    loralens.unmerge(tmp_path / "one", output=tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()


def test_a_difference_of_models_in_memory_is_extracted(base: Any, model: Any, tmp_path: Path) -> None:
    loralens.merge(model, base=base, dtype="f32", output=tmp_path / "merged")
    tuned = type(base).from_pretrained(tmp_path / "merged")
    result = loralens.extract(base, tuned, rank=4)
    assert loralens.similarity(result, model).adapters
    assert result.adapter.base_model == ""


def test_full_modules_and_tied_heads_are_read(base: Any) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = models.shake(peft.get_peft_model(models.llama(), config), 0.125)
    (head,) = (extra for extra in loralens.live(model).extra.values() if extra.role == "saved")
    assert head.module == "lm_head"
    # The base is what the model was before, and not what was trained in full.
    stored = loralens.core.ModelInMemory(model).tensors
    assert sorted(stored) == sorted(models.llama().state_dict())
    assert "lm_head.weight" not in loralens.core.ModelInMemory(base).tensors


def test_of_several_adapters_the_active_one_counts(model: Any) -> None:
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert loralens.spectrum(model).only.adapter.rank == 4
    model.set_adapter("other")
    result = loralens.spectrum(model)
    assert result.only.adapter.rank == 2
    assert result.only.path == "in memory: PeftModelForCausalLM (other)"
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(loralens.OptionError, match="2 of the adapters default, other are active"):
        loralens.spectrum(model)
    assert loralens.spectrum(loralens.live(model, "other")).only.adapter.rank == 2


def test_a_merged_model_is_an_adapter_and_no_base(model: Any, saved: str) -> None:
    model.merge_adapter()
    assert loralens.equal(model, saved).answer
    with pytest.raises(loralens.OptionError, match="an adapter is merged into"):
        loralens.spectrum(saved, base=model)
    with pytest.raises(loralens.OptionError, match="the model has no adapter"):
        loralens.spectrum(model.unload())


def test_a_base_of_codes_is_refused(model: Any, base: Any) -> None:
    coded = models.llama()
    layer = coded.model.layers[0].self_attn.q_proj
    layer.weight = torch.nn.Parameter(torch.zeros(128, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(loralens.FormatError, match=r"its weights are quantised \(Linear at model.layers.0"):
        loralens.spectrum(model, base=coded)
    with pytest.raises(loralens.FormatError, match="not in memory"):
        loralens.spectrum(model, base=models.llama().to("meta"))
    for nothing in (3, object()):
        with pytest.raises(loralens.OptionError, match="is not a base model"):
            loralens.spectrum(model, base=nothing)
        with pytest.raises(loralens.OptionError, match="is not an adapter"):
            loralens.spectrum(nothing)


def test_a_result_stands_for_its_adapter(saved: str, tmp_path: Path) -> None:
    adapter = loralens.load(saved)
    small = adapter.compress(rank=2)
    assert loralens.spectrum(small).only.adapter.rank == 2
    written = loralens.compress(saved, rank=2, output=tmp_path / "small")
    assert loralens.spectrum(written).only.path == str(tmp_path / "small")
    assert [each.path for each in loralens.spectrum([adapter, small, written]).adapters] == [
        saved,
        f"in memory: compress of {saved}",
        str(tmp_path / "small"),
    ]
    assert small.adapter == written.adapter
    # Several at once: those that were written.
    several = loralens.compress([saved, str(tmp_path / "small")], rank=1, output=tmp_path / "both")
    assert [each.adapter.rank for each in loralens.spectrum(several).adapters] == [1, 1]
    with pytest.raises(loralens.OptionError, match="nothing was written"):
        loralens.spectrum(loralens.compress([saved], rank=1))


def test_an_adapter_says_where_it_came_from(model: Any, saved: str) -> None:
    model.peft_config["default"].base_model_name_or_path = "org/tiny"
    assert loralens.load(saved).source == saved
    assert loralens.live(model).source == "in memory: PeftModelForCausalLM of org/tiny"
    frame = loralens.spectrum(model, saved).to_frame()
    assert list(dict.fromkeys(frame["path"])) == ["in memory: PeftModelForCausalLM of org/tiny", saved]
    twice = loralens.spectrum(loralens.load(saved), loralens.load(saved))
    assert [each.path for each in twice.adapters] == [f"{saved} 1", f"{saved} 2"]
    assert (2 * loralens.load(saved)).source == f"in memory: sum of {saved}"


def test_the_verbs_are_methods(saved: str, base: Any) -> None:
    adapter = loralens.load(saved)
    for name in ("spectrum", "doctor", "inspect", "curve"):
        assert getattr(adapter, name)().to_csv() == getattr(loralens, name)(adapter).to_csv()
    assert adapter.similarity(2 * adapter).adapters
    assert adapter.amplify(base, no_cache=True).to_csv() == loralens.amplify(saved, base=base, no_cache=True).to_csv()
    assert {"compress", "merge", "save"} <= {*dir(adapter)}
    assert next(iter(signature(adapter.merge).parameters)) == "base"
    assert "rank" in signature(adapter.compress).parameters
    assert adapter.compress.__doc__ == loralens.compress.__doc__


def test_no_verb_that_begins_with_an_adapter_is_missing() -> None:
    first = {name: next(iter(signature(getattr(loralens, name)).parameters)) for name in VERBS if name != "schema"}
    of_adapters = {name for name, each in first.items() if each in ("adapter", "adapters", "source", "first")}
    # A trajectory is one of several checkpoints.
    assert of_adapters - {"trajectory"} == {name for name in VERBS if hasattr(Adapter, name)}


def test_equal_is_equal_in_content(saved: str) -> None:
    adapter, again = loralens.load(saved), loralens.load(saved)
    assert adapter == again
    assert hash(adapter) == hash(again)
    assert adapter == pickle.loads(pickle.dumps(adapter))
    assert adapter != 2 * adapter
    assert adapter != adapter["*.q_proj"]
    assert adapter != "adapter"
    name = next(iter(adapter))
    B = adapter[name].B.copy()
    B[0, 0] += 1
    one_number = {**adapter.modules, name: LowRank(B, adapter[name].A, adapter[name].scale)}
    assert adapter != Adapter(modules=one_number)
    # loralens.equal compares the updates: here other factors have the same product.
    halved = LowRank(adapter[name].B * 2, adapter[name].A, adapter[name].scale / 2)
    other = Adapter(modules={**adapter.modules, name: halved})
    assert adapter != other
    assert loralens.equal(adapter, other).answer
    assert list(adapter.values()) == [adapter[name] for name in adapter.keys()]  # noqa: SIM118 - it is tested
    assert adapter.rank == 4


def test_weights_may_be_a_list_as_in_peft(saved: str) -> None:
    adapter = loralens.load(saved)
    other = adapter.scale(3.0)
    expected = loralens.combine((adapter, 0.5), (other, 0.25)).adapter
    assert loralens.combine([adapter, other], weights=[0.5, 0.25]).adapter == expected
    with pytest.raises(loralens.OptionError, match="2 adapters and 1 weight"):
        loralens.combine([adapter, other], weights=[0.5])


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_factors_may_be_tensors(dtype: str) -> None:
    B = torch.arange(6.0).reshape(3, 2).to(getattr(torch, dtype))
    module = LowRank(B.clone().requires_grad_(), torch.ones(2, 4, requires_grad=True))
    assert str(module.dtype) == dtype
    np.testing.assert_array_equal(module.dense(), B.double().numpy() @ np.ones((2, 4)))
    with pytest.raises(loralens.OptionError, match="B cannot be read"):
        LowRank(torch.eye(2).to_sparse(), np.ones((2, 2)))


@pytest.mark.gpu
def test_factors_may_be_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    module = LowRank(torch.ones(3, 2, device="cuda", dtype=torch.bfloat16, requires_grad=True), np.ones((2, 4)))
    np.testing.assert_array_equal(module.dense(), 2 * np.ones((3, 4)))


def test_errors_are_those_of_python_too(tmp_path: Path, saved: str) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        loralens.spectrum(tmp_path / "nothing")
    assert isinstance(caught.value, loralens.OptionError)
    assert isinstance(pickle.loads(pickle.dumps(caught.value)), FileNotFoundError)
    with pytest.raises(TypeError, match=r"^compress\(\) has no 'rnk'; did you mean 'rank'\?$"):
        loralens.compress(saved, rnk=4)
    with pytest.raises(TypeError, match=r"^load\(\) has no 'strct'; did you mean 'strict'\?$"):
        loralens.load(saved, strct=False)
    with pytest.raises(TypeError, match=r"^amplify\(\): missing a required .* 'base'$"):
        loralens.amplify(saved)


def test_messages_have_the_spelling_of_python(saved: str, base: Any, tmp_path: Path) -> None:
    with pytest.raises(loralens.OptionError) as caught:
        loralens.compress(saved)
    assert (
        "give one of rank=, energy=, error=, sv_ratio=, sv_cumulative=, parameters=, size=, such as energy=0.99"
        in str(caught.value)
    )
    loralens.compress(saved, rank=2, output=tmp_path / "there")
    with pytest.raises(loralens.OptionError, match="overwrite=True"):
        loralens.compress(saved, rank=2, output=tmp_path / "there")
    with pytest.raises(loralens.OptionError, match=r"give output=OUT, or dry_run=True"):
        loralens.merge(saved, base=base)


@pytest.mark.parametrize("verb", [loralens.verify, loralens.unmerge])
def test_a_merged_model_is_a_path(verb: Any) -> None:
    with pytest.raises(OptionError, match="not the path of a merged model"):
        verb(torch.nn.Linear(2, 2))
