"""Outliers: none where nothing is odd, found where several modules are, and the same in every dialect."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loralens
from loralens.analysis.spectrum import Spectrum, distances_from_line, find_outliers, measure_spectrum
from tests.formats.blobs import limits


def test_the_line_is_that_of_theil_and_sen() -> None:
    rng = np.random.default_rng(0)
    x = 0.3 * np.arange(12) + rng.normal(size=12)
    x[[3, 8]] += 100.0
    slopes = [(x[j] - x[i]) / (j - i) for i in range(12) for j in range(i + 1, 12)]
    rest = x - np.median(slopes) * np.arange(12)
    np.testing.assert_allclose(distances_from_line(x), rest - np.median(rest), atol=1e-12)
    # Of very many modules only some pairs are compared, and the line is the same.
    straight = np.concatenate([0.01 * np.arange(1000), [50.0]])
    assert np.abs(distances_from_line(straight)[:-1]).max() < 1e-9


def test_many_modules_take_little_memory() -> None:
    """A file of 30 MB may have 100,000 modules, and these have 5 billion pairs."""
    count = 5_000
    with limits(60, 100 * 8 * count):
        distances_from_line(np.arange(count, dtype=np.float64))


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


@pytest.mark.parametrize("factors", [(5, 10), (4, 10), (1.5, 4, 12)])
def test_norms_that_grow_at_the_end_as_in_a_run_that_fails_do_not_mask_each_other(factors: tuple[float, ...]) -> None:
    spectra = healthy(np.random.default_rng(5), 12)
    for i, factor in enumerate(factors, start=12 - len(factors)):
        name = f"model.layers.{i}.self_attn.v_proj"
        spectra[name] = Spectrum(spectra[name].s * factor, (64, 64), 8)
    assert "model.layers.11.self_attn.v_proj" in {o.name for o in find_outliers(spectra)}


def test_norms_of_single_experts_are_not_compared() -> None:
    spectra = {f"layers.{i}.experts.{e}.up": Spectrum(np.array([100.0 if (i, e) == (3, 1) else 1.0]), (8, 8), 1)
               for i in range(8) for e in range(2)}  # fmt: skip
    assert find_outliers(spectra) == []
    assert len(find_outliers({name.replace("experts", "parts"): s for name, s in spectra.items()})) == 1


def test_several_odd_modules_do_not_hide_each_other() -> None:
    spectra = healthy(np.random.default_rng(5), 24)
    odd = [f"model.layers.{i}.self_attn.q_proj" for i in (2, 13, 20)]
    for name in odd:
        spectra[name] = Spectrum(spectra[name].s * 20, (64, 64), 8)
    assert sorted({o.name for o in find_outliers(spectra)}) == sorted(odd)


def test_of_few_modules_none_is_named_and_small_differences_are_none() -> None:
    few = {f"layers.{i}.q": Spectrum(np.array([1.0 + 99 * (i == 2)]), (8, 8), 1) for i in range(5)}
    assert find_outliers(few) == []
    equal = {f"layers.{i}.q": Spectrum(np.array([1.0 + 99 * (i == 2)]), (8, 8), 1) for i in range(9)}
    (found,) = find_outliers(equal)
    assert (found.name, found.value, found.typical) == ("layers.2.q", 100.0, pytest.approx(1.0))
    near = {name: Spectrum(s.s if i != 2 else np.array([3.9]), (8, 8), 1) for i, (name, s) in enumerate(equal.items())}
    assert find_outliers(near) == []  # good adapters have modules of three times the usual norm
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
    expected = [plain(o.name) for o in find_outliers(measure_spectrum(adapter))]
    assert len(expected) == 1
    for dialect in dialects:
        (tmp_path / dialect).mkdir()
        there = loralens.load(written(adapter, tmp_path / dialect, dialect))
        assert there.format == dialect
        names = [plain(o.name) for o in find_outliers(measure_spectrum(there))]
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
        found.append([(plain(o.name), o.value, o.typical) for o in find_outliers(spectra)])
    assert found[0] == found[1]
    assert len(found[0]) == 1
