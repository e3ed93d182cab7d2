"""Globs, beginnings of names and blocks that select modules."""

import re

import pytest

from loralens import OptionError
from loralens.core import Strength
from loralens.core.names import nearest
from loralens.core.selection import matches, select, within_blocks

NAMES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.1.self_attn.v_proj",
    "model.layers.10.mlp.to_out.0",
    "model.layers.10.mlp.experts.down_proj[1]",
    "lm_head",
]


@pytest.mark.parametrize(
    ("globs", "chosen"),
    [
        ([], [0, 1, 2, 3, 4, 5]),
        (["*"], [0, 1, 2, 3, 4, 5]),
        (["q_proj"], [0, 1]),
        (["v_proj", "q_proj"], [0, 1, 2]),
        (["q_proj", "*.1.*"], [0, 1, 2]),
        (["model.layers.1.self_attn.q_proj"], [1]),
        (["*.1.*"], [1, 2]),
        (["*.?.*"], [0, 1, 2]),
        (["model.layers.1?.*"], [3, 4]),
        (["*_proj"], [0, 1, 2, 4]),
        (["down_proj"], [4]),
        (["*[1]"], [4]),
        (["to_out.0"], [3]),
        (["lm_head"], [5]),
        (["q_*"], [0, 1]),  # kinds too
        (["?_proj"], [0, 1, 2]),
        (["down_*"], [4]),
        (["to_out.*"], [3]),
        (["to_*", "l*"], [3, 5]),
    ],
)
def test_select(globs, chosen):
    assert select(NAMES, globs) == [NAMES[i] for i in chosen]
    assert select(iter(NAMES), globs) == [NAMES[i] for i in chosen]
    if len(globs) == 1:
        assert select(NAMES, globs[0]) == [NAMES[i] for i in chosen]


@pytest.mark.parametrize("glob", ["Q_proj", "Q_*", "proj", "proj*", "*.[01].*", "[qv]_proj", "q_proj.*", "*.2.*", ""])
def test_a_glob_that_matches_nothing(glob):
    with pytest.raises(OptionError) as caught:
        select(NAMES, ["lm_head", glob])
    assert str(caught.value).startswith(f"no module matches {glob!r}\n  fix: ")
    suggested = re.fullmatch(r"'(.+)' matches (\d+) modules?", caught.value.fix)
    if suggested:
        assert len(select(NAMES, suggested[1])) == int(suggested[2]) > 0
    else:
        assert caught.value.fix.startswith(
            ("the nearest names are ", "no part of a name is ", "the kinds of modules are ")
        )


def test_what_is_suggested_can_be_given():
    """A user who copies a suggestion gets modules."""
    for wrong in ("to_out", "q_prj", "lm_haed", "model.layers.1.q_proj", "down_proj[1]"):
        for suggestion in nearest(wrong, NAMES).split(", "):
            assert select(NAMES, [suggestion])


@pytest.mark.parametrize("glob", ["*a" * 2000 + "b", "*?" * 2000 + "b", "*" + "?" * 2000 + "b"])
def test_globs_of_many_stars_end(glob: str) -> None:
    assert not matches("a" * 4000, glob)


KOHYA = [
    f"lora_unet_{place}_transformer_blocks_0_{attention}_to_q"
    for place in (
        *(f"down_blocks_{i}_attentions_{j}" for i in range(3) for j in range(2)),
        "mid_block_attentions_0",
        *(f"up_blocks_{i}_attentions_{j}" for i in (1, 2, 3) for j in range(3)),
    )
    for attention in ("attn1", "attn2")
]
FLUX = [f"transformer.transformer_blocks.{i}.attn.to_q" for i in range(19)]
FLUX += [f"transformer.single_transformer_blocks.{i}.proj_out" for i in range(38)]


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("lora_unet_up_blocks", "lora_unet_up_blocks_"),
        ("lora_unet_up_blocks 1", "lora_unet_up_blocks_1_"),
        ("lora_unet_up_blocks_1_attentions_2", "lora_unet_up_blocks_1_attentions_2_"),
        ("lora_unet_unet_up_blocks_1", "lora_unet_up_blocks_1_"),
        ("unet.up_blocks.1.", "lora_unet_up_blocks_1_"),
        ("mid_block", "lora_unet_mid_block_"),
        ("lora_unet", "lora_unet_"),
    ],
)
def test_the_beginning_of_names_selects_them(text: str, start: str) -> None:
    expected = [name for name in KOHYA if name.startswith(start)]
    assert expected
    assert select(KOHYA, text) == expected
    with pytest.raises(OptionError):
        select(KOHYA, text, prefixes=False)


def test_a_beginning_ends_where_a_part_of_the_name_ends() -> None:
    assert select(NAMES, "model.layers.1") == NAMES[1:3]
    assert select(NAMES, "base_model.model.model.layers.1") == NAMES[1:3]
    assert select(NAMES, "model.layers 1") == NAMES[1:3]
    assert select(NAMES, "model.layers.10.mlp.experts.down_proj") == [NAMES[4]]
    for text in ("model.layers.1.self", "model.lay", "lm"):
        with pytest.raises(OptionError, match="no module matches"):
            select(NAMES, text)


