"""`merge --undo-kind adapter`: a small undo file, from which the base comes back bit for bit with the adapter."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loralens
from loralens.core.adapter import Adapter, Extra
from loralens.core.lazy import LazyArray
from loralens.errors import LoraLensError, MismatchError, OptionError
from loralens.formats.models.checkpoint import open_checkpoint
from loralens.formats.records.undo import KEY, NAME, read_undo
from tests import ggufs
from tests.bases import MODULES, contents
from tests.cli.test_merge import CERTIFICATE
from tests.formats.test_gguf_base import STACKS, mixtral
from tests.marks import slow_except
from tests.verbs.low_bit_bases import SHAPE, nf4_base, pair_adapter, stored
from tests.verbs.test_calibrate_inputs import moments_file
from tests.verbs.test_merge_gguf import KINDS, adapter_for, base_of, digest


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return nf4_base(tmp_path / "base")


def merge(adapter: Any, base: Path, out: Path, **options: Any) -> Any:
    return loralens.merge(adapter, base=base, output=out, bits="keep", undo_kind="adapter", **options)


def with_magnitudes(adapter: Adapter) -> Adapter:
    """The adapter with DoRA in every module."""
    rng = np.random.default_rng(7)
    lengths = {name: (0.5 + 0.1 * rng.random(SHAPE[0])).astype(np.float32) for name in adapter.modules}
    extra = {
        f"base_model.model.{name}.lora_magnitude_vector": Extra("magnitude", name, LazyArray.of(array))
        for name, array in lengths.items()
    }
    return Adapter(modules=dict(adapter.modules), extra=extra)


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@pytest.mark.parametrize("dora", [False, True])
def test_the_base_comes_back_with_the_adapter(base: Path, tmp_path: Path, rounding: Any, dora: bool) -> None:
    adapter = with_magnitudes(pair_adapter()) if dora else pair_adapter()
    result = merge(adapter, base, tmp_path / "out", rounding=rounding, seed=-5)
    whole = loralens.merge(adapter, base=base, output=tmp_path / "whole", bits="keep", rounding=rounding, seed=-5)
    assert stored(tmp_path / "out").keys() == stored(tmp_path / "whole").keys()
    name = f"{MODULES[0]}.weight"
    np.testing.assert_array_equal(stored(tmp_path / "out")[name], stored(tmp_path / "whole")[name])
    sizes = [each.certificate["total"]["undo_bytes"] for each in (result, whole)]
    assert sizes[0] < sizes[1]
    back = loralens.unmerge(tmp_path / "out", adapter=adapter, output=tmp_path / "back")
    assert (back.exact, back.answer, back.doubt) == (True, True, None)
    assert back.conclusion() == [f"Wrote {tmp_path / 'back'}: the base of {tmp_path / 'out'}, bit for bit."]
    assert contents(tmp_path / "back") == contents(base)
    # The file may be named too.
    named = loralens.unmerge(tmp_path / "out", undo=tmp_path / "out" / NAME, adapter=adapter, dry_run=True)
    assert named.exact
    assert loralens.verify(tmp_path / "out", base=base, adapter=adapter).verdict in ("exact", "rounded", "partial")
    assert loralens.verify(tmp_path / "out").answer


@pytest.mark.some(2)
@pytest.mark.parametrize("kind", slow_except(KINDS, "Q4_1", "Q4_K", "MXFP4"))
def test_every_type_of_gguf_comes_back(kind: str, tmp_path: Path) -> None:
    base, out = base_of(tmp_path / "m.gguf", kind), tmp_path / "o.gguf"
    adapter = adapter_for(base)
    merge(adapter, base, out)
    loralens.unmerge(out, adapter=adapter, output=tmp_path / "again.gguf")
    assert digest(tmp_path / "again.gguf") == digest(base)


def test_experts_of_a_stack_come_back(tmp_path: Path) -> None:
    """Two experts whose codes are parts of one stored tensor, and an unmoved one between them."""
    base, out = tmp_path / "m.gguf", tmp_path / "o.gguf"
    weights = mixtral()
    kinds = {key: "F32" if "gate.weight" in key else "Q4_1" for key in weights}
    ggufs.write(base, weights, kinds=kinds, names=STACKS)
    tensors, modules = open_checkpoint(base).tensors, dict[str, Any]()
    rng = np.random.default_rng(0)
    for name in [f"model.layers.0.block_sparse_moe.experts.{i}.w3" for i in (0, 1)]:
        rows, columns = tensors[f"{name}.weight"].shape
        B, A = (rng.standard_normal(shape).astype(np.float32) for shape in ((rows, 2), (2, columns)))
        modules[name] = loralens.LowRank(B, A, 0.01)
    adapter = Adapter(modules=modules)
    merge(adapter, base, out)
    loralens.unmerge(out, adapter=adapter, output=tmp_path / "again.gguf")
    assert digest(tmp_path / "again.gguf") == digest(base)
    assert digest(out) != digest(base)


def test_what_the_merge_says_of_the_file(base: Path, tmp_path: Path) -> None:
    adapter = pair_adapter()
    rehearsed = loralens.merge(adapter, base=base, dry_run=True, bits="keep", undo_kind="adapter")
    written = merge(adapter, base, tmp_path / "out")
    assert rehearsed.undo_size == written.undo_size == (tmp_path / "out" / NAME).stat().st_size
    assert written.certificate["undo_kind"] == "adapter"
    assert written.sentences()[0].endswith("per changed weight); unmerge needs the adapter with it")
    assert "undo_kind" not in loralens.merge(adapter, base=base, dry_run=True, bits="keep").certificate
    # Neither codes nor factors of the adapter are in the file.
    arrays, content = read_undo(tmp_path / "out" / NAME)
    assert content["version"] == 3
    assert {name.rsplit("#")[1] for name in arrays} == {"patch.0"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": "keep", "undo": "none"}, "--undo none writes no file"),
        ({"dtype": "bf16"}, "goes with --bits keep"),
        ({"bits": "keep", "undo_kind": "small"}, "undo_kind small is not possible|is not possible"),
    ],
)
def test_options_that_do_not_go_together(base: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        loralens.merge(pair_adapter(), base=base, output=tmp_path / "out", **{"undo_kind": "adapter", **options})
    assert not (tmp_path / "out").exists()


def test_without_the_adapter_one_message_says_what_is_missing(base: Path, tmp_path: Path) -> None:
    loralens.save(pair_adapter(), tmp_path / "chat")
    merge((tmp_path / "chat", 0.5), base, tmp_path / "out")
    with pytest.raises(OptionError, match="holds only what does not follow from the adapter") as error:
        loralens.unmerge(tmp_path / "out", output=tmp_path / "back")
    assert f"{tmp_path / 'chat'}:0.5" in str(error.value)
    assert "--adapter" in error.value.fix
    assert not (tmp_path / "back").exists()
    loralens.unmerge(tmp_path / "out", adapter=(tmp_path / "chat", 0.5), output=tmp_path / "back")
    assert contents(tmp_path / "back") == contents(base)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: pair_adapter(seed=3), "other adapters were merged than the given ones"),
        (lambda: (pair_adapter(), 0.5), "merged with the weight 1, and not 0.5"),
        (lambda: [pair_adapter(), pair_adapter(seed=3)], "other adapters were merged than the given ones"),
    ],
)
@pytest.mark.parametrize("named", [False, True])
def test_another_adapter_is_refused(
    base: Path, tmp_path: Path, other: Callable[[], Any], message: str, named: bool
) -> None:
    merge(pair_adapter(), base, tmp_path / "out")
    undo = tmp_path / "out" / NAME if named else None
    with pytest.raises(MismatchError, match=message):
        loralens.unmerge(tmp_path / "out", undo=undo, adapter=other(), output=tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_complete_file_excludes_the_adapter(base: Path, tmp_path: Path) -> None:
    loralens.merge(pair_adapter(), base=base, output=tmp_path / "out", bits="keep")
    with pytest.raises(OptionError, match="exclude each other, unless the undo file needs the adapter"):
        loralens.unmerge(tmp_path / "out", undo=tmp_path / "out" / NAME, adapter=pair_adapter(), dry_run=True)
    # Without the name of a file the update is subtracted, as before.
    assert not loralens.unmerge(tmp_path / "out", adapter=pair_adapter(), dry_run=True).exact


def test_several_adapters_come_in_any_order(base: Path, tmp_path: Path) -> None:
    first, second = pair_adapter(), pair_adapter(seed=2)
    loralens.merge(first, (second, 0.5), base=base, output=tmp_path / "out", bits="keep", undo_kind="adapter")
    loralens.unmerge(tmp_path / "out", adapter=[(second, 0.5), first], output=tmp_path / "back")
    assert contents(tmp_path / "back") == contents(base)


def test_the_modules_that_were_merged_are_named_again(base: Path, tmp_path: Path) -> None:
    adapter = pair_adapter()
    merge(adapter, base, tmp_path / "out", modules=["v_proj"])
    assert loralens.unmerge(tmp_path / "out", adapter=adapter, dry_run=True, modules=["v_proj"]).exact
    with pytest.raises(MismatchError, match="other adapters were merged"):
        loralens.unmerge(tmp_path / "out", adapter=adapter, dry_run=True)
    # Of other modules the update is subtracted, as with any undo file that nobody named.
    assert not loralens.unmerge(tmp_path / "out", adapter=adapter, dry_run=True, modules=["q_proj"]).exact


def test_merges_on_top_of_each_other_are_undone_one_after_the_other(base: Path, tmp_path: Path) -> None:
    adapters = pair_adapter(), pair_adapter(seed=2)
    merge(adapters[0], base, tmp_path / "one")
    merge(adapters[1], tmp_path / "one", tmp_path / "two")
    loralens.unmerge(tmp_path / "two", adapter=adapters[1], output=tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "one")
    loralens.unmerge(tmp_path / "back", adapter=adapters[0], output=tmp_path / "again")
    assert contents(tmp_path / "again") == contents(base)


def test_the_codes_of_a_sweep_are_held_and_the_user_is_told(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter, moments = pair_adapter(1e-3), moments_file(tmp_path / "H.safetensors")
    caplog.set_level("INFO", "loralens")
    merge(adapter, base, tmp_path / "out", rounding="sweep", moments=moments)
    assert "all codes were moved by a sweep, so they do not follow from the adapter" in caplog.text
    # Such a file needs no adapter.
    loralens.unmerge(tmp_path / "out", output=tmp_path / "back")
    assert contents(tmp_path / "back") == contents(base)


def test_a_sweep_of_some_weights_holds_their_codes_alone(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter, moments = pair_adapter(1e-3), moments_file(tmp_path / "H.safetensors", modules=MODULES[:2])
    caplog.set_level("INFO", "loralens")
    merge(adapter, base, tmp_path / "out", rounding="sweep", moments=moments)
    assert "the codes of 2 of 6 weights were moved by a sweep" in caplog.text
    loralens.unmerge(tmp_path / "out", adapter=adapter, output=tmp_path / "back")
    assert contents(tmp_path / "back") == contents(base)


def test_what_is_trained_in_full_comes_back_too(base: Path, tmp_path: Path) -> None:
    """A float norm that the adapter replaces, new rows of an embedding, and a full difference of a weight of codes."""
    held = load_file(base / "model.safetensors")
    rng = np.random.default_rng(3)
    held["model.embed_tokens.weight"] = rng.standard_normal((5, 128)).astype(np.float32)
    save_file(held, base / "model.safetensors", metadata={"format": "pt"})
    difference = (2e-3 * rng.standard_normal(SHAPE)).astype(np.float32)
    arrays = {
        "n": ("saved", "model.norm", rng.standard_normal(128)),
        "e": ("embedding", "model.embed_tokens", rng.standard_normal((7, 128))),
        "d": ("diff", MODULES[0], difference),
    }
    extra = {
        key: Extra(role, module, LazyArray.of(array.astype(np.float32)))
        for key, (role, module, array) in arrays.items()
    }
    adapter = Adapter(modules=dict(pair_adapter().modules), extra=extra)
    merge(adapter, base, tmp_path / "out")
    assert stored(tmp_path / "out")["model.embed_tokens.weight"].shape == (7, 128)
    loralens.unmerge(tmp_path / "out", adapter=adapter, output=tmp_path / "back")
    assert contents(tmp_path / "back") == contents(base)


def test_a_model_that_was_changed_since_is_named(base: Path, tmp_path: Path) -> None:
    merge(pair_adapter(), base, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    held = load_file(file)
    held[f"{MODULES[1]}.weight"][3] ^= 1
    save_file(held, file, metadata={"format": "pt"})
    with pytest.raises(MismatchError, match=rf"{MODULES[1]}\.weight: is not as it was merged"):
        loralens.unmerge(tmp_path / "out", adapter=pair_adapter(), output=tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("what", ["scales", "a choice", "the seed"])
def test_what_the_hashes_of_the_codes_do_not_cover_is_found_by_the_hash_of_the_base(
    base: Path, tmp_path: Path, what: str
) -> None:
    adapter = pair_adapter()
    merge(adapter, base, tmp_path / "out")
    key = f"{MODULES[2]}.weight"
    undo = tmp_path / "out" / NAME
    if what == "scales":
        # Their own hash finds it as well, so this tensor must be the only one that is restored.
        held = load_file(tmp_path / "out" / "model.safetensors")
        held[f"{key}.absmax"] *= 2
        save_file(held, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    elif what == "the seed":
        change(undo, lambda content: content["tensors"][key].update(seed=9))
    else:
        change(undo, lambda content: None, flip=key)
    with pytest.raises(LoraLensError, match=key.replace(".", r"\.")):
        loralens.unmerge(tmp_path / "out", adapter=adapter, output=tmp_path / "back")
    assert not (tmp_path / "back").exists()


def change(undo: Path, edit: Callable[[dict[str, Any]], None], *, flip: str = "") -> None:
    """Write an undo file again with another content, and with one choice of a tensor changed."""
    import zlib

    data = undo.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    content = json.loads(header["__metadata__"].pop(KEY))
    edit(content)
    arrays = load_file(undo)
    if flip:
        choices = bytearray(zlib.decompress(arrays[f"{flip}#patch.0"].tobytes()))
        choices[choices.index(1)] = 0
        arrays[f"{flip}#patch.0"] = np.frombuffer(zlib.compress(bytes(choices)), np.uint8)
    save_file(arrays, undo, metadata={KEY: json.dumps(content)})


UNMERGE = """
import sys, loralens
loralens.unmerge(sys.argv[1], adapter=sys.argv[2], output=sys.argv[3])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("core", "kernel", "threads"),
    [
        ("Prescott", "on", "2"),
        ("Prescott", "off", "1"),
        ("Haswell", "on", "1"),
        ("Haswell", "off", "2"),
        ("SkylakeX", "on", "2"),
        ("SkylakeX", "off", "1"),
    ],
)
def test_the_base_comes_back_on_other_processors(core: str, kernel: str, threads: str, tmp_path: Path) -> None:
    """The merge is made here once, and undone with other BLAS kernels, threads, and with and without compiled loops."""
    if core == "SkylakeX" and "avx512f" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no AVX-512")
    base, adapter = nf4_base(tmp_path / "base"), with_magnitudes(pair_adapter())
    loralens.save(adapter, tmp_path / "adapter")
    merge(tmp_path / "adapter", base, tmp_path / "out")
    environment = {
        **os.environ,
        "OPENBLAS_CORETYPE": core,
        "OPENBLAS_NUM_THREADS": threads,
        "OMP_NUM_THREADS": threads,
        "LORALENS_KERNEL": kernel,
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    if core == "Prescott":
        environment["NPY_DISABLE_CPU_FEATURES"] = "AVX2 AVX512F AVX512CD AVX512_SKX"
    places = [str(tmp_path / name) for name in ("out", "adapter", "back")]
    subprocess.run([sys.executable, "-W", "ignore", "-c", UNMERGE, *places], env=environment, check=True)
    assert contents(tmp_path / "back") == contents(base)
    assert (tmp_path / "out" / CERTIFICATE).is_file()
