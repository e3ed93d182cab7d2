"""Names of an adapter against the weights of a base."""

import pytest

from loralens import MismatchError
from loralens.core.matching import match, normal_form, same_modules, shape_fits

BERT = {f"encoder.layer.{i}.attention.self.{kind}.weight": (8, 8) for i in (0, 1, 10) for kind in ("query", "value")}
BERT |= {"pooler.dense.weight": (8, 8), "embeddings.word_embeddings.weight": (30, 8)}


def names(pattern: str, count: tuple[int, ...] = (0, 1, 10)) -> dict[str, tuple[int, int]]:
    return {pattern.format(i): (8, 8) for i in count}


@pytest.mark.parametrize(
    ("modules", "edit"),
    [
        (names("encoder.layer.{}.attention.self.query"), ""),
        (names("bert.encoder.layer.{}.attention.self.query"), "dropping 'bert.'"),
        (names("a.b.encoder.layer.{}.attention.self.query"), "dropping 'a.b.'"),
        (names("layer.{}.attention.self.query"), "adding 'encoder.'"),
        (names("lora_unet_encoder_layer_{}_attention_self_query"), "reading underscores as dots"),
        ({"embeddings.word_embeddings": (8, 30)}, ""),
    ],
)
def test_one_edit_for_all_modules(modules: dict[str, tuple[int, int]], edit: str) -> None:
    found = match(modules, BERT)
    assert found.edit == edit
    assert set(found.keys) == set(modules)
    assert all(key in BERT for key in found.keys.values())
    count = f"{len(modules)}/{len(modules)} modules match"
    assert str(found) == (f"{count} after {edit}" if edit else count)


def test_no_edit_that_leaves_one_module_behind() -> None:
    modules = names("bert.encoder.layer.{}.attention.self.query") | {"classifier": (2, 8)}
    with pytest.raises(MismatchError, match="4 of 4 modules have no weight") as caught:
        match(modules, BERT)
    assert "encoder.layer" in caught.value.fix


def test_another_model_is_said_to_be_one() -> None:
    with pytest.raises(MismatchError, match="another model"):
        match({"pooler.dense": (8, 9)}, BERT)


def test_ambiguous_underscores_are_refused() -> None:
    base = {"a.b_c.weight": (4, 4), "a_b.c.weight": (4, 4)}
    with pytest.raises(MismatchError):
        match({"lora_unet_a_b_c": (4, 4)}, base)


@pytest.mark.parametrize(
    ("update", "weight", "plain", "expert"),
    [
        ((6, 4), (6, 4), True, True),
        ((6, 4), (4, 6), True, True),
        ((6, 36), (6, 4, 3, 3), True, True),
        ((6, 4), (3, 6, 4), False, True),
        ((6, 4), (3, 4, 6), False, True),
        ((6, 4), (1, 4, 6), True, True),
        ((6, 4), (6, 5), False, False),
        ((6, 4), (24,), False, False),
        ((6, 4), (), False, False),
    ],
)
def test_fits(update: tuple[int, int], weight: tuple[int, ...], plain: bool, expert: bool) -> None:
    assert shape_fits(update, weight, expert=False) is plain
    assert shape_fits(update, weight, expert=True) is expert


@pytest.mark.parametrize(
    "name",
    [
        "unet.a.b.0.c",
        "lora_unet_a_b_0_c",
        "lora_unet_unet_a_b_0_c",
        "diffusion_model.a.b.0.c",
        "a/b/0/c",
        "transformer.a.b.0.c",
    ],
)
def test_normal_form_is_one_for_all_dialects(name: str) -> None:
    assert normal_form(name) == "a_b_0_c"


def test_experts_share_their_weight() -> None:
    base = {"experts.gate_up_proj": (2, 6, 4)}
    found = match({"experts.gate_up_proj[0]": (6, 4), "experts.gate_up_proj[1]": (6, 4)}, base)
    assert set(found.keys.values()) == {"experts.gate_up_proj"}


def test_missing_modules_may_be_left_out() -> None:
    modules = names("bert.encoder.layer.{}.attention.self.query") | {"bert.classifier": (2, 8)}
    found = match(modules, BERT, allow_missing=True)
    assert set(found.keys) == set(modules) - {"bert.classifier"}
    assert found.edit == "dropping 'bert.'"
    modules = names("lora_unet_encoder_layer_{}_attention_self_query") | {"lora_unet_nowhere": (2, 8)}
    assert len(match(modules, BERT, allow_missing=True).keys) == 3
    with pytest.raises(MismatchError):
        match({"nowhere": (2, 8)}, BERT, allow_missing=True)


