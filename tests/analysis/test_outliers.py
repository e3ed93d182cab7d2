"""Outliers: rarely named where nothing is odd, found where something is, and the same in every dialect."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loralens
from loralens.analysis.outliers import PER_MODULE, find_outliers, upper_outliers
from loralens.analysis.spectrum import Spectrum, measure_spectrum
from tests.marks import slow_except

# How the singular values of a module are drawn: the law of a kind is the same in all its modules.
SPECTRA = {
    "normal": lambda rng, r: np.exp(0.4 * rng.normal(size=r) + 0.3 * rng.normal()),
    "light": lambda rng, r: rng.uniform(0.2, 1.0, size=r),
    "laplace": lambda rng, r: np.exp(0.5 * rng.laplace() + 0.2 * rng.normal(size=r)),
    "power law": lambda rng, r: rng.pareto(1.0, size=r),
    "steep power law": lambda rng, r: rng.pareto(0.5, size=r),
    "cauchy": lambda rng, r: np.abs(rng.standard_cauchy(size=r)),
    "two sorts": lambda rng, r: np.exp(1.5 * rng.integers(0, 2) + 0.2 * rng.normal(size=r)),
}
COUNTS = [(6, 2, 1), (8, 3, 1), (12, 2, 1), (16, 2, 3), (32, 2, 1), (64, 1, 2)]  # modules, kinds, shapes of a kind


def exchangeable(rng, draw, modules, kinds, shapes):
    """Spectra whose modules differ by chance alone; shapes change along the depth, and the norm with them."""
    spectra = {}
    for k in range(kinds):
        rank, spread = int(rng.choice([1, 2, 4, 8, 64])), float(rng.choice([1.0, 3.0]))
        for i in range(modules):
            size = 64 << (i * shapes // modules)
            s = np.sort(draw(rng, rank) ** spread)[::-1] * size
            spectra[f"model.layers.{i}.mlp.kind{'abc'[k]}"] = Spectrum(s, (size, size), rank)
    return spectra


@pytest.mark.parametrize("law", slow_except(SPECTRA, "normal", "power law"))
def test_where_modules_are_exchangeable_at_most_one_in_a_hundred_is_named(law: str) -> None:
    rng = np.random.default_rng(sum(map(ord, law)))
    rates = []
    for counts in COUNTS:
        flagged = total = 0
        for _ in range(max(4, 500 // (counts[0] * counts[1]))):
            spectra = exchangeable(rng, SPECTRA[law], *counts)
            flagged += len({o.name for o in find_outliers(spectra)})
            total += len(spectra)
        rates.append((flagged, total))
    assert sum(flagged for flagged, _ in rates) <= PER_MODULE * sum(total for _, total in rates)
    for flagged, total in rates:
        assert flagged <= PER_MODULE * total + 3 * (PER_MODULE * total) ** 0.5  # three standard deviations of a count


def test_the_chance_of_a_gap_is_that_of_exponential_spacings() -> None:
    """The largest of n exponentials apart by g: sampled, beside the closed form that is reported."""
    rng = np.random.default_rng(0)
    x = np.log(10.0) + np.array([3.0, 0.9, 0.6, 0.4, 0.3, 0.2, 0.1, 0.05])
    ((index, chance),) = upper_outliers(x, 0.5)
    assert index == 0
    spacings = np.arange(1, 5) * (x[:4] - np.append(x[1:4], x[4]))
    ratio = spacings[0] / (spacings[1:].mean() + 0.01)
    E = rng.exponential(size=(200_000, 4))
    assert chance == pytest.approx(np.mean(E[:, 0] > ratio * E[:, 1:].mean(axis=1)), rel=0.05)


def healthy(rng, blocks, *, spread=0.1, shapes=1, kinds=("self_attn.q_proj", "self_attn.v_proj"), rank=8):
    """Norms that rise fourfold with depth, as those of published adapters do, and vary by ``spread`` about that."""
    spectra = {}
    for kind in kinds:
        for i in range(blocks):
            size = 64 << (i * shapes // blocks)
            s = 0.8 ** np.arange(rank) * np.exp(0.1 * rng.normal(size=rank))
            s *= np.exp(1.4 * i / blocks + spread * rng.normal()) / np.linalg.norm(s)
            spectra[f"model.layers.{i}.{kind}"] = Spectrum(np.sort(s)[::-1], (size, size), rank)
    return spectra


@pytest.mark.some(2)
@pytest.mark.parametrize("blocks", [12, 16, 24, 48])
@pytest.mark.parametrize("factor", [10.0, 0.1])
def test_a_module_ten_times_as_strong_or_weak_is_found_and_nothing_else(blocks: int, factor: float) -> None:
    rng = np.random.default_rng(blocks)
    found = strays = 0
    for _ in range(12):
        spectra = healthy(rng, blocks, shapes=3 if blocks == 16 else 1)
        victim = f"model.layers.{rng.integers(blocks)}.self_attn.v_proj"
        old = spectra[victim]
        spectra[victim] = Spectrum(old.s * factor, old.shape, old.rank)
        names = {o.name for o in find_outliers(spectra)}
        found += victim in names
        strays += len(names - {victim})
    assert found >= 11
    assert strays <= 1


def test_a_module_replaced_by_noise_is_found_by_its_effective_rank() -> None:
    rng = np.random.default_rng(4)
    spectra = healthy(rng, 24)
    old = spectra["model.layers.7.self_attn.q_proj"]
    noise = np.linalg.svd(rng.normal(size=(64, 8)), compute_uv=False)
    s = noise * old.frobenius / np.linalg.norm(noise)
    spectra["model.layers.7.self_attn.q_proj"] = Spectrum(s, old.shape, 8)
    (found,) = find_outliers(spectra)
    assert (found.name, found.quantity) == ("model.layers.7.self_attn.q_proj", "effective_rank")
    assert found.value > 7.5 > found.typical


def test_several_odd_modules_do_not_hide_each_other() -> None:
    spectra = healthy(np.random.default_rng(5), 24)
    odd = [f"model.layers.{i}.self_attn.q_proj" for i in (2, 13, 20)]
    for name in odd:
        spectra[name] = Spectrum(spectra[name].s * 20, (64, 64), 8)
    assert sorted({o.name for o in find_outliers(spectra)}) == sorted(odd)


def test_of_few_modules_none_is_named_and_equal_ones_are_compared_with_one_percent() -> None:
    few = {f"layers.{i}.q": Spectrum(np.array([1.0 + 99 * (i == 2)]), (8, 8), 1) for i in range(5)}
    assert find_outliers(few) == []
    equal = {f"layers.{i}.q": Spectrum(np.array([1.0 + 99 * (i == 2)]), (8, 8), 1) for i in range(9)}
    (found,) = find_outliers(equal)
    assert (found.name, found.value, found.typical) == ("layers.2.q", 100.0, 1.0)
    near = {name: Spectrum(s.s if i != 2 else np.array([1.5]), (8, 8), 1) for i, (name, s) in enumerate(equal.items())}
    assert find_outliers(near) == []  # half as much again is not worth a word
    assert find_outliers({name: Spectrum(np.zeros(1), (8, 8), 1) for name in equal}) == []


def test_norms_that_underflow_are_compared_too() -> None:
    spectra = {f"layers.{i}.q": Spectrum(np.array([1e-300, 1e-301]) * (1 + i % 3), (8, 8), 2) for i in range(9)}
    assert find_outliers(spectra) == []


def llm():
    """A module ten times as strong as its kind, q and v apart."""
    rng = np.random.default_rng(0)
    return {
        f"model.layers.{b}.{kind}": (strength * rng.normal(size=(16, 4)), rng.normal(size=(4, 16)))
        for b in range(12)
        for kind, size in (("self_attn.v_proj", 1), ("mlp.up_proj", 3), ("mlp.down_proj", 3))
        for strength in [10 * size if (b, kind) == (4, "mlp.up_proj") else size]
    }


def unet():
    """Self- and cross-attention of other strengths, one module ten times as strong; shapes as in Stable Diffusion."""
    rng = np.random.default_rng(1)
    places = [(f"down_blocks.{i}.attentions.{j}", 8 << i) for i in range(3) for j in range(2)]
    places += [(f"up_blocks.{i}.attentions.{j}", 8 << (3 - i)) for i in range(1, 4) for j in range(3)]
    tensors = {}
    for place, size in places:
        for layer in ("attn1", "attn2"):
            for kind in ("to_q", "to_k", "to_v", "to_out.0"):
                strength = 1.0 if layer == "attn1" else 4.0
                odd = (place, layer, kind) == ("up_blocks.2.attentions.1", "attn2", "to_out.0")
                B = (10 if odd else 1) * strength * rng.normal(size=(size, 4))
                tensors[f"unet.{place}.transformer_blocks.0.{layer}.{kind}"] = (B, rng.normal(size=(4, size)))
    return tensors


def adapter_of(tensors):
    pairs = {name: (B.astype(np.float32), A.astype(np.float32)) for name, (B, A) in tensors.items()}
    return loralens.Adapter(modules={name: loralens.LowRank(B, A) for name, (B, A) in pairs.items()})


def written(adapter, folder: Path, dialect: str) -> Path:
    """The adapter in a dialect, without the record of its own names that loralens writes beside it."""
    if dialect == "gguf":
        loralens.save(adapter, folder / "a.gguf", format="gguf", arch="llama")
        return folder / "a.gguf"
    suffix = ".safetensors" if dialect in ("kohya", "comfyui") else ""
    loralens.save(adapter, folder / f"a{suffix}", format=dialect)
    path = folder / f"a{suffix}"
    for file in [path] if path.is_file() else [*path.glob("*.safetensors")]:
        save_file(load_file(file), file)
    return path


def plain(name: str) -> str:
    """A name without what dialects put before it."""
    return name.replace(".", "_").removeprefix("diffusion_model_").removeprefix("lora_").removeprefix("unet_")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tensors", "dialects"),
    [
        (llm, ["peft", "kohya", "comfyui", "mlx", "gguf", "loralib"]),
        (unet, ["peft", "kohya", "comfyui", "diffusers", "mlx"]),
    ],
)
def test_identical_tensors_have_identical_outliers_in_every_dialect(tensors, dialects, tmp_path: Path) -> None:
    adapter = adapter_of(tensors())
    expected = [(plain(o.name), o.quantity) for o in find_outliers(measure_spectrum(adapter))]
    assert len(expected) == 1
    for dialect in dialects:
        (tmp_path / dialect).mkdir()
        there = loralens.load(written(adapter, tmp_path / dialect, dialect), allow_pickle=True)
        assert there.format == dialect
        names = [(plain(o.name), o.quantity) for o in find_outliers(measure_spectrum(there))]
        assert names == expected, dialect


def test_the_real_pair_in_two_dialects_has_the_same_outliers_when_one_module_is_spoilt(real: Path) -> None:
    found = []
    for name in ("sd15-timohavdk-diffusers", "sd15-timohavdk-kohya"):
        spectra = measure_spectrum(loralens.load(real / name))
        assert find_outliers(spectra) == []
        (victim,) = [
            n for n in spectra if plain(n).endswith("up_blocks_2_attentions_1_transformer_blocks_0_attn2_to_v")
        ]
        spectra[victim] = Spectrum(spectra[victim].s * 10, spectra[victim].shape, spectra[victim].rank)
        found.append([(plain(o.name), o.quantity, o.value, o.chance) for o in find_outliers(spectra)])
    assert found[0] == found[1]
    assert len(found[0]) == 1
