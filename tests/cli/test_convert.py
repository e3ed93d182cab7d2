"""``loralens convert`` and ``equal`` from the shell, and ``inspect --base`` and ``--for``."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loralens
from tests.bases import single
from tests.cli.command import Command
from tests.conftest import small_adapter
from tests.models import low_rank

CALL = Command()
run, told, good, refused = CALL.run, CALL.told, CALL.good, CALL.refused


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose weights are called as `small_adapter` says, but for a leading ``model.``."""
    folder = tmp_path_factory.mktemp("base")
    names = [f"layers.{i}.self_attn.{kind}.weight" for i in (0, 1, 10) for kind in ("q_proj", "v_proj")]
    save_file({name: np.zeros((6, 4), np.float32) for name in names}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("to", ["kohya", "comfyui", "diffusers", "mlx"])
def test_there_and_back_is_equal(small: Path, tmp_path: Path, to: str) -> None:
    there, back = tmp_path / ("there" if to == "mlx" else "there.safetensors"), tmp_path / "back"
    good("convert", small, "-o", there, "--to", to)
    good("convert", there, "-o", back, "--to", "peft")
    result = good("equal", small, back)
    assert result.stdout.startswith("Equal: ")
    assert list(loralens.load(back)) == list(loralens.load(small))


def test_an_unknown_alpha_is_not_carried_on(small: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare.safetensors"
    bare.write_bytes((small / "adapter_model.safetensors").read_bytes())
    assert "--alpha" in refused("convert", bare, "-o", tmp_path / "k.safetensors", "--to", "kohya")
    good("convert", bare, "-o", tmp_path / "k.safetensors", "--to", "kohya", "--alpha", "8")
    good("equal", small, tmp_path / "k.safetensors")


def test_kohya_names_of_other_people_need_the_base(small: Path, base: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs.safetensors"
    run("convert", small, "-o", theirs, "--to", "kohya", "--prefix", "model.=")
    save_file(load_file(theirs), theirs)  # as somebody else writes it: no record
    assert next(iter(loralens.load(theirs))) == "lora_unet_layers_0_self_attn_q_proj"
    good("convert", theirs, "-o", tmp_path / "out", "--to", "peft", "--base", base)
    assert next(iter(loralens.load(tmp_path / "out"))) == "layers.0.self_attn.q_proj"


def test_numbers_that_a_dtype_does_not_hold_are_an_error_and_nothing_is_written(tmp_path: Path) -> None:
    B = np.full((6, 2), 1e5, np.float32)
    loralens.save(loralens.Adapter(modules={"m.q": loralens.LowRank(B, np.ones((2, 4), np.float32))}), tmp_path / "a")
    assert "m.q: its factors are too large for float16\n  fix: " in refused(
        "convert", tmp_path / "a", "-o", tmp_path / "b", "--to", "peft", "--dtype", "f16"
    )
    assert not (tmp_path / "b").exists()
    B[0, 0] = np.nan  # what was none before is not what rounding did
    loralens.save(loralens.Adapter(modules={"m.q": loralens.LowRank(B / 10, np.ones((2, 4)))}), tmp_path / "n")
    result = good("convert", tmp_path / "n", "-o", tmp_path / "b", "--to", "peft", "--dtype", "f16")
    assert "warning: m.q holds NaN or Inf, and is written so; nothing could be measured\n  fix: " in result.stderr


def test_a_head_that_the_base_has_as_its_embedding(tmp_path: Path) -> None:
    """llama.cpp has nothing to adapt there; in other dialects the head keeps its name."""
    name = "layers.0.self_attn.v_proj"
    held = {
        f"model.{name}.weight": np.ones((4, 4), np.float32),
        "model.embed_tokens.weight": np.ones((9, 4), np.float32),
    }
    config = {"architectures": ["LlamaForCausalLM"], "num_attention_heads": 2, "tie_word_embeddings": True}
    base = single(tmp_path / "base", held, config=config)
    pairs = {"lm_head": (9, 4), name: (4, 4)}
    modules = {key: loralens.LowRank(np.ones((out, 1)), np.ones((1, in_))) for key, (out, in_) in pairs.items()}
    loralens.save(loralens.Adapter(modules=modules), tmp_path / "lora")
    said = refused("convert", tmp_path / "lora", "--to", "gguf", "--base", base, "-o", tmp_path / "x.gguf")
    what = "the base's head is its embedding, and llama.cpp has no output tensor of its own there to adapt"
    assert said.startswith(f"error: {tmp_path / 'lora'}: lm_head: {what}\n  fix: leave the module out first: ")
    result = run("convert", tmp_path / "lora", "--to", "mlx", "--base", base, "-o", tmp_path / "mlx")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "lm_head adapts the base's embedding, which is its head too" in result.stdout
    assert list(loralens.load(tmp_path / "mlx")) == ["lm_head", f"model.{name}"]
    untied = single(tmp_path / "untied", held, config={**config, "tie_word_embeddings": False})
    assert "lm_head" in refused("convert", tmp_path / "lora", "--to", "mlx", "--base", untied, "-o", tmp_path / "mlx2")


def tiny(path: Path, size: float = 3e-8) -> Path:
    """Pairs whose B are so small that float16 keeps one digit of them, or none; the second module is ordinary."""
    one = low_rank(6, 5, scale=2.0)
    modules = {"m.q": loralens.LowRank((size * one.B).astype(np.float32), one.A, 2.0), "m.v": one}
    loralens.save(loralens.Adapter(modules=modules), path)
    return path


def test_a_dtype_that_loses_much_is_refused_unless_allowed(tmp_path: Path) -> None:
    source = tiny(tmp_path / "a")
    words = ("convert", source, "-o", tmp_path / "b", "--to", "peft", "--dtype", "f16")
    said = refused(*words)
    assert "m.q: rounding to f16 costs" in said
    assert "--allow-loss" in said
    assert not (tmp_path / "b").exists()
    record = told(*words, "--allow-loss")
    old, new = loralens.load(source), loralens.load(tmp_path / "b")
    gone = {name: np.linalg.norm(old[name].dense() - new[name].dense()) for name in old}
    whole = {name: np.linalg.norm(old[name].dense()) for name in old}
    worst = {"module": "m.q", "error": pytest.approx(gone["m.q"] / whole["m.q"], rel=1e-6)}
    total = np.linalg.norm(list(gone.values())) / np.linalg.norm(list(whole.values()))
    assert record["rounding"] == {"error": pytest.approx(total, rel=1e-6), "worst": worst}


@pytest.fixture
def llama(tmp_path: Path) -> tuple[Path, Path]:
    """A base of four heads of queries and two of keys, and an adapter of it."""
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 16}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    rows = {"q_proj": 16, "k_proj": 8, "v_proj": 8, "o_proj": 16}
    names = {f"model.layers.{i}.self_attn.{kind}": out for i in (0, 1) for kind, out in rows.items()}
    held = {f"{name}.weight": np.zeros((out, 16), np.float32) for name, out in names.items()}
    single(tmp_path / "base", held, config=config)
    modules = {name: low_rank(out, 16, scale=2.0, seed=i) for i, (name, out) in enumerate(names.items())}
    loralens.save(loralens.Adapter(modules=modules), tmp_path / "a")
    return tmp_path / "base", tmp_path / "a"


def test_gguf_files_that_llama_cpp_treats_alike_are_equal(llama: tuple[Path, Path], tmp_path: Path) -> None:
    """One says the head counts, the other is as llama.cpp's converter leaves it; of a change in q both say so."""
    base, source = llama
    ours, theirs, other = (tmp_path / f"{name}.gguf" for name in ("ours", "theirs", "other"))
    good("convert", source, "-o", ours, "--to", "gguf", "--base", base)
    theirs.write_bytes(ours.read_bytes().replace(b"loralens.attention.head", b"somebody.attention.head"))
    for pair in ((ours, theirs), (theirs, ours), (theirs, theirs), (theirs, source, "--base", base)):
        result = run("equal", *pair)
        assert (result.exit_code, "warning" in result.stderr) == (0, pair[0] == pair[1]), result.output
    lone = run("equal", theirs, source)
    assert (lone.exit_code, lone.stdout) == (2, "")
    assert "fix: give the base that it was trained on: --base DIR" in lone.stderr
    changed = loralens.load(source)
    q = changed["model.layers.0.self_attn.q_proj"]
    loralens.save(
        replace(
            changed, modules={**changed.modules, "model.layers.0.self_attn.q_proj": loralens.LowRank(-q.B, q.A, 2.0)}
        ),
        tmp_path / "changed",
    )
    good("convert", tmp_path / "changed", "-o", other, "--to", "gguf", "--base", base)
    result = run("equal", other, theirs)
    assert result.exit_code == 1
    assert "1 of 8 modules differ" in result.stdout


@pytest.mark.parametrize(
    "fields",
    [
        {"task_type": "\x1b[31m", "lora_dropout": 7, "target_modules": {"a": 1}, "layers_to_transform": "1"},
        {"task_type": 3, "lora_dropout": True, "target_modules": ["a", 1], "exclude_modules": [None], "r": 99},
        ["task_type"],
    ],
)
def test_a_record_of_nonsense_is_not_believed(fields: object, small: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    run("convert", small, "-o", tmp_path / "k.safetensors", "--to", "kohya")
    with safe_open(tmp_path / "k.safetensors", "numpy") as file:
        metadata = file.metadata()
    record = json.loads(metadata["loralens"]) | {"peft": fields}
    tensors = load_file(tmp_path / "k.safetensors")
    save_file(tensors, tmp_path / "k.safetensors", metadata | {"loralens": json.dumps(record)})
    run("convert", tmp_path / "k.safetensors", "-o", tmp_path / "back", "--to", "peft")
    config = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert (config["task_type"], config["lora_dropout"], config["r"]) == (None, 0.0, 2)
    assert set(config["target_modules"]) == set(small_adapter())


def with_full(source: Path, target: Path, tensors: dict[str, np.ndarray]) -> Path:
    """The adapter of ``source`` with tensors saved in full beside its pairs."""
    target.mkdir()
    held = load_file(source / "adapter_model.safetensors")
    save_file(
        {**held, **{f"base_model.model.{key}": x for key, x in tensors.items()}}, target / "adapter_model.safetensors"
    )
    (target / "adapter_config.json").write_text((source / "adapter_config.json").read_text())
    return target


@pytest.mark.some(9)
@pytest.mark.parametrize("to", ["gguf", "mlx", "kohya"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_embeddings_that_peft_copied_from_the_base_do_not_block(
    to: str, tied: bool, dtype: str, llama: tuple[Path, Path], tmp_path: Path
) -> None:
    """A head that is tied to the embedding is a copy of that; numbers of its own are refused as before."""
    base, source = llama
    rng = np.random.default_rng(4)
    embedding, head = rng.standard_normal((2, 24, 16)).astype(np.float32)
    weights = load_file(base / "model.safetensors") | {"model.embed_tokens.weight": embedding}
    save_file(weights if tied else weights | {"lm_head.weight": head}, base / "model.safetensors")
    copies = {"model.embed_tokens.weight": embedding, "lm_head.base_layer.weight": embedding if tied else head}
    full = with_full(source, tmp_path / "full", {key: tensor.astype(dtype) for key, tensor in copies.items()})
    words = ["-o", tmp_path / f"out.{'gguf' if to == 'gguf' else 'safetensors'}", "--to", to]
    said = refused("convert", full, *words, *(["--arch", "llama"] if to == "gguf" else []))
    if to != "gguf":
        assert "--base leaves out embeddings that PEFT saved although they equal the base's" in said
    done = good("convert", full, *words, "--base", base)
    assert done.stdout.count("it is the base's own") == 2
    trained = with_full(source, tmp_path / "trained", {**copies, "lm_head.base_layer.weight": 2 * embedding})
    said = refused("convert", trained, *words, "--base", base, "--overwrite")
    assert "lm_head.base_layer.weight" in said
    assert "embed_tokens" not in said
