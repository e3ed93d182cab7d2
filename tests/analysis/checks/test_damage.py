"""Checks of what a file lost or mixed up: each on an adapter with the defect, on healthy ones, and on designs."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loralens
from loralens import LowRank
from loralens.analysis.damage_checks import (
    find_copies,
    find_dead_sides,
    find_missing_modules,
    find_swapped_factors,
    missing_modules,
)
from loralens.analysis.diagnosis import by_cause
from loralens.analysis.loading_checks import find_missing_head
from tests.analysis.checks.patients import changed, diagnose, healthy, patient

N, RANK = 48, 8
FIRST = "model.layers.0.self_attn.q_proj"


def trained(rng, out=N, in_=N, rank=RANK):
    """A that moved little from its initialisation, and a shorter B that reaches some outputs more than others."""
    A = rng.uniform(-1, 1, (rank, in_)) / in_**0.5 + 0.02 * rng.normal(size=(rank, in_))
    B = 0.02 * rng.normal(size=(out, rank)) * np.exp(0.4 * rng.normal(size=(out, 1))) * np.linspace(0.6, 1.4, rank)
    return B.astype(np.float32), A.astype(np.float32)


def well(seed=0, **named):
    return healthy(seed, make=trained, blocks=6, **named)


def remade(module, *, B=None, A=None, layout=None):
    """The module with other factors, or another layout."""
    B, A = module.B if B is None else B, module.A if A is None else A
    return LowRank(B, A, module.scale, scaling=module.scaling, layout=layout or module.layout)


def exchange(B, A, scale):
    return A.T, B.T, scale


def fresh(rng):
    B, A = trained(rng)
    return 0 * B, A


@pytest.mark.parametrize(
    "check", [find_copies, find_dead_sides, find_missing_head, find_missing_modules, find_swapped_factors]
)
@pytest.mark.parametrize("adapter", [well(), well(1), healthy(2), healthy(3, make=fresh)], ids=["a", "b", "c", "fresh"])
def test_healthy_adapters_have_nothing(check, adapter):
    assert list(check(patient(adapter))) == []


# B and A exchanged


def test_factors_exchanged_in_all_modules_are_one_warning():
    (found,) = find_swapped_factors(patient(changed(well(), exchange)))
    assert (found.level, found.code, found.module) == ("warning", "factors-swapped", None)
    assert found.evidence.startswith("in all 12 modules the columns of B are longer")


def test_factors_exchanged_in_one_module_are_found_among_the_others():
    (found,) = find_swapped_factors(patient(changed(well(), exchange, only=lambda name: name == FIRST)))
    assert (found.level, found.code, found.module) == ("warning", "factors-swapped", FIRST)


def test_false_alarms_and_misses_of_exchanged_factors_are_rare():
    alarms = misses = 0
    for seed in range(30):
        alarms += bool(list(find_swapped_factors(patient(well(seed)))))
        misses += not list(find_swapped_factors(patient(changed(well(seed), exchange))))
    assert (alarms, misses) == (0, 0)


@pytest.mark.parametrize("init", ["pissa", "olora", "eva", "loftq", False])
def test_other_starts_are_not_judged(init):
    adapter = changed(well(config={"r": RANK, "init_lora_weights": init}), exchange)
    assert list(find_swapped_factors(patient(adapter))) == []


def test_tensors_exchanged_in_the_file_are_an_error(tmp_path: Path):
    loralens.save(well(), tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    names = {"lora_A": "lora_B", "lora_B": "lora_A"}
    tensors = {}
    for key, tensor in load_file(file).items():
        half = next(half for half in names if half in key)
        tensors[key.replace(half, names[half])] = tensor
    save_file(tensors, file, metadata={"format": "pt"})
    found = diagnose({"a": loralens.load(tmp_path / "a", strict=False)})
    assert (found[0].level, found[0].code) == ("error", "factors-swapped")
    assert "lora_A has 48 rows and the update is 8 × 8, where r = 8" in found[0].evidence
    groups = by_cause(found)
    assert len(groups) <= 4  # one group a code, however many modules
    assert {one.module for one in found if one.code == "rank-disagrees"} == {*well()}


# holes in the grid


def without(adapter, *names):
    return loralens.Adapter(modules={n: m for n, m in adapter.items() if n not in names}, config=adapter.config)


@pytest.mark.parametrize("block", range(6))
@pytest.mark.parametrize("kind", ["q_proj", "v_proj"])
def test_a_module_missing_of_a_full_grid_is_named(block, kind):
    name = f"model.layers.{block}.self_attn.{kind}"
    (found,) = find_missing_modules(patient(without(well(), name)))
    assert (found.level, found.code, found.module) == ("warning", "module-missing", name)
    assert found.evidence == f"5 of 6 blocks have self_attn_{kind}, and this one does not"


def test_a_block_missing_between_others_is_named_with_all_its_modules():
    names = [f"model.layers.3.self_attn.{kind}" for kind in ("q_proj", "v_proj")]
    found = list(find_missing_modules(patient(without(well(), *names))))
    assert [one.module for one in found] == names
    assert found[0].evidence == "blocks 0 to 5 are there, except 3"


@pytest.mark.parametrize(
    "names",
    [
        [f"transformer_blocks.{i}.attn.{k}" for i in range(24) for k in ("to_q", "add_q_proj", "to_add_out")],
        [f"encoder.layers.{i}.{k}" for i in range(4) for k in ("blocks.0.attn.query", "downsample.reduction")],
    ],
)
def test_the_last_block_lacks_what_leads_to_the_next(names):
    assert missing_modules(names[:-1]) == {}
    gone = names[3]
    assert list(missing_modules([name for name in names if name != gone])) == [gone]


# copies


def test_a_module_copied_over_another_is_named_with_its_source():
    adapter = well()
    target = "model.layers.4.self_attn.q_proj"
    spoilt = loralens.Adapter(modules={**adapter.modules, target: adapter[FIRST]})
    (found,) = find_copies(patient(spoilt))
    assert (found.level, found.code, found.module) == ("warning", "module-copied", target)
    assert found.evidence == f"its B and A are those of {FIRST}, number for number"


@pytest.mark.parametrize("factor", ["A", "B"])
def test_one_factor_copied_over_another_is_a_warning(factor):
    adapter = well()
    target = "model.layers.4.self_attn.q_proj"
    spoilt = remade(adapter[target], **{factor: getattr(adapter[FIRST], factor)})
    (found,) = find_copies(patient(loralens.Adapter(modules={**adapter.modules, target: spoilt})))
    assert (found.level, found.code, found.module) == ("warning", "factor-copied", target)
    assert found.evidence == f"its {factor} is that of {FIRST}, number for number"


def test_one_A_everywhere_is_a_note_and_a_frozen_A_of_each_module_nothing():
    A = well()[FIRST].A
    (found,) = find_copies(patient(well().map(lambda m: remade(m, A=A))))
    assert (found.level, found.code, found.module) == ("note", "factor-shared", None)
    assert found.evidence.startswith("all 12 modules have one A between them: ")
    fused = well()
    parts = {n: remade(m, A=fused[n.replace("v_proj", "q_proj")].A) for n, m in fused.items()}
    (found,) = find_copies(patient(loralens.Adapter(modules=parts)))
    assert (found.level, found.evidence[:36]) == ("note", "all 12 modules have 6 A between them")
    vera = well().map(lambda m: LowRank(m.B[:, :1] * A[:1, 0] + A.T, A, m.scale, scaling=m.scaling))
    assert {one.level for one in find_copies(patient(vera))} == {"note"}


# dead rows and columns


@pytest.mark.parametrize(("side", "code", "what"), [(0, "dead-rows", "rows of B"), (1, "dead-columns", "columns of A")])
def test_rows_and_columns_that_are_zero_in_all_modules(side, code, what):
    def kill(B, A, scale):
        (B if side == 0 else A.T)[: N // 2] = 0
        return B, A, scale

    found = list(find_dead_sides(patient(changed(well(), kill))))
    assert [(one.level, one.code, one.evidence) for one in found] == [
        ("warning", code, f"24 of 48 {what} are zero")
    ] * 12
    (group,) = by_cause(found)
    assert len(group) == 12
    single = [one.module for one in find_dead_sides(patient(changed(well(), kill, only=lambda name: name == FIRST)))]
    assert single == [FIRST]


# numbers that were said wrongly


# lines
