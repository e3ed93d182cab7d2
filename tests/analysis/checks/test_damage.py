"""Checks of what a file lost or mixed up: each on an adapter with the defect, on healthy ones, and on designs."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loralens
from loralens.analysis.damage_checks import (
    find_copies,
    find_dead_sides,
    find_missing_modules,
    find_swapped_factors,
    find_zero_updates,
    missing_modules,
)
from loralens.analysis.diagnosis import Diagnosis, by_cause, examine_adapter
from loralens.analysis.doctor import CHECKS
from loralens.analysis.learning_checks import find_shared_starts, find_spikes
from loralens.analysis.loading_checks import find_missing_head, report_reader_findings
from loralens.core.adapter import Finding
from loralens.core.lowrank import Layout, LowRank
from loralens.core.naming.image_models import image_models
from tests.analysis.checks.patients import changed, diagnose, healthy, patient

N, RANK = 48, 8
FIRST = "model.layers.0.self_attn.q_proj"


def trained(rng, out=N, in_=N, rank=RANK):
    """A that moved little from its random start, and a shorter B that reaches some outputs more than others."""
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


@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_exchanged_factors_are_found_whatever_the_lengths_of_the_rows_of_a_have_become(size):
    """Of long runs the rows of A are as unequal as the columns of B; of short ones B is small, and even by chance."""

    def grown(B, A, scale):
        B = size * (np.random.default_rng(3).normal(size=B.shape) if size < 1 else B)
        return B, A * np.linspace(0.7, 1.3, RANK)[:, None], scale

    assert list(find_swapped_factors(patient(changed(well(), grown)))) == []
    (found,) = find_swapped_factors(patient(changed(changed(well(), grown), exchange)))
    assert (found.level, found.code, found.module) == ("warning", "factors-swapped", None)


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


def test_a_longer_b_is_not_enough():
    """As in adapters that were trained until B was longer than A, and kept their uneven outputs."""
    grown = changed(
        well(), lambda B, A, s: (2 * B / np.linalg.norm(B, axis=0), A * np.linspace(0.5, 1, RANK)[:, None], s)
    )
    assert list(find_swapped_factors(patient(grown))) == []


def test_one_module_is_not_judged_where_the_others_do_not_tell_a_and_b_apart():
    """B of one module has grown as long as A, so lengths say nothing."""
    adapter = changed(well(), lambda B, A, s: (25 * B, A, s), only=lambda name: ".5." in name)
    spoilt = changed(adapter, exchange, only=lambda name: name == FIRST)
    assert list(find_swapped_factors(patient(spoilt))) == []


def test_embeddings_and_results_of_an_svd_have_no_such_start():
    def decompose(B, A, scale):  # of the transpose, whose left side is the even one
        U, s, Vh = np.linalg.svd((B @ A).T, full_matrices=False)
        return U[:, :RANK], s[:RANK, None] * Vh[:RANK], scale

    orthogonal = changed(well(), decompose)
    assert all(one.B.lengths.mean() > one.A.lengths.mean() for one in patient(orthogonal).readings.values())
    assert list(find_swapped_factors(patient(orthogonal))) == []
    embeddings = changed(well(), exchange).map(lambda m: remade(m, layout=Layout("embedding")))
    assert list(find_swapped_factors(patient(embeddings))) == []


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


UNET = [
    f"{part}_blocks.{i}.attentions.{j}.transformer_blocks.0.{layer}.{kind}"
    for part, blocks, layers in (("down", range(3), 2), ("up", range(1, 4), 3))
    for i in blocks
    for j in range(layers)
    for layer in ("attn1", "attn2")
    for kind in ("to_q", "to_k", "to_v", "to_out.0")
]


@pytest.mark.parametrize("prefix", ["unet.", "lora_unet_"])
def test_holes_are_the_same_in_every_dialect(prefix):
    def spell(name):
        return prefix + (name if prefix.endswith(".") else name.replace(".", "_"))

    assert missing_modules([spell(name) for name in UNET]) == {}
    gone = "up_blocks.2.attentions.1.transformer_blocks.0.attn2.to_out.0"
    assert list(missing_modules([spell(name) for name in UNET if name != gone])) == [spell(gone)]


@pytest.mark.parametrize(
    "names",
    [
        [f"layers.{i}.{k}" for i in range(24) for k in (("attn.q", "mlp.up") if i % 4 == 3 else ("ssm.in", "mlp.up"))],
        [f"layers.{i}.mlp.{'' if i == 0 else 'shared_experts.'}up" for i in range(12)],
        [f"layers.{i}.q" for i in range(0, 24, 2)],
        [f"layers.{i}.q" for i in (0, 1, 2, 10, 11)],
        [f"down_blocks.{i}.resnets.{j}.conv1" for i in range(4) for j in range(2)] + UNET,
        ["q", "k", "lm_head"],
        [".".join(["1"] * 5000)],
        [f"layers.{'9' * 50}.q", *(f"layers.{i}.q" for i in range(9))],
    ],
    ids=["hybrid", "dense first", "every other", "two ends", "no attention below", "no blocks", "deep", "far"],
)
def test_designs_that_leave_modules_out_are_no_holes(names):
    assert missing_modules(names) == {}


PARTS = {
    "all": "",
    "attention": "attn|attentions",
    "residual": "resnets|samplers",
    "down": "down_blocks.*attn",
    "text": "text_model",
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("model", image_models(), ids=lambda model: model.name)
def test_blocks_that_image_models_do_not_have_are_no_gaps(model, part):
    """SDXL has no attention in its input blocks 3 and 6, the last blocks of a UNet lead to no other, and so on."""
    layers = [layer for layer in model.layers if re.search(PARTS[part], layer.name)]
    spellings = ([layer.name for layer in layers], [layer.original for layer in layers], [*map(model.kohya, layers)])
    for names in spellings:
        assert missing_modules(dict.fromkeys(names)) == {}
    # A module that was lost is still found.
    if part == "attention":
        lost = re.compile(
            r"down_blocks\.1\.attentions\.1\.transformer_blocks\.0\.attn2\.to_k|blocks\.5\.attn\.to_add_out"
        )
        place = next(i for i, layer in enumerate(layers) if lost.search(layer.name))
        for names in spellings:
            assert list(missing_modules([name for name in names if name != names[place]])) == [names[place]]


@pytest.mark.parametrize(
    "names",
    [
        [f"transformer_blocks.{i}.attn.{k}" for i in range(24) for k in ("to_q", "add_q_proj", "to_add_out")],
        [f"transformer_blocks.{i}.{k}.net.2" for i in range(48) for k in ("ff", "ff_context")],
        [f"joint_blocks.{i}.{k}" for i in range(24) for k in ("x_block.attn.proj", "context_block.attn.proj")],
        [f"encoder.layers.{i}.{k}" for i in range(4) for k in ("blocks.0.attn.query", "downsample.reduction")],
    ],
    ids=["SD3", "Mochi", "SD3 in its original names", "Swin"],
)
def test_the_last_block_lacks_what_leads_to_the_next(names):
    assert missing_modules(names[:-1]) == {}
    gone = names[3]
    assert list(missing_modules([name for name in names if name != gone])) == [gone]


@pytest.mark.parametrize("setting", [{"layers_to_transform": [0, 1, 2, 4, 5]}, {"exclude_modules": ["layers.3.*"]}])
def test_what_the_settings_leave_out_is_no_hole(setting):
    names = [f"model.layers.3.self_attn.{kind}" for kind in ("q_proj", "v_proj")]
    adapter = replace(without(well(), *names), config=setting)
    assert list(find_missing_modules(patient(adapter))) == []


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


def test_parts_of_fused_projections_are_a_design_though_most_modules_have_their_own():
    adapter = well()
    rest = {f"model.layers.{i}.mlp.{kind}": LowRank(*trained(np.random.default_rng(i + 10 * j)))
            for i in range(6) for j, kind in enumerate(("up", "down", "gate"), start=1)}  # fmt: skip
    fused = {n: remade(m, A=adapter[n.replace("v_proj", "q_proj")].A) for n, m in adapter.items()}
    (found,) = find_copies(patient(loralens.Adapter(modules={**fused, **rest})))
    assert (found.level, found.evidence[:38]) == ("note", "12 of 30 modules have 6 A between them")


def test_one_pair_everywhere_is_a_note():
    (found,) = find_copies(patient(well().map(lambda m: well()[FIRST])))
    assert (found.level, found.code) == ("note", "factor-shared")
    assert found.evidence.startswith("all 12 modules share their B and A with another")


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


@pytest.mark.parametrize("kind", ["embedding", "merged"])
def test_rows_that_are_zero_by_design_are_none(kind):
    def kill(B, A, scale):
        B[:16], A[:, :16] = 0, 0
        return B, A, scale

    adapter = changed(well(), kill).map(lambda m: remade(m, layout=Layout(kind)))
    assert list(find_dead_sides(patient(adapter))) == []


# numbers that were said wrongly


def test_factors_too_small_for_their_product_are_not_called_zero():
    adapter = well().map(lambda m: LowRank(m.B * 0 + 1e-200, m.A.astype(np.float64) * 0 + 1e-200, 2.0))
    adapter = loralens.Adapter(
        modules={n: LowRank(np.full((N, 2), 1e-200), np.full((2, N), 1e-200), 2.0) for n in adapter}
    )
    found = list(find_zero_updates(patient(adapter)))
    assert len(found) == 12
    assert found[0].evidence == "scale·B·A is smaller than float64 can hold (largest entries 1e-200 and 1e-200)"
    assert "all zero" not in found[0].evidence
    assert "never trained" not in found[0].fix
    alone = loralens.Adapter(modules={FIRST: LowRank(np.full((N, 2), 1e-200), np.ones((2, N)), 2.0)})
    assert list(find_zero_updates(patient(alone))) == []
    assert patient(alone).readings[FIRST].B.lengths == pytest.approx(1e-200 * N**0.5)


@pytest.mark.parametrize(
    ("noise", "said"), [(0.0, "(cosine 1)"), (0.05, "(cosine 0.99 or more)"), (0.2, "(cosine 0.98 or more)")]
)
def test_a_least_cosine_is_rounded_down(noise, said):
    first, second = well(0), well(1)
    other = loralens.Adapter(modules={n: remade(second[n], A=first[n].A + noise * second[n].A) for n in first})
    (found,) = find_shared_starts([examine_adapter(first, "a"), examine_adapter(other, "b")])
    assert said in found.evidence
    assert "1.00 or more" not in found.evidence


def test_a_spike_of_rank_one_has_no_ratio_of_rounding_errors():
    def flatten(B, A, scale):
        U, s, Vh = np.linalg.svd(B @ A, full_matrices=False)
        B = np.outer(U[:, 0] * s[0], np.ones(RANK))
        return B, np.outer(np.arange(1.0, RANK + 1), Vh[0]), scale

    found = list(find_spikes(patient(changed(well(), flatten, only=lambda name: name == FIRST))))
    ((module, evidence),) = [(one.module, one.evidence) for one in found]
    assert module == FIRST
    assert evidence == "one of 8 directions holds 100.00 % of the energy, the others are 0 up to rounding"


# lines


def test_findings_of_a_reader_belong_to_the_module_that_they_begin_with():
    findings = tuple(Finding("error", "rank-disagrees", f"{name}: the configuration says 4") for name in well())
    findings += (Finding("note", "dora", "model: a note"),)
    found = list(report_reader_findings(patient(replace(well(), findings=findings))))
    assert [one.module for one in found] == [*well(), None]
    assert (found[0].evidence, found[-1].evidence) == ("the configuration says 4", "model: a note")
    assert [len(group) for group in by_cause(found)] == [12, 1]


def test_many_findings_without_a_module_are_one_group_and_few_are_not():
    few = [Diagnosis("error", "non-finite", f"tensor {i}", adapter="a") for i in range(3)]
    assert [len(group) for group in by_cause(few)] == [1, 1, 1]
    many = [Diagnosis("error", "non-finite", f"tensor {i}", adapter="a") for i in range(146)]
    assert [len(group) for group in by_cause(many)] == [146]
    twice = [Diagnosis("note", "x", "same", adapter=name) for name in "ab"]
    assert [len(group) for group in by_cause(twice)] == [2]


def test_published_adapters_have_none_of_these(real: Path):
    checks = (find_copies, find_dead_sides, find_missing_head, find_missing_modules, find_swapped_factors)
    codes = {code for check in CHECKS if check.single in checks for code in check.codes}
    for folder in sorted(path for path in real.iterdir() if path.is_dir() and not path.name.startswith("neg")):
        found = diagnose({"a": loralens.load(folder, strict=False)})
        assert not codes & {one.code for one in found}, folder.name