def test_the_same_modules_in_two_dialects() -> None:
    first, second = ["lora_unet_a_b", "lora_unet_c", "d"], ["d", "unet.a.b", "e"]
    assert same_modules(first, second) == {"lora_unet_a_b": "unet.a.b", "d": "d"}
    assert same_modules(second, first) == {"d": "d", "unet.a.b": "lora_unet_a_b"}


LAYER = "encoder.layers.0.self_attn.q_proj"
FIRST = [
    f"text_encoder.text_model.{LAYER}", f"text_encoder.{LAYER}", f"text_encoders.clip_l.transformer.text_model.{LAYER}",
    "lora_te1_text_model_encoder_layers_0_self_attn_q_proj", "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
]  # fmt: skip
SECOND = [
    f"text_encoder_2.text_model.{LAYER}", f"text_encoder_2.{LAYER}",
    f"text_encoders.clip_g.transformer.text_model.{LAYER}", "lora_te2_text_model_encoder_layers_0_self_attn_q_proj",
]  # fmt: skip
T5 = [
    "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q", "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q",
    "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q",
    "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
]  # fmt: skip


@pytest.mark.parametrize("alike", [FIRST, SECOND, T5], ids=["first", "second", "T5"])
def test_a_text_encoder_is_itself_in_every_dialect(alike: list[str]) -> None:
    for name in alike:
        for other in alike:
            assert same_modules([name], [other]) == {name: other}


def test_two_text_encoders_are_never_one() -> None:
    for name in FIRST:
        for other in SECOND:
            assert same_modules([name], [other]) == same_modules([other], [name]) == {}
            assert normal_form(name) != normal_form(other)  # of which fingerprints are made
            for first in FIRST:
                for second in SECOND:
                    assert same_modules([name, other], [second, first]) == {name: first, other: second}


@pytest.mark.parametrize("inner", ["", "text_model."], ids=["transformers 5", "transformers 4"])
def test_each_text_encoder_finds_its_own_weights_in_a_pipeline(inner: str) -> None:
    first, second = (f"{encoder}.{inner}{LAYER}.weight" for encoder in ("text_encoder", "text_encoder_2"))
    pipeline = {"unet.conv_in.weight": (4, 4, 3, 3), first: (8, 8), second: (8, 8)}
    for name in FIRST:
        for other in SECOND:
            both = {name: (8, 8), other: (8, 8)}
            assert match(both, pipeline).keys == {name: first, other: second}
        assert match({name: (8, 8)}, pipeline).keys == {name: first}
        assert match({name: (8, 8)}, {first: (8, 8)}).keys == {name: first}
        with pytest.raises(MismatchError):  # the second alone has none of the first's
            match({name: (8, 8)}, {second: (8, 8)})
    for name in SECOND:
        assert match({name: (8, 8)}, pipeline).keys == {name: second}
        with pytest.raises(MismatchError):  # Stable Diffusion 1.5 has one
            match({name: (8, 8)}, {first: (8, 8), "unet.conv_in.weight": (4, 4, 3, 3)})
        with pytest.raises(MismatchError):
            match({FIRST[0]: (8, 8), name: (8, 8)}, {second: (8, 8)})


def test_a_text_encoder_by_itself_is_whichever_it_fits() -> None:
    """A folder of one encoder says no number; one that both of an adapter fit is not taken for two."""
    alone = {f"{LAYER}.weight": (8, 8)}
    for name in (*FIRST, *SECOND):
        assert match({name: (8, 8)}, alone).keys == {name: f"{LAYER}.weight"}
    sizes = {FIRST[3]: (6, 6), SECOND[3]: (8, 8)}
    assert match(sizes, alone, allow_missing=True).keys == {SECOND[3]: f"{LAYER}.weight"}
    with pytest.raises(MismatchError):
        match(dict.fromkeys(sizes, (8, 8)), alone)


def test_what_else_an_adapter_holds_is_renamed_into_its_own_text_encoder() -> None:
    pipeline = {f"text_encoder{number}.{LAYER}.weight": (8, 8) for number in ("", "_2")}
    pipeline |= {"text_encoder_2.text_projection.weight": (8, 8)}
    found = match({FIRST[3]: (8, 8)}, pipeline)
    assert found.rename(SECOND[3]) == f"text_encoder_2.{LAYER}"
    assert found.rename("lora_te2_text_projection") == "text_encoder_2.text_projection"
    assert found.rename("lora_te1_text_projection") == "lora_te1_text_projection"
