"""torchtune, LitGPT, safeloras and plain pairs: their formulas, what is missing in them, and damage."""

from dataclasses import replace

import numpy as np
import pytest

from loralens import FormatError, ShapeError
from loralens.core import Layout, Scaling
from tests.formats.dialects import FORM
from tests.formats.stores import drawn, stored
from tests.tolerances import SAME_UPDATE

litgpt = FORM["litgpt"]
plain = FORM["plain"]
safeloras = FORM["safeloras"]
torchtune = FORM["torchtune"]

QKV, PROJ, FC = "transformer.h.0.attn.qkv", "transformer.h.0.attn.proj", "transformer.h.0.mlp.fc_1"
TUNE = "layers.0.attn.q_proj"


def tune():
    return {
        f"{TUNE}.lora_a.weight": drawn(2, 4),
        f"{TUNE}.lora_b.weight": drawn(6, 2),
        f"{TUNE}.magnitude": drawn(6),
        "layers.0.mlp.experts.lora_gate_a": drawn(3, 4, 2),
        "layers.0.mlp.experts.lora_gate_b": drawn(3, 2, 5),
        "epochs_run": drawn(1),
    }


def lit(A=(4, 4), B=(6, 2), name=QKV):
    """Query and value of two heads that share one key: rows 4 + 2, rank 2."""
    return {
        f"{name}.lora_A": drawn(*A),
        f"{name}.lora_B": drawn(*B),
        f"{FC}.lora_A": drawn(2, 4),
        f"{FC}.lora_B": drawn(5, 2),
    }


LIT = {"enable_lora": [True, False, True], "n_head": 2, "n_query_groups": 1, "head_size": 2}


def safe():
    held = {f"unet:{i}:{half}": drawn(*shape) for i in (0, 2, 10) for half, shape in (("up", (6, 1)), ("down", (1, 4)))}
    return {
        **held,
        "text_encoder:0:up": drawn(3, 2),
        "text_encoder:0:down": drawn(2, 3),
        "<s1>": drawn(4),
        "odd": drawn(1),
    }


SAFE = {"unet": '["CrossAttention"]', "<s1>": "<embed>"}


def sam():
    return {f"w_{half}_{i:03d}": drawn(*shape) for i in (0, 1, 10) for half, shape in (("a", (2, 4)), ("b", (6, 2)))}


GOOD = {
    torchtune: stored(tune()),
    litgpt: stored(lit(), config=LIT),
    safeloras: stored(safe(), metadata=SAFE),
    plain: stored(sam()),
}


@pytest.mark.parametrize("module", GOOD, ids=lambda module: module.name)
def test_a_half_alone_is_an_error_that_names_it(module):
    good = GOOD[module]
    halves = {key for one in module.read(good).modules.values() for key in one.origin.tensors}
    for key in halves:
        with pytest.raises(FormatError, match=r"has no .* beside it"):
            module.read(replace(good, tensors={k: t for k, t in good.tensors.items() if k != key}))


def test_torchtune_linear_and_experts():
    adapter = torchtune.read(stored(tune()))
    assert list(adapter) == [TUNE, *(f"layers.0.mlp.experts.gate_proj[{e}]" for e in range(3))]
    assert adapter["layers.0.mlp.experts.gate_proj[0]"].layout == Layout("experts")
    assert [extra.role for extra in adapter.extra.values()] == ["magnitude", "other"]
    assert [finding.code for finding in adapter.findings] == ["alpha-unknown", "rotary-rows"]


def test_torchtune_takes_alpha_from_the_configuration_it_writes_beside():
    adapter = torchtune.read(stored(tune(), config={"peft_type": "LORA", "r": 2, "lora_alpha": 16}))
    assert adapter[TUNE].scaling == Scaling("alpha/r", 16.0, 2, "adapter_config.json")
    assert adapter[TUNE].scale == 8.0
    assert [finding.code for finding in adapter.findings] == ["rotary-rows"]
    for stray in ({"r": 8, "lora_alpha": 16}, {"r": 2, "lora_alpha": 10**400}):
        assert torchtune.read(stored(tune(), config=stray))[TUNE].scaling.formula == "unknown"


def test_litgpt_learns_the_height_of_the_query_from_the_projection_behind_it():
    tensors = lit((6, 4), (8, 2)) | {f"{PROJ}.lora_A": drawn(2, 4), f"{PROJ}.lora_B": drawn(4, 2)}
    module = litgpt.read(stored(tensors))[QKV]
    A, B = (tensors[f"{QKV}.lora_{half}"].astype(np.float64) for half in "AB")
    expected = np.concatenate([B[:4] @ A[:2], B[4:6] @ A[2:4], B[6:] @ A[4:]])
    np.testing.assert_allclose(module.dense(), expected, **SAME_UPDATE)


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (lit(), None, "2 of query, key and value are adapted, and the file does not say which"),
        (lit((6, 4), (8, 2)), None, "the file does not state the numbers of rows of query, key and value"),
        (lit(), {**LIT, "enable_lora": [True, True, True]}, "3 parts are said to be adapted, but lora_A has 2 blocks"),
        (lit(), {**LIT, "head_size": 3}, "lora_B has 6 rows, and query, key and value of 6, 3, 3 rows give 9"),
        (lit(), {**LIT, "n_head": "two"}, "n_head is not a number"),
        (lit((5, 4)), LIT, "is not one to three blocks of rank 2"),
    ],
)
def test_litgpt_asks_for_what_the_file_does_not_say(tensors, config, message):
    with pytest.raises((FormatError, ShapeError), match=message):
        litgpt.read(stored(tensors, config=config))


def test_safeloras_numbers_are_numbers():
    tensors = safe()
    adapter = safeloras.read(stored(tensors, metadata=SAFE))
    assert list(adapter) == ["text_encoder.0", "unet.0", "unet.2", "unet.10"]
    assert {module.scale for module in adapter.modules.values()} == {1.0}
    assert {key: extra.role for key, extra in adapter.extra.items()} == {"<s1>": "tokens", "odd": "other"}
    assert "CrossAttention" in adapter.findings[0].text
    with pytest.raises(FormatError, match="are the same tensor of one module"):
        safeloras.read(stored({**tensors, "unet:010:up": drawn(6, 1)}))
