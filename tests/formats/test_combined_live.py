"""What `combine` makes of two adapters of every kind PEFT has, PEFT loads, and adds the sum."""

from pathlib import Path

import numpy as np
import pytest

import loralens
from loralens.arithmetic.combine import combine_adapters
from loralens.core.adapter import Adapter
from loralens.core.lowrank import LowRank
from tests.formats.test_peft_live import CASES, Case, adapt, assert_same_updates, load_in_peft
from tests.marks import when_used

peft = when_used("peft")

pytestmark = [
    pytest.mark.usefixtures("quiet_torch"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match any targeted module"),
]

BY_NAME = {case.name: case for case in CASES}


def saved(case: Case, folder: Path) -> Adapter:
    adapt(case).save_pretrained(folder)
    return loralens.load(folder)


def shuffled(adapter: Adapter) -> Adapter:
    """Another adapter of the same modules: the factors' columns in another order, at another strength, some dead."""
    modules = {}
    for i, (name, m) in enumerate(adapter.items()):
        alive = 0 if i == 1 and m.layout.kind != "experts" else 1
        modules[name] = LowRank(alive * m.B[:, ::-1], m.A, 0.7 * m.scale, scaling=m.scaling, layout=m.layout)
    return Adapter(modules=modules, config=adapter.config)


@pytest.mark.some(2)
@pytest.mark.parametrize("method", ["sum", "tsv-m"])
@pytest.mark.parametrize(
    "name",
    ["llama", "rslora", "patterns", "gpt2", "conv", "words", "attention", "experts-reversed", "mixtral", "saved"],
)
def test_peft_loads_mixed_ranks_and_adds_the_combination(name: str, method: str, tmp_path: Path) -> None:
    case = BY_NAME[name]
    first = saved(case, tmp_path / "before")
    second = shuffled(first)
    found = combine_adapters([(first, 0.6), (second, -0.4)], method=method).adapter
    loralens.save(found, tmp_path / "after")
    if method == "sum":
        for module in found:
            expected = 0.6 * first[module].dense() - 0.4 * second[module].dense()
            np.testing.assert_allclose(found[module].dense(), expected, atol=1e-5)
    assert_same_updates(found, load_in_peft(case, tmp_path / "after"), case)
