"""Checks of the scale: implausible ones, and the damage that known tools do, rebuilt as they do it."""

import numpy as np
import pytest

import loralens
from loralens import LowRank
from loralens.analysis.learning_checks import find_shared_initialisations
from loralens.analysis.strength_checks import (
    find_combining_bug,
    find_joined_pairs,
    find_weighted_sums,
    find_wrong_scales,
)
from loralens.core import Layout, Scaling
from tests.analysis.checks.patients import changed, healthy, patient, scaling, trained


def codes(found):
    return [one.code for one in found]


@pytest.mark.parametrize("check", [find_wrong_scales, find_combining_bug, find_joined_pairs])
@pytest.mark.parametrize("rule", ["alpha/r", "alpha/sqrt(r)"])
def test_a_trained_adapter_is_not_suspected_whatever_its_alpha(check, rule):
    for alpha in (1.0, 4.0, 8.0, 16.0):
        assert list(check(patient(healthy(alpha=alpha, rule=rule, config={"use_rslora": rule != "alpha/r"})))) == []


@pytest.mark.parametrize(
    ("alpha", "code"), [(0.0, "scale-zero"), (-8.0, "scale-negative"), (640.0, "scale-large"), (0.1, "scale-small")]
)
def test_scales_that_are_hardly_meant(alpha, code):
    (found,) = find_wrong_scales(patient(healthy(alpha=alpha)))
    assert (found.code, found.module) == (code, None)
    assert found.evidence.startswith(
        f"scale {alpha / 8:.4g}, α/r = {alpha:g}/8 (adapter_config.json), in all 8 modules"
    )
    assert found.level == ("note" if code in ("scale-small", "scale-negative") else "warning")


def test_some_modules_of_many_are_named_and_all_of_them_are_not():
    some = {f"model.layers.{block}.self_attn.q_proj": 100.0 + block for block in (1, 2, 3)}
    adapter = healthy()
    strong = {name: changed(adapter, lambda B, A, s, to=to: (B, A, to))[name] for name, to in some.items()}
    (found,) = find_wrong_scales(patient(loralens.Adapter(modules={**adapter.modules, **strong})))
    first, second, third = some
    how = "scale 101, α/r = 808/8 (adapter_config.json), in 3 of 8 modules"
    assert (found.evidence, found.module) == (f"{how}: {first}, {second}, {third}", None)
    (found,) = find_wrong_scales(patient(healthy(alpha=720.0)))
    assert (found.evidence, found.module) == ("scale 90, α/r = 720/8 (adapter_config.json), in all 8 modules", None)


@pytest.mark.parametrize(("said", "found"), [({"scale": 16.0, "alpha": 16}, 1), ({"scale": 20.0, "alpha": 16}, 0)])
def test_alpha_taken_as_the_scale(said, found):
    adapter = healthy(config={"lora_parameters": said}, format="mlx")
    adapter = adapter.map(lambda m: m.rescaled(said["scale"], Scaling("given", origin="adapter_config.json")))
    assert codes(find_wrong_scales(patient(adapter))) == ["scale-is-alpha"] * found


def decomposed(B, A, s):
    """As PEFT stores the result of an SVD: B = U S, A = Vᵀ, α = r."""
    U, values, Vh = np.linalg.svd(s * B @ A, full_matrices=False)
    return U[:, :8] * values[:8], Vh[:8], 1.0


@pytest.mark.parametrize(
    ("version", "suspected"), [(None, True), ("0.19.1", True), ("0.21.2", False), ("0.22.0.dev0@main", False)]
)
def test_singular_vectors_under_alpha_equal_to_r_are_peft_s_combination(version, suspected):
    adapter = changed(healthy(config={"peft_version": version}), decomposed)
    assert codes(find_combining_bug(patient(adapter))) == ["svd-combined"] * suspected
    # One module with another α shows that PEFT did not combine them.
    one = next(iter(adapter))
    adapter = changed(adapter, lambda B, A, s: (B, A, 2 * s), only=lambda name: name == one)
    assert codes(find_combining_bug(patient(adapter))) == []


