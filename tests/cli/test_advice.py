"""What the texts of the package advise: commands and options exist, and a ``fix`` fixes what it is printed for."""

import ast
import json
import re
import shutil
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import loralens
from loralens import Adapter, LowRank
from loralens.choices import TRAINING_NAMES
from loralens.core import Extra, Layout, LazyArray
from tests import models
from tests.bases import MODULES, peft_folder, sharded, single, tensors
from tests.cli.command import Command, main
from tests.verbs.low_bit_bases import nf4_base

PACKAGE = Path(loralens.__file__).parent
# These name words of other programs: options that a user may try, and style sheets.
OTHER_WORDS = ("cli/usage_hints.py", "cli/derive.py", "reporting/html.py", "reporting/page/", "charts/")
# Options of other programs: vLLM, sd-scripts, torchrun, pip and llama.cpp.
FOREIGN = {
    "--max-lora-rank",
    "--runner",
    "--concat",
    "--nproc-per-node",
    "--no-deps",
    "--python",
    "--lora",
    "--max-logprobs",
}


def commands(command: click.Command, words: tuple[str, ...] = ()) -> Iterator[tuple[str, set[str]]]:
    """Every command with its options."""
    yield " ".join(words), {o for p in command.params for o in (*p.opts, *p.secondary_opts)} | {"--help", "-h"}
    if isinstance(command, click.Group):
        for name in command.list_commands(click.Context(command)):
            inner = command.get_command(click.Context(command), name)
            assert inner
            yield from commands(inner, (*words, name))


