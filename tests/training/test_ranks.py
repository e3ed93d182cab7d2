"""Layers of different ranks: narrow ones, globs with a rank of their own, and what is left out."""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest

import loralens
from loralens import OptionError
from loralens.training import inject, read_injection, record_of
from tests import models
from tests.architectures import MIXTURES
from tests.marks import when_used
from tests.training.conftest import randomise

torch = pytest.importorskip("torch")
peft = when_used("peft")

IDS = torch.randint(3, 20, (2, 9), generator=torch.Generator().manual_seed(0))


def mixture(name: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return next(each for each in MIXTURES if each.name == name).made()


@pytest.mark.parametrize(
    ("name", "module", "most"), [("qwen2-moe", "mlp.shared_expert_gate", 1), ("jamba", "mamba.dt_proj", 4)]
)
def test_a_narrow_module_gets_the_rank_that_it_allows(
    name: str, module: str, most: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "loralens"):
        made = inject(mixture(name), rank=6)
    narrow = {layer: rank for layer, rank in made.ranks.items() if layer.endswith(module)}
    assert set(narrow.values()) == {most}
    assert {rank for layer, rank in made.ranks.items() if layer not in narrow} == {6}
    assert f"{module.rpartition('.')[2]} gets rank {most}" in caplog.text


def test_globs_have_ranks_of_their_own_and_the_last_one_counts() -> None:
    made = inject(models.llama(), rank=2, rank_pattern={"*_proj": 3, "down_proj": 5, "model.layers.1.*.q_proj": 1})
    ranks = {name.removeprefix("model.layers."): rank for name, rank in made.ranks.items()}
    assert ranks["0.mlp.down_proj"] == ranks["1.mlp.down_proj"] == 5
    assert ranks["0.self_attn.q_proj"] == 3
    assert ranks["1.self_attn.q_proj"] == 1
    # As in PEFT, the scale of a module follows from α and its own rank.
    assert made.layers["model.layers.0.mlp.down_proj"].scale == 16 / 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exclude": "donw_proj"}, "no module matches 'donw_proj'"),
        ({"targets": "q_proj", "exclude": "*.self_attn"}, "no layer is left to adapt"),
        ({"rank_pattern": {"qproj": 3}}, "no module matches 'qproj'"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern 'q_proj': 0 is not a whole number of 1 or more"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    model = models.llama()
    before = dict(model.named_modules())
    with pytest.raises(OptionError, match=message):
        inject(model, **{"rank": 2, **options})
    assert dict(model.named_modules()) == before


@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "pissa"])
def test_peft_loads_modules_of_different_ranks_to_the_same_logits(method: str, tmp_path: Path) -> None:
    model = models.llama()
    base = copy.deepcopy(model)
    made = inject(model, targets=["all-linear", "embed_tokens"] if method == "lora" else "all-linear", method=method,
                  exclude="o_proj", rank=12, rank_pattern={"down_proj": 3, "model.layers.1.*.q_proj": 2})  # fmt: skip
    randomise(made)
    assert set(made.ranks.values()) == {12, 8, 3, 2}  # k_proj and v_proj have 8 rows
    with torch.no_grad():
        ours = model(input_ids=IDS).logits
    adapter = read_injection(made)
    assert (record_of(adapter) or {})["rank_pattern"] == {"down_proj": 3, "model.layers.1.*.q_proj": 2}
    loralens.save(adapter, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "a").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=IDS).logits, ours, rtol=1e-4, atol=1e-5)
    back = loralens.load(tmp_path / "a")
    assert {name: module.scale for name, module in back.items()} == {n: m.scale for n, m in adapter.items()}