def test_rslora_combinations_are_root_r_too_strong():
    adapter = changed(healthy(config={"use_rslora": True}), decomposed)
    adapter = adapter.map(lambda m: m.rescaled(8**0.5, scaling(8, 8, "alpha/sqrt(r)")))
    (found,) = find_combining_bug(patient(adapter))
    assert found.code == "rslora-combined"
    assert "√r = 2.83" in found.evidence


def side_by_side(rng):
    """Two adapters of rank 4 in one pair, the second at 0.5: A carries the weights."""
    (B1, A1), (B2, A2) = trained(rng, in_=400, rank=4), trained(rng, in_=400, rank=4)
    return np.hstack([B1, B2]), np.vstack([A1, 0.5 * A2])


def test_rslora_concatenations_show_by_the_lengths_of_rows():
    adapter = healthy(alpha=8.0, rule="alpha/sqrt(r)", config={"use_rslora": True}, make=side_by_side)
    (found,) = find_combining_bug(patient(adapter))
    assert (found.code, "blocks of [4, 4]" in found.evidence) == ("rslora-combined", True)


@pytest.mark.parametrize(("alpha", "found"), [(4.0, ["concat-alpha"]), (8.0, [])])
def test_concatenations_with_the_alpha_of_the_first(alpha, found):
    said = list(find_joined_pairs(patient(healthy(alpha=alpha, make=side_by_side, format="kohya"))))
    assert codes(said) == found
    assert all("2 times the strength" in one.fix for one in said)


@pytest.mark.parametrize(
    ("dim", "alpha", "found"),
    [("4", 4.0, True), ("8", 4.0, False), ("Dynamic", 4.0, False), ("4", 8.0, False), ("3", 4.0, False)],
)
def test_concatenations_that_the_metadata_gives_away(dim, alpha, found):
    adapter = healthy(alpha=alpha, format="kohya", metadata={"ss_network_dim": dim})
    said = list(find_joined_pairs(patient(adapter)))
    assert codes(said) == ["concat-alpha"] * found
    assert all("ss_network_dim says 4, the pairs have rank 8" in one.evidence for one in said)


def split(rng, parts=3):
    """q, k and v trained apart and stored as one: B block-diagonal."""
    pairs = [trained(rng, out=16, rank=4) for _ in range(parts)]
    B = np.zeros((16 * parts, 4 * parts), np.float32)
    for i, (b, _) in enumerate(pairs):
        B[16 * i : 16 * (i + 1), 4 * i : 4 * (i + 1)] = b
    return B, np.vstack([A for _, A in pairs])


@pytest.mark.parametrize(
    ("parts", "alpha", "found"), [(3, 4.0, True), (4, 4.0, True), (3, 12.0, False), (3, 1.0, True)]
)
def test_split_projections_at_a_third_or_a_quarter(parts, alpha, found):
    adapter = healthy(alpha=alpha, make=lambda rng: split(rng, parts), format="kohya")
    said = list(find_joined_pairs(patient(adapter)))
    assert codes(said) == ["split-qkv-alpha"] * found
    assert all(f"{parts} parts of rank 4" in one.evidence and f"{parts} times" in one.fix for one in said)


def part_ranks(make, **changes):
    """What is suspected of projections trained apart, at a scale that would fit one part of many: parts and rank."""
    adapter = healthy(alpha=1.0, make=make, format="kohya")
    adapter = adapter.map(lambda m: LowRank(m.B, m.A, m.scale, scaling=m.scaling, **changes))
    return [one.evidence.split(", ")[1] for one in find_joined_pairs(patient(adapter)) if one.code == "split-qkv-alpha"]


def cleared(rows, columns):
    def make(rng):
        B, A = split(rng)
        B[rows, columns] = 0
        return B, A

    return make


def apart(width, parts):
    """B of ``parts`` blocks of ``width`` columns."""

    def make(rng):
        B = np.kron(np.eye(parts), np.ones((6, width))) * rng.normal(size=(6 * parts, width * parts))
        return B.astype(np.float32), rng.normal(size=(width * parts, 40)).astype(np.float32)

    return make


