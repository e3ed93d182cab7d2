"""What the texts of the package advise: commands and options exist, and a ``fix`` mends what it is printed for."""

import ast
import json
import re
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

import loralens
from loralens.cli.main import main
from loralens.core.adapter import Adapter, Extra
from loralens.core.lazy import LazyArray
from loralens.core.lowrank import Layout, LowRank
from tests.bases import sharded, tensors

PACKAGE = Path(loralens.__file__).parent
# These name words of other programs: options that a user may try, and style sheets.
OTHER_WORDS = ("cli/usage_hints.py", "cli/derive.py", "reporting/html.py", "reporting/page/", "charts/")
# Options of other programs: vLLM, sd-scripts, torchrun, pip and llama.cpp.
FOREIGN = {"--max-lora-rank", "--runner", "--concat", "--nproc-per-node", "--no-deps", "--python", "--lora"}
# Options of earlier releases, in messages about the files that they wrote.
FORMER = {"--undo-kind"}


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
    options = set().union(*known.values()) | FOREIGN | FORMER
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
    rng = np.random.default_rng(seed)
    B, A = (rng.standard_normal(shape).astype(np.float32) for shape in ((out, rank), (rank, in_)))
    return LowRank(B, A, 0.5, layout=Layout(kind, **layout))  # type: ignore[arg-type]


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
        arrays = {f"base_model.model.{name}": rng.standard_normal(n).astype(np.float32) for name, n in tensors.items()}
        Path("A").mkdir()
        save_file(arrays, "A/adapter_model.safetensors")
        Path("A/adapter_config.json").write_text(json.dumps({"peft_type": peft_type, "r": 4, **fields}))

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
DROP = f"drop A -m {V} -o B"
# The adapter A, the command that fails, the words of its fix, the command that the fix names, and the command that
# works then; OTHER is a plain adapter. `--modules` chooses what is kept, so that it would not do for any of these.
CASES: dict[str, tuple[Callable[[], Adapter | None], str, str, str, str]] = {
    "mlx has no convolutions": (
        lambda: pair(kind="conv", kernel=(1, 1)), "convert A --to mlx -o C", "loralens drop", DROP,
        "convert B --to mlx -o C",
    ),
    "loralib has no convolutions": (
        lambda: pair(kind="conv", kernel=(1, 1)), "convert A --to loralib -o C.bin", "loralens drop", DROP,
        "convert B --to loralib -o C.bin",
    ),
    "kohya has no embeddings": (
        lambda: pair(kind="embedding"), "convert A --to kohya -o C.safetensors", "loralens drop", DROP,
        "convert B --to kohya -o C.safetensors",
    ),
    "two names become one": (
        lambda: pair(Q.replace("self_attn.", "self_attn_")), "convert A --to kohya -o C.safetensors", "loralens drop",
        DROP.replace(V, Q.replace("self_attn.", "self_attn_")), "convert B --to kohya -o C.safetensors",
    ),
    "a grouped convolution is combined": (
        GROUPED, "combine A A -o C", "loralens drop", DROP, "combine B A -o C",
    ),
    "mlx needs one rank": (
        lambda: Adapter(modules={Q: update(6, 4), V: update(6, 4, rank=3)}), "convert A --to mlx -o C",
        "loralens compress --uniform", "compress A --rank 2 --uniform -o B", "convert B --to mlx -o C",
    ),
    "no rule": (pair, "compress A -o C", "loralens convert --dtype", "convert A --dtype f16 -o B", "inspect B"),
    "other weights than 0 and 1": (
        lambda: Adapter(modules={BLOCK: update(640, 768)}, format="kohya"),
        "drop A.safetensors --block-weights IN=0.5 -o C", "loralens scale",
        "scale A.safetensors --block-weights IN=0.5 -o B.safetensors", "inspect B.safetensors",
    ),
    "which run": (pair, "inspect .", "loralens survey", "survey .", "inspect A"),
    "magnitudes are combined": (
        dora, "combine A OTHER --method ties -o C", "loralens", "convert A --drop-extra -o B",
        "combine B OTHER --method ties -o C",
    ),
    "magnitudes are merged twice": (
        dora, "merge A A --base BASE -o C", "merge one of the adapters first, and the other into the result",
        "merge A --base BASE -o B", "merge A --base B -o C",
    ),
    "an update without factors is combined": (
        LOHA, "combine A OTHER --method ties -o C", "loralens convert --rank R", "convert A --rank 4 -o B",
        "combine B OTHER --method ties -o C",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_fix_mends_what_it_is_printed_for(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, failing, words, fix, working = CASES[case]
    monkeypatch.chdir(tmp_path)
    if (adapter := make()) is not None:
        loralens.save(adapter, Path("A.safetensors" if adapter.format == "kohya" else "A"))
    loralens.save(pair(), Path("OTHER"))
    sharded(Path("BASE"), tensors())
    failed = CliRunner().invoke(main, failing.split())
    assert failed.exit_code == 2, failed.output
    assert words in failed.stderr.partition("fix: ")[2], failed.stderr
    for command in (fix, working):
        done = CliRunner().invoke(main, command.split())
        assert done.exit_code == 0, (command, done.output)