def texts(file: Path) -> Iterator[tuple[int, str]]:
    """The texts of a file with their lines; ``{}`` is what an f-string puts in."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield node.lineno, "".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def misspelt(word: str, known: list[str]) -> bool:
    """Whether a word is nearly a command, and is not its verb in a sentence ("loralens reports")."""
    return word.removesuffix("s").removesuffix("d") not in known and bool(get_close_matches(word, known, 1, 0.8))


def test_every_command_and_option_in_a_text_exists() -> None:
    known = dict(commands(main))
    aliases = {f"--{name.replace('_', '-')}" for name in TRAINING_NAMES}  # which `train` accepts and does not list
    options = set().union(*known.values(), aliases) | FOREIGN
    wrong = []
    for file in sorted(PACKAGE.rglob("*.py")):
        name = file.relative_to(PACKAGE).as_posix()
        if name.startswith(OTHER_WORDS):
            continue
        for line, text in texts(file):
            wrong += [(name, line, o) for o in re.findall(r"(?<![\w-])--[a-z][\w-]*", text) if o not in options]
            # A command ends at a comma, a full stop or a word of the sentence around it.
            for match in re.finditer(r"(?<![\w./-])loralens ((?:fleet )?[a-z]+)((?: (?!and |or )[^\s;,:`)]+)*)", text):
                command, more = match[1].removesuffix(" "), match[2]
                if command in known:
                    used = re.findall(r"(?<=\s)--?[a-z][\w-]*", more)
                    wrong += [(name, line, f"{command} {o}") for o in used if o not in known[command] | FOREIGN]
                # Other words are those of a sentence ("loralens reads"), unless they look like a command.
                elif command.startswith("fleet ") or more.lstrip().startswith("-") or misspelt(command, list(known)):
                    wrong.append((name, line, match[0]))
    assert not wrong


def update(out: int, in_: int, *, rank: int = 2, seed: int = 0, kind: str = "linear", **layout: object) -> LowRank:
    return models.low_rank(out, in_, rank, 0.5, seed=seed, layout=Layout(kind, **layout))  # type: ignore[arg-type]


Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
BLOCK = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"  # IN04 of SD 1.5


def pair(other: str = V, **layout: object) -> Adapter:
    return Adapter(modules={Q: update(6, 4), other: update(6, 4, seed=1, **layout)})  # type: ignore[arg-type]


def magnitude(module: str) -> Extra:
    return Extra("magnitude", module, LazyArray.of(np.ones(6, np.float32)))


def dora() -> Adapter:
    names = {f"base_model.model.{name}.lora_magnitude_vector": magnitude(name) for name in (Q, V)}
    return Adapter(modules=pair().modules, extra=names)


def stored(peft_type: str, tensors: dict[str, tuple[int, ...]], **fields: object) -> Callable[[], None]:
    """A file of PEFT with arrays of these shapes; only such a file can hold some kinds of updates."""

    def write() -> None:
        rng = np.random.default_rng(0)
        arrays = {name: rng.standard_normal(n).astype(np.float32) for name, n in tensors.items()}
        peft_folder(Path("A"), arrays, {"peft_type": peft_type, "r": 4, **fields})

    return write


GROUPED = stored(
    "LORA",
    {
        f"{Q}.lora_A.weight": (4, 4), f"{Q}.lora_B.weight": (6, 4),
        f"{V}.lora_A.weight": (4, 4, 1, 1), f"{V}.lora_B.weight": (6, 2, 1, 1),
    },
    lora_alpha=4, target_modules=["q_proj", "v_proj"],
)  # fmt: skip
LOHA = stored(
    "LOHA", {f"{Q}.hada_{half}": shape for half, shape in
             (("w1_a", (6, 4)), ("w1_b", (4, 4)), ("w2_a", (6, 4)), ("w2_b", (4, 4)))},
    alpha=4, target_modules=["q_proj"],
)  # fmt: skip
PAIR = {f"{Q}.lora_A.weight": (4, 4), f"{Q}.lora_B.weight": (6, 4)}
PLAIN: dict[str, Any] = {"lora_alpha": 4, "target_modules": ["q_proj"]}
SD_UNET = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"  # the module of BLOCK as PEFT names it
DROP = f"drop A -m {V} -o B"


def numbers(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def saved(key: str, role: str, module: str, *shape: int) -> Callable[[], Adapter]:
    """A plain adapter with one more tensor."""
    return lambda: Adapter(
        modules=pair().modules, extra={key: Extra(role, module, LazyArray.of(np.ones(shape, np.float32)))}
    )


def bare(**more: Any) -> Callable[[], None]:
    """A file of PEFT whose names lack the prefix."""

    def write() -> None:
        stored("LORA", {}, **PLAIN, **more)()
        held = {key: numbers(*shape) for key, shape in PAIR.items()}
        save_file({**held, "score.weight": numbers(2, 4)} if more else held, "A/adapter_model.safetensors")

    return write


def without(field: str) -> Callable[[], None]:
    """A file of PEFT whose configuration lacks a field, or that has none."""

    def write() -> None:
        stored("LORA", PAIR, **PLAIN)()
        config = json.loads((file := Path("A/adapter_config.json")).read_text())
        file.write_text(json.dumps({key: value for key, value in config.items() if key != field}))
        if not field:
            file.unlink()

    return write


def file_of(**arrays: Any) -> Callable[[], None]:
    return lambda: save_file(arrays, "A.safetensors")


def sd_file(name: str, **arrays: Any) -> Callable[[], None]:
    return file_of(**{f"{name}.{key}": array for key, array in arrays.items()})


KOHYA_PAIR = {"lora_up.weight": numbers(640, 2), "lora_down.weight": numbers(2, 768), "alpha": np.array(2, np.float32)}
WIDE_LOHA = {
    f"hada_w{i}_{half}": numbers(*shape) for i in (1, 2) for half, shape in (("a", (640, 30)), ("b", (30, 768)))
}


def magnitudes_by_input() -> None:
    held = {"lora_up.weight": numbers(6, 2), "lora_down.weight": numbers(2, 4), "alpha": np.array(2, np.float32)}
    sd_file("lora_unet_mid_q", **held, dora_scale=np.ones((1, 4), np.float32))()
    single(Path("UNET"), {"mid.q.weight": numbers(6, 4)})


def beside_dora() -> Adapter:
    loralens.save(Adapter(modules={Q: update(6, 4)}, format="kohya"), Path("K.safetensors"))
    return dora()


def beside_head() -> Adapter:
    loralens.save(Adapter(modules={BLOCK: update(640, 768)}, format="kohya"), Path("K.safetensors"))
    head = {"base_model.model.lm_head.weight": Extra("saved", "lm_head", LazyArray.of(numbers(5, 4)))}
    return Adapter(modules={BLOCK: update(640, 768)}, extra=head)


def weak_for_codes() -> Adapter:
    nf4_base(Path("LOW"))
    return Adapter(modules={name: LowRank(1e-4 * numbers(48, 2), 1e-2 * numbers(2, 128), 1.0) for name in MODULES})


def replaced_beside_codes() -> None:
    nf4_base(Path("LOW"))
    pair_of_first = {f"{MODULES[0]}.lora_A.weight": (4, 128), f"{MODULES[0]}.lora_B.weight": (48, 4)}
    stored(
        "LORA", {**pair_of_first, f"{MODULES[-1]}.weight": (48, 128)}, **PLAIN, modules_to_save=["10.self_attn.v_proj"]
    )()


def unknown_groups() -> None:
    single(Path("CONV"), {"conv.weight": numbers(8, 2, 3, 3), f"{Q}.weight": numbers(6, 4)})
    halves = (("w1_a", 0), ("w1_b", 1), ("w2_a", 0), ("w2_b", 1))
    of_conv = {f"conv.hada_{half}": ((8, 4), (4, 18))[side] for half, side in halves}
    of_q = {f"{Q}.hada_{half}": ((6, 4), (4, 4))[side] for half, side in halves}
    stored("LOHA", {**of_conv, **of_q}, alpha=4, target_modules=["conv", "q_proj"])()


def scales(first: float, second: float, *, rows: float = 1.0) -> Adapter:
    pairs = {name: LowRank(rows * numbers(6, 2), numbers(2, 4), scale) for name, scale in ((Q, first), (V, second))}
    return Adapter(modules=pairs)


def of_keras() -> None:
    Path("A.lora.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + b"0" * 99)
    sharded(Path("TUNED"), {**tensors(), f"{Q}.weight": tensors(seed=1)[f"{Q}.weight"]})


def merged_once() -> None:
    loralens.save(pair(), Path("A"))
    loralens.merge("A", base="BASE", output="M")


def two_in_a_folder() -> None:
    for name in ("F/a", "F/b"):
        loralens.save(pair(), Path(name))


def model_and_texts() -> Adapter:
    pytest.importorskip("transformers")
    models.folder(models.llama(), Path("MODEL"))
    Path("texts.txt").write_text("\n".join(models.TEXTS))
    names = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")
    return Adapter(modules={name: update(16, 16, seed=seed) for seed, name in enumerate(names)})


def loha_to_start_from() -> None:
    model_and_texts()
    shapes = (("w1_a", (16, 4)), ("w1_b", (4, 16)), ("w2_a", (16, 4)), ("w2_b", (4, 16)))
    stored("LOHA", {f"{Q}.hada_{half}": shape for half, shape in shapes}, alpha=4, target_modules=["q_proj"])()


CALIBRATE = "calibrate --model MODEL --adapter A --data texts.txt -o stats.safetensors --overwrite"
COMPRESS = "compress A --rank 1 --activations stats.safetensors -o B"


def moments_of(change: Callable[[], None]) -> Callable[[], Adapter]:
    """An adapter with moments that do not fit it any more."""

    def make() -> Adapter:
        loralens.save(adapter := model_and_texts(), Path("A"))
        assert Command().run(*CALIBRATE.split()).exit_code == 0
        change()
        shutil.rmtree("A")
        return adapter

    return make


def damage_moments() -> None:
    with safe_open("stats.safetensors", "numpy") as file:
        held, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    save_file(held, "stats.safetensors", metadata={key: text[:-1] for key, text in metadata.items()})


def moments_of_another() -> None:
    other = Adapter(modules={"model.layers.0.self_attn.q_proj": update(16, 16, seed=7)})
    loralens.save(other, Path("ELSE"))
    words = CALIBRATE.replace("--adapter A", "--adapter ELSE").split()
    assert Command().run(*words).exit_code == 0


class Case(NamedTuple):
    """A situation that prints a fix which names a command, and what happens when the command is run.

    ``make`` gives the adapter A, or writes it. OTHER is a plain adapter, and BASE its model. ``failing`` ends with
    ``code`` and prints ``words``, which stand in the fix; then every command of ``fix`` succeeds.
    """

    make: Callable[[], Adapter | None]
    failing: str
    words: str
    fix: tuple[str, ...]
    code: int = 2


def rejected(make: Callable[[], Adapter | None], client: str, words: str, fix: str, *, code: int = 1) -> Case:
    """An adapter A that a client would not take, and the command after which it takes B; ``code`` 0: with a warning."""
    then = f"inspect {fix.split()[-1]} --for {client}"
    return Case(make, f"inspect A --for {client}", words, (fix, then), code)


NAMELESS = Adapter(modules={f"zz.{Q}": update(6, 4)})
# A layer that HunyuanVideo has and no other model.
REFINER = "diffusion_model.txt_in.individual_token_refiner.blocks.0.self_attn.qkv"
# `--modules` chooses what is kept, so that it would not do for any of these.
CASES: dict[str, Case] = {
    "mlx has no convolutions": Case(
        lambda: pair(kind="conv", kernel=(1, 1)), "convert A --to mlx -o C", "loralens drop",
        (DROP, "convert B --to mlx -o C"),
    ),
    "loralib has no convolutions": Case(
        lambda: pair(kind="conv", kernel=(1, 1)), "convert A --to loralib -o C.bin", "loralens drop",
        (DROP, "convert B --to loralib -o C.bin"),
    ),
    "kohya has no embeddings": Case(
        lambda: pair(kind="embedding"), "convert A --to kohya -o C.safetensors", "loralens drop",
        (DROP, "convert B --to kohya -o C.safetensors"),
    ),
    "two names become one": Case(
        lambda: pair(Q.replace("self_attn.", "self_attn_")), "convert A --to kohya -o C.safetensors", "loralens drop",
        (DROP.replace(V, Q.replace("self_attn.", "self_attn_")), "convert B --to kohya -o C.safetensors"),
    ),
    "a grouped convolution is combined": Case(
        GROUPED, "combine A A -o C", "loralens drop", (DROP, "combine B A -o C"),
    ),
    "groups of a convolution are not known": Case(
        unknown_groups, "convert A --to peft --rank 2 --base CONV -o C",
        "merge the adapter into its base: loralens merge",
        ("merge A --base CONV -o M",),
    ),
    "mlx needs one rank": Case(
        lambda: Adapter(modules={Q: update(6, 4), V: update(6, 4, rank=3)}), "convert A --to mlx -o C",
        "give them one rank: loralens compress --uniform",
        ("compress A --rank 3 --uniform --force -o B", "convert B --to mlx -o C"),
    ),
    "no rule": Case(
        pair, "compress A -o C", "loralens convert --dtype keeps all ranks", ("convert A --dtype f16 -o B",
        "inspect B"),
    ),
    "other weights than 0 and 1": Case(
        lambda: Adapter(modules={BLOCK: update(640, 768)}, format="kohya"),
        "drop A.safetensors --block-weights IN=0.5 -o C", "use loralens scale for other weights",
        ("scale A.safetensors --block-weights IN=0.5 -o B.safetensors", "inspect B.safetensors"),
    ),
    "which run": Case(pair, "inspect .", "`loralens survey .` lists", ("survey .", "inspect A")),
    "several adapters in a folder": Case(
        two_in_a_folder, "report F -o p.html", "give each: loralens report", ("report F/a F/b -o p.html",),
    ),
    "a file of Keras": Case(
        of_keras, "inspect A.lora.h5", "and use loralens extract", ("extract --base BASE --tuned TUNED --rank 2 -o B",),
    ),
    "a text encoder without its name": Case(
        lambda: Adapter(modules={"text_model.encoder.layers.0.self_attn.q_proj": update(64, 64)}),
        "convert A --to kohya -o B.safetensors", "or say it with loralens convert: --prefix",
        ("convert A --to kohya --prefix text_model.=text_encoder.text_model. -o B.safetensors",),
    ),
    "a layer without its component": Case(
        lambda: Adapter(modules={"transformer.blocks.0.attn1.to_q": update(6, 4), "foo.1.to_q": update(6, 4)}),
        "convert A --to diffusers -o B.safetensors", "say what they belong to with loralens convert: --prefix",
        ("convert A --to diffusers --prefix foo=transformer.foo -o B.safetensors",),
    ),
    "no alpha is small enough": Case(
        lambda: Adapter(modules={BLOCK: LowRank(numbers(640, 2), numbers(2, 768), 1e-60)}),
        "convert A --to kohya -o C.safetensors", "change the strength of the adapter first: loralens scale",
        ("scale A --by 1e40 -o B", "convert B --to kohya -o C.safetensors"),
    ),
    "no float32 is large enough": Case(
        lambda: scales(1e20, 1.0, rows=1e30), "convert A --to gguf --arch gemma -o C.gguf",
        "make the adapter weaker first: loralens scale",
        ("scale A --by 1e-20 -o B", "convert B --to gguf --arch gemma -o C.gguf"),
    ),
    "an update of LyCORIS without factors": Case(
        sd_file(BLOCK, **WIDE_LOHA, alpha=np.array(30, np.float32)), "inspect A.safetensors",
        "make pairs of them: loralens convert --to kohya --rank R",
        ("convert A.safetensors --to kohya --rank 4 -o B.safetensors", "inspect B.safetensors --for sd-scripts"), 0,
    ),
    "names without the prefix": Case(
        bare(), "doctor A --fail-on warning", "loralens convert … --to peft writes the prefix",
        ("convert A --to peft -o B", "doctor B --fail-on warning"), 1,
    ),
    "a LoHa of PEFT": Case(
        LOHA, "inspect A", "for all other programs; with --base if it adapts convolutions",
        ("convert A --to peft --rank 4 -o B", "inspect B --for vllm"), 0,
    ),
    "an update without factors is combined": Case(
        LOHA, "combine A OTHER --method ties -o C", "make it a pair first: loralens convert --rank R",
        ("convert A --rank 4 -o B", "combine B OTHER --method ties -o C"),
    ),
    "intruders of an update without factors": Case(
        LOHA, "intruders A --base BASE --remove 0.5 -o C", "make it a pair first (loralens convert --rank R)",
        ("convert A --rank 4 -o B", "intruders B --base BASE --remove 0.5 -o C"),
    ),
    # Adapters beside each other, and beside their base
    "magnitudes are combined by a method": Case(
        dora, "combine A OTHER --base BASE --method ties -o C",
        "make each a plain pair with loralens merge and extract",
        (
            "combine A OTHER --base BASE --method average -o D", "merge A --base BASE -o M",
            "extract --base BASE --tuned M -o B --rank 4", "combine B OTHER --method ties -o C",
        ),
    ),
    "magnitudes are added without the base": Case(
        dora, "combine A OTHER -o C", "sums are exact then; or loralens merge",
        ("combine A OTHER --base BASE -o C", "merge A --base BASE -o M"),
    ),
    "magnitudes are cut without the base": Case(
        dora, "combine A --rank 1 -o C", "give --base, or cut it with loralens compress",
        ("combine A --rank 1 --base BASE -o C", "compress A --rank 1 -o B"),
    ),
    "magnitudes of another dialect": Case(
        beside_dora, "combine K.safetensors A --base BASE -o C.safetensors",
        "convert the adapters to PEFT first: loralens convert --to peft",
        ("convert K.safetensors --to peft --base BASE -o B", "combine B A --base BASE -o C"),
    ),
    "magnitudes by input are combined": Case(
        magnitudes_by_input, "combine A.safetensors A.safetensors --base UNET -o C.safetensors",
        "merge it into the base with loralens merge", ("merge A.safetensors --base UNET -o M",),
    ),
    "magnitudes are merged twice": Case(
        dora, "merge A A --base BASE -o C", "merge one of the adapters first, and the other into the result",
        ("merge A --base BASE -o B", "merge A --base B -o C"),
    ),
    "biases of factors are combined": Case(
        saved(f"base_model.model.{Q}.lora_B.bias", "lora_bias", Q, 6), "combine A OTHER -o C",
        "convert it to a plain LoRA first: loralens convert --drop-extra",
        ("convert A --drop-extra -o B", "combine B OTHER -o C"),
    ),
    "a head of another dialect": Case(
        beside_head, "combine K.safetensors A -o C.safetensors", "leave them out with --take none",
        ("combine K.safetensors A --take none -o C.safetensors", "combine A K.safetensors -o D"),
    ),
    "names of another model are combined": Case(
        lambda: NAMELESS, "combine A OTHER -o C", "loralens convert --base DIR puts names right",
        ("convert A --to peft --base BASE -o B", "combine B OTHER -o C"),
    ),
    "names of another model are compared": Case(
        lambda: NAMELESS, "similarity A OTHER", "`loralens inspect` shows names and shapes", ("inspect A",
        "inspect OTHER"),
    ),
    "an adapter is merged twice": Case(
        merged_once,
        "merge A --base M -o C", "or undo this merge with loralens unmerge",
        ("unmerge M -o U", "merge A --base U -o D"), 0,
    ),
    "an update is too weak for codes": Case(
        weak_for_codes, "merge A --base LOW --bits keep -o C",
        "serve the adapter unmerged (for llama.cpp: loralens convert --to gguf), or write floats with --dtype bf16",
        ("convert A --to gguf --arch gemma -o B.gguf", "merge A --base LOW --dtype bf16 -o M"), 0,
    ),
    "numbers are replaced in codes": Case(
        replaced_beside_codes, "merge A --base LOW --bits keep -o C",
        "leave what was trained in full out first: loralens convert ADAPTER --drop-extra -o OUT",
        ("convert A --drop-extra -o B", "merge B --base LOW --bits keep -o C", "merge A --base LOW --dtype bf16 -o D"),
    ),
    # What clients take
    "a server of PEFT's files": rejected(
        lambda: Adapter(modules={Q: update(6, 4)}, format="kohya"), "vllm", "loralens convert … --to vllm",
        "convert A.safetensors --to vllm -o B",
    )._replace(failing="inspect A.safetensors --for vllm"),
    "names of PEFT in ComfyUI": rejected(
        stored("LORA",
        {f"{SD_UNET}.lora_A.weight": (4, 768), f"{SD_UNET}.lora_B.weight": (640, 4)}, **PLAIN), "comfyui",
        "loralens convert … --to comfyui", "convert A --to comfyui -o B.safetensors",
    ),
    "names of PEFT in sd-scripts": rejected(
        stored("LORA", {f"{SD_UNET}.lora_A.weight": (4, 768), f"{SD_UNET}.lora_B.weight": (640, 4)}, **PLAIN),
        "sd-scripts", "loralens convert … --to kohya", "convert A --to kohya -o B.safetensors",
    ),
    "names of the original checkpoint in sd-scripts": rejected(
        sd_file("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", **KOHYA_PAIR), "sd-scripts",
        "loralens convert … --to kohya", "convert A.safetensors --to kohya -o B.safetensors",
    )._replace(failing="inspect A.safetensors --for sd-scripts"),
    "a head without the prefix": rejected(
        bare(modules_to_save=["score"], task_type="SEQ_CLS"), "peft", "loralens convert … --to peft writes the prefix",
        "convert A --to peft -o B",
    ),
    "no configuration": rejected(
        without(""), "peft", "loralens convert … --to peft --alpha A writes one", "convert A --to peft --alpha 4 -o B",
    ),
    "no type": rejected(without("peft_type"), "peft", "loralens convert … --to peft writes it",
    "convert A --to peft -o B"),
    "no targets": rejected(
        without("target_modules"), "vllm", "put the fields there: loralens convert … --to peft writes them",
        "convert A --to peft -o B",
    ),
    "an AdaLoRA on a server": rejected(
        stored("ADALORA", {f"{Q}.lora_A": (4, 4), f"{Q}.lora_B": (6, 4), f"{Q}.lora_E": (4, 1)}, **PLAIN), "vllm",
        "makes it one", "convert A --to peft -o B",
    ),
    "an update without factors in llama.cpp": rejected(
        LOHA, "llama.cpp", "loralens convert … --rank R makes them pairs",
        "convert A --to gguf --arch gemma --rank 4 -o B.gguf",
    ),
    "names of another model on a server": Case(
        stored("LORA", {key.removeprefix("model."): shape for key, shape in PAIR.items()}, **PLAIN),
        "inspect A --base BASE --for vllm", "loralens convert … --base DIR writes it under the base's names",
        ("convert A --to peft --base BASE -o B", "inspect B --base BASE --for vllm"), 1,
    ),
    "a head on LoRAX": rejected(
        saved("base_model.model.lm_head.weight", "saved", "lm_head", 5, 4), "lorax",
        "loralens convert … --drop-extra if the base's own serve as well", "convert A --drop-extra -o B",
    ),
    "biases on a server": rejected(
        saved(f"base_model.model.{Q}.bias", "bias", Q, 6), "vllm", "loralens convert … --drop-extra",
        "convert A --drop-extra -o B",
    ),
    "a large rank on LoRAX": rejected(
        lambda: Adapter(modules={Q: update(300, 300, rank=130)}), "lorax",
        "loralens convert … --to lorax reduces its rank", "convert A --to lorax -o B", code=0,
    ),
    "ranks of LoRAX": rejected(
        lambda: Adapter(modules={Q: update(30, 30), Q.replace("0", "1"): update(30, 30, rank=20)}), "lorax",
        "loralens convert … --to lorax pads them to one rank", "convert A --to lorax -o B",
    ),
    "scales of LoRAX": rejected(
        lambda: scales(0.5, 3.0), "lorax", "loralens convert … --to lorax", "convert A --to lorax -o B",
    ),
    "names of a wrapper on a server": rejected(
        stored("LORA", {key.replace("model.", "_orig_mod.model.", 1): shape for key, shape in PAIR.items()}, **PLAIN),
        "vllm", "loralens convert … --to vllm writes the names of the model", "convert A --to vllm -o B",
    ),
    "names of DistributedDataParallel on a server": rejected(
        lambda: Adapter(modules={f"module.{Q}": update(6, 4)}), "vllm",
        "loralens convert … --prefix module.= writes the names of the model", "convert A --prefix module.= -o B",
    ),
    "names of a trainer": Case(
        stored("LORA", {key.replace("model.", "_orig_mod.model.", 1): shape for key, shape in PAIR.items()}, **PLAIN),
        "inspect A", "loralens convert … --to peft writes the names of the model", ("convert A --to peft -o B",), 0,
    ),
    "native names in diffusers": rejected(
        lambda: Adapter(modules={REFINER: update(9216, 3072)}, format="comfyui"), "diffusers",
        "loralens convert … --to diffusers", "convert A --to diffusers -o B",
    ),
    "names without a component in diffusers": Case(
        lambda: Adapter(modules={"proj_in": update(6, 4)}, format="diffusers"), "inspect A --for diffusers",
        "loralens convert … --prefix =transformer. (or =unet.) names it",
        ("convert A --prefix =transformer. -o B", "inspect B --for diffusers"), 1,
    ),
    "scales of llama.cpp": rejected(
        lambda: scales(0.5, 3.0), "llama.cpp", "loralens convert --to gguf folds each scale into B",
        "convert A --to gguf --arch gemma -o B.gguf",
    ),
    "experts of several ranks": rejected(
        lambda: Adapter(modules={f"model.layers.0.mlp.experts.{e}.up_proj": update(6, 4, rank=2 + e) for e in (0, 1)}),
        "peft",
        "give them one rank: loralens compress … --uniform", "compress A --rank 3 --uniform --force -o B",
    ),
    # With a model and texts
    "no moments": Case(
        model_and_texts, COMPRESS, "or measure the moments: loralens calibrate", (CALIBRATE, COMPRESS),
    ),
    "a file without moments": Case(
        moments_of(lambda: save_file({"x": numbers(1)}, "stats.safetensors")), COMPRESS,
        "give the file that loralens calibrate wrote",
        (CALIBRATE.replace("stats", "new"), COMPRESS.replace("stats", "new")),
    ),
    "damaged moments": Case(
        moments_of(damage_moments), COMPRESS, "measure them again: loralens calibrate", (CALIBRATE, COMPRESS),
    ),
    "moments of another adapter": Case(
        moments_of(moments_of_another), COMPRESS, "measure them again with this one: loralens calibrate",
        (CALIBRATE, COMPRESS),
    ),
    "a report with the moments of another adapter": Case(
        moments_of(moments_of_another), "report A --activations stats.safetensors -o p.html",
        "measure them with one of these: loralens calibrate",
        (CALIBRATE, "report A --activations stats.safetensors -o p.html"),
    ),
    "no evaluation": Case(
        lambda: Path("e.json").write_text("{}") and model_and_texts(), "report A --evaluations e.json -o p.html",
        "give a file that `loralens evaluate -o` has written",
        (
            "evaluate A --model MODEL --task causal-lm --data texts.txt -o e.json --overwrite",
            "report A --evaluations e.json -o p.html",
        ),
    ),
    "training starts from an update without factors": Case(
        loha_to_start_from, "train --model MODEL --task causal-lm --data texts.txt --steps 1 --start-from A -o C",
        "give a plain LoRA adapter, such as one that loralens convert has written",
        (
            "convert A --to peft --rank 4 -o B",
            "train --model MODEL --task causal-lm --data texts.txt --steps 1 --start-from B -o C",
        ),
    ),
}  # fmt: skip
TRAINED = tuple(CASES)[-7:]  # those that run a model
# The fixes of the doctor's own checks are run in tests/verbs/test_doctor_fixes.py.
ELSEWHERE = ("analysis/base_checks.py", "analysis/loading_checks.py", "analysis/doctor.py", "reporting/", "cli/")
# Texts that are no fix: the next command of a shortened table, a suggestion in a note, and the name of a file's writer.
NO_FIX = (
    "loralens served",  # tests/serving runs it, against servers
    "compress --rank makes the others fit",
    "`loralens inspect` explains it",
    "loralens fleet",
    'loralens compress {}/"$name"',
    "does not hold the findings of loralens doctor",
    "looks for them",
)


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=pytest.mark.slow) if name in TRAINED else name for name in CASES]
)
def test_a_fix_mends_what_it_is_printed_for(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, failing, words, fix, code = CASES[case]
    monkeypatch.chdir(tmp_path)
    sharded(Path("BASE"), tensors())
    loralens.save(pair(), Path("OTHER"))
    if (adapter := make()) is not None:
        loralens.save(adapter, Path("A.safetensors" if adapter.format == "kohya" else "A"))
    failed = Command().run(*failing.split())
    assert failed.exit_code == code, failed.output
    assert words in failed.output, failed.output
    for command in fix:
        done = Command().run(*command.split())
        assert done.exit_code == 0, (command, done.output)
    # What inspect warned of without an answer "no" is not there any more.
    if code == 0 and command.startswith("inspect"):
        assert words not in done.output


def test_every_fix_that_names_a_command_is_run() -> None:
    named = re.compile(
        rf"(?<![\w./-])loralens ({'|'.join(sorted(dict(commands(main)), key=len, reverse=True)[:-1])})\b"
    )
    unknown = []
    for file in sorted(PACKAGE.rglob("*.py")):
        name = file.relative_to(PACKAGE).as_posix()
        tree = ast.parse(file.read_text(encoding="utf-8"))
        documented = [node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
        prose = [doc for node in documented if (doc := ast.get_docstring(node, clean=False))]
        for line, text in texts(file):
            if named.search(text) and text not in prose and not name.startswith((*ELSEWHERE, *OTHER_WORDS)):
                run = any(part_of(case.words, text) for case in CASES.values())
                unknown += [] if run or any(words in text for words in NO_FIX) else [(name, line, text)]
    assert not unknown


def part_of(words: str, text: str) -> bool:
    """Whether words that were printed are in a text, which may have gaps where something was put in."""
    return words in text or all(part.strip() in words for part in text.split("{}") if part.strip())