def test_the_finest_blocks_count_and_those_of_one_column_are_none():
    assert part_ranks(apart(2, 4)) == ["4 parts of rank 2"]  # of rank 4 there would be two
    assert part_ranks(apart(3, 3)) == ["3 parts of rank 3"]
    assert part_ranks(apart(3, 2)) == ["2 parts of rank 3"]
    assert part_ranks(apart(1, 3)) == part_ranks(apart(1, 5)) == []


def test_rows_that_no_part_writes_are_no_obstacle_and_a_part_that_writes_none_is():
    assert part_ranks(split) == ["3 parts of rank 4"]
    assert part_ranks(cleared([0, 20, 47], slice(None))) == ["3 parts of rank 4"]
    assert part_ranks(cleared(slice(0, 16), slice(None))) == part_ranks(cleared(slice(32, 48), slice(None))) == []


def test_blocks_in_another_order_or_that_share_a_row_are_not_parts_of_a_projection():
    def swapped(rng):
        B, A = split(rng)
        return np.concatenate([B[32:], B[16:32], B[:16]]), A

    def shared(rng):
        B, A = split(rng)
        B[17, 0] = 1
        return B, A

    assert part_ranks(swapped) == part_ranks(shared) == []


def test_a_merged_pair_has_blocks_by_its_layout():
    assert part_ranks(split, layout=Layout("merged", groups=3)) == []


def together(*terms, rank=None):
    """Σ w·ΔW as one adapter: factors side by side, or their SVD of this rank."""
    modules = {}
    for name in terms[0][1]:
        parts = [(w * a[name].scale * a[name].B, a[name].A) for w, a in terms]
        B, A = np.hstack([b for b, _ in parts]), np.vstack([a for _, a in parts])
        if rank:
            U, s, Vh = np.linalg.svd(B @ A, full_matrices=False)
            B, A = U[:, :rank] * s[:rank], Vh[:rank]
        modules[name] = LowRank(B, A, 1.0, scaling=scaling(A.shape[0], A.shape[0]))
    return loralens.Adapter(modules=modules, config={"r": rank or 16})


def judged(*adapters):
    return list(find_weighted_sums([patient(one, f"adapter{i}") for i, one in enumerate(adapters)]))


def test_the_weights_of_a_sum_are_read_off():
    first, second = healthy(0), healthy(1)
    (found,) = judged(first, second, together((0.25, first), (0.5, second)))
    assert (found.level, found.code, found.adapter) == ("note", "combination", "adapter2")
    assert found.evidence == "ΔW = 0.25 × adapter0 + 0.5 × adapter1"


@pytest.mark.parametrize("rank", [None, 16])
def test_a_scale_applied_twice_shows_in_the_weights(rank):
    first, second = healthy(0), healthy(1)  # α/r = 2
    (found,) = judged(together((1.4, first), (0.6, second), rank=rank), first, second)
    assert (found.level, found.code, found.adapter) == ("warning", "combination-scale", "adapter0")
    assert "1.4 × adapter1 + 0.6 × adapter2: the weights sum to 2, the scale of the sources" in found.evidence
    assert "0.5 of the strength" in found.fix


def test_unrelated_adapters_and_differences_are_no_sums():
    first, second, third = healthy(0), healthy(1), healthy(2)
    assert judged(first, second, third) == []
    assert [one.adapter for one in judged(first, second, together((1, first), (-0.5, second)))] == ["adapter0"]
    other = loralens.Adapter(modules={"x": LowRank(*trained(np.random.default_rng(9)))})
    assert judged(first, other) == []


def test_shared_starts_are_grouped():
    def again(seed, start):
        new, old = healthy(seed), healthy(start)
        return loralens.Adapter(modules={n: LowRank(new[n].B, old[n].A + 0.01 * new[n].A) for n in new})

    adapters = [healthy(0), healthy(1), again(2, 0), again(3, 0), again(4, 1), healthy(5), healthy(6, rank=4)]
    found = list(find_shared_initialisations([patient(one, f"adapter{i}") for i, one in enumerate(adapters)]))
    assert [one.adapter for one in found] == ["adapter0", "adapter1"]
    assert found[0].evidence.startswith(
        "its A has nearly the same direction as that of adapter2, adapter3 (cosine 0.99 or more)"
    )
    assert "loralens similarity adapter0 adapter2 --side out" in found[0].fix
    assert found[0].level == "note"