def test_a_name_and_a_kind_win_over_a_beginning() -> None:
    names = ["encoder.self_attn", "encoder.self_attn.out_proj", "x.encoder"]
    assert select(names, "encoder.self_attn") == names[:1]
    assert select(names, "encoder") == names[2:]


@pytest.mark.parametrize(
    ("blocks", "numbers"),
    [
        ([3], {3}),
        (["3"], {3}),
        (["4-8"], {4, 5, 6, 7, 8}),
        (["8-4"], {4, 5, 6, 7, 8}),
        ([0, "4-6"], {0, 4, 5, 6}),
        (["0, 4-6"], {0, 4, 5, 6}),
        (["9-40"], {9, 10, 11}),
    ],
)
def test_blocks_by_number(blocks: list[int | str], numbers: set[int]) -> None:
    names = [f"model.layers.{i}.self_attn.{k}" for i in range(12) for k in ("q_proj", "v_proj")] + ["lm_head"]
    expected = [name for name in names if name != "lm_head" and int(name.split(".")[2]) in numbers]
    assert select(names, within_blocks((), blocks)) == expected
    queries = [name for name in expected if name.endswith("q_proj")]
    assert select(names, within_blocks(["q_proj"], blocks)) == queries
    assert select(names, within_blocks(["model.layers"], blocks)) == expected
    (glob,) = within_blocks(["q_proj"], blocks)
    assert [name for name in names if matches(name, glob)] == queries
    assert Strength(1.0, {glob: 0.5}).of(queries[0]) == 0.5


@pytest.mark.parametrize(
    ("names", "blocks", "message", "fix"),
    [
        (NAMES, [5], "no module is in block 5", "the modules are in the blocks 0-1, 10 of model.layers"),
        (["lm_head"], [0], "no module is in block 0", "the modules are in no block: their names have no numbers"),
        (NAMES, ["IN04"], "no module is in block IN04", "the modules are in no block that has a name; give numbers"),
        (KOHYA, [3], "block 3 does not exist", "give one of IN01-IN02, IN04-IN05, IN07-IN08, MID, OUT03-OUT11"),
        (KOHYA, ["IN00"], "no module is in block IN00", "the modules are in IN01-IN02, IN04-IN05, IN07-IN08, MID, OUT"),
        (FLUX, ["3-4"], "block 3-4 does not exist", "give one of D00-D18, S00-S37"),
    ],
)
def test_a_block_without_modules(names: list[str], blocks: list[int | str], message: str, fix: str) -> None:
    with pytest.raises(OptionError) as caught:
        select(names, within_blocks((), blocks))
    assert caught.value.what.startswith(message)
    assert caught.value.fix.startswith(fix)


@pytest.mark.parametrize("block", ["three", "-1", "3-", "1.5", "", "4-8-9", True, "IN-IN04"])
def test_what_is_no_block(block: int | str) -> None:
    with pytest.raises(OptionError, match="is not a block"):
        within_blocks((), [block])


# As sd-webui-lora-block-weight counts the blocks of SD: input_blocks.4 holds the first attention of down_blocks.1.
@pytest.mark.parametrize(
    ("names", "blocks", "part"),
    [
        (KOHYA, ["IN04"], "down_blocks_1_attentions_0"),
        (KOHYA, ["in4"], "down_blocks_1_attentions_0"),
        (KOHYA, ["IN04-IN05"], "down_blocks_1_"),
        (KOHYA, ["MID"], "mid_block"),
        (KOHYA, ["M00"], "mid_block"),
        (KOHYA, ["OUT"], "up_blocks"),
        (KOHYA, ["OUT03-OUT05"], "up_blocks_1_"),
        (FLUX, ["S07"], "single_transformer_blocks.7."),
        (FLUX, ["D"], "r.transformer_blocks"),
    ],
)
def test_blocks_of_image_models_have_names(names: list[str], blocks: list[str], part: str) -> None:
    expected = [name for name in names if part in name]
    assert select(names, within_blocks((), blocks)) == expected
    (glob,) = within_blocks((), blocks)
    assert [name for name in names if matches(name, glob)] == expected


def test_a_name_that_ends_like_blocks_is_a_name() -> None:
    names = ["a.q@3", "a.q@4", "layers.3.q"]
    assert select(names, "a.q@3") == ["a.q@3"]
    assert select(names, "q@3") == ["a.q@3"]


def test_a_hint_is_about_parts_of_names_and_not_letters_inside_of_words() -> None:
    unet = [f"lora_unet_down_blocks_{i}_attentions_0_proj_in" for i in range(3)]
    encoder = [f"lora_te_text_model_encoder_layers_{i}_self_attn_q_proj" for i in range(2)]

    def hint(text: str, names: list[str]) -> str:
        with pytest.raises(OptionError) as caught:
            select(names, [text])
        return caught.value.fix

    for text in ("te", "text_encoder", "clip"):
        assert "no module is in a text encoder" in hint(text, unet)
    assert hint("text_encoder", [*unet, *encoder]) == "modules of text encoders match 'lora_te_*'"
    assert hint("att", unet) == "'*_att*' matches 3 modules" or hint("att", unet) == "'*att*' matches 3 modules"
    assert hint("tte", unet).startswith("no part of a name is 'tte'; ")
