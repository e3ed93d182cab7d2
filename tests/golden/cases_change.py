"""Cases of verbs that write adapters: convert, compress, combine and verbs like it, intruders that are removed."""

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from loralens.arithmetic import METHODS
from tests.golden.call import Call, Case, call
from tests.golden.subjects import CONFORMANCE, EVERY, EXAMPLES, MADE, REAL, TRAINED

DIALECTS = {
    "peft": "peft", "kohya": "kohya.safetensors", "diffusers": "diffusers.safetensors",
    "comfyui": "comfyui.safetensors", "mlx": "mlx", "loralib": "loralib.bin", "gguf": "gguf.gguf",
}  # fmt: skip
ELEMENTWISE = tuple(name for name, row in METHODS.items() if row.spaces)
SPACES = ("full", "knots", "core")
SEEDED = tuple(name for name, row in METHODS.items() if row.seeded)
PAIR = ("made/llama-a", "made/llama-b")
RULES: dict[str, dict[str, Any]] = {
    "rank": {"rank": 1},
    "energy": {"energy": 0.9},
    "error": {"error": 0.3},
    "sv-ratio": {"sv_ratio": 2},
    "sv-cumulative": {"sv_cumulative": 0.9, "rank": 2},
    "half": {"parameters": 0.5},
    "size": {"size": "24KiB"},
    "uniform": {"error": 0.5, "uniform": True},
    "relative": {"parameters": 0.5, "weights": "relative"},
    "bf16": {"rank": 2, "dtype": "bf16"},
}


def _convert() -> Iterator[Case]:
    for subject in EVERY:
        calls: list[Call] = []
        for dialect, name in DIALECTS.items():
            calls.append(call("convert", subject.path, output=f"OUT/{name}", to=dialect, **subject.load))
        calls.append(call("equal", subject.path, "OUT/peft", **subject.load))
        yield Case(f"convert/{subject.path}", tuple(calls))
    for subject in (*TRAINED, *MADE):
        options = {**subject.base_option, **subject.load, "drop_extra": True}
        calls = [call("convert", subject.path, output=f"OUT/{DIALECTS[to]}", to=to, **options) for to in DIALECTS]
        yield Case(f"convert-base/{subject.path}", tuple(calls))
    for subject in CONFORMANCE:
        if subject.path.startswith("conformance/lycoris"):
            calls = [
                call("convert", subject.path, output="OUT/peft", to="peft", rank=2),
                call("convert", subject.path, output="OUT/half.safetensors", to="kohya", rank=1, dtype="f16"),
            ]
            yield Case(f"convert-rank/{subject.path}", tuple(calls))
    yield Case(
        "convert/options",
        (
            call("convert", "made/llama-a", output="OUT/a", to="peft", dtype="bf16"),
            call("convert", "made/llama-a", output="OUT/b", to="peft", prefix="model.layers=layers", json=False),
            call("convert", "made/llama-a", output="OUT/c", to="gguf", arch="llama", dry_run=True),
            call("convert", "made/llama-a", output="OUT/a", to="peft"),
            call("convert", "made/llama-a", output="OUT/a", to="peft", overwrite=True, allow_loss=True),
            call("convert", "OUT/a", output="OUT/d.safetensors", to="kohya", json=False),
        ),
    )


def _compress() -> Iterator[Case]:
    for subject in (
        "made/llama-a",
        "trained/llama-dora",
        "trained/unet-kohya/trained.safetensors",
        "trained/gpt2-conv1d",
    ):
        for rule, options in RULES.items():
            target = "OUT/small.safetensors" if "kohya" in subject else "OUT/small"
            made = call("compress", subject, output=target, **options)
            yield Case(
                f"compress-{rule}/{subject}", (made, call("compress", subject, dry_run=True, json=False, **options))
            )
    for subject in (*CONFORMANCE, *TRAINED, *EXAMPLES[:3], *MADE, *REAL):
        end = PurePosixPath(subject.path).suffix
        targets = {None: f"OUT/own{end}", "peft": "OUT/peft"}
        calls = (
            call("compress", subject.path, output=target, energy=0.9, to=to, **subject.load)
            for to, target in targets.items()
        )
        yield Case(f"compress/{subject.path}", tuple(calls))
    for subject in EXAMPLES[:3]:
        yield Case(f"compress-half/{subject.path}", (call("compress", subject.path, output="OUT/s", **RULES["half"]),))
    yield Case(
        "compress/options",
        (
            call("compress", "made/llama-a", output="OUT/a", rank=1, modules="q_proj", json=False),
            call("compress", "made/llama-a", output="OUT/b.svg", parameters=0.4, weights="made/weights.json"),
            call("compress", "made/llama-a", output="OUT/c", parameters=6, drop_dead=True),
            call("compress", "made/llama-a", output="OUT/d", rank=1, plot="OUT/loss.svg"),
            call("compress", "made/llama-a", output="OUT/e.gguf", rank=1, to="gguf", base="made/llama"),
            call("compress", "trained/llama-dora", output="OUT/f", rank=1, base="made/base-llama"),
            call("compress", "made/llama-a", output="OUT/g", size="10B"),
        ),
    )


def _combine() -> Iterator[Case]:
    for method in METHODS:
        for space in SPACES if method in ELEMENTWISE else (None,):
            options = {"method": method, "space": space, "seed": 7 if method in SEEDED else None}
            calls = (
                call("combine", *PAIR, output="OUT/two", **options),
                call("combine", f"{PAIR[0]}:0.7", f"{PAIR[1]}:0.4", output="OUT/cut", rank=2, **options),
            )
            yield Case(f"combine/{method}{f'-{space}' if space else ''}", calls)
    three = ("made/llama-a", "made/llama-b:0.5", "made/llama-c:0.8")
    of_three = (call("combine", *three, output=f"OUT/{name}", method=name) for name in METHODS if name != "slerp")
    yield Case("combine/three", tuple(of_three))
    experts = ("trained/mixtral-experts", "trained/mixtral-experts:0.5")
    elected = call("combine", *experts, method="ties", dry_run=True)
    yield Case("combine/experts", (call("combine", *experts, output="OUT/e"), elected))
    dora = ("trained/llama-dora", "trained/llama-dora:0.5")
    yield Case("combine/dora", (call("combine", *dora, output="OUT/d", base="made/base-llama"),))
    runs = [f"trained/bert-rslora-run/checkpoint-{step}" for step in (20, 40, 60)]
    mean = call("combine", *runs, output="OUT/run", method="average", take=runs[2])
    yield Case("combine/run", (mean,))
    heads = (EXAMPLES[0].path, EXAMPLES[1].path)
    yield Case(
        "combine/examples",
        (
            call("combine", *heads, output="OUT/a", take=heads[0], rank=8),
            call(
                "combine", *heads, output="OUT/b", take="none", method="ties", density=0.3, space="core", dtype="bf16"
            ),
        ),
    )
    yield Case(
        "combine/options",
        (
            call("combine", recipe="made/recipe.toml", output="OUT/recipe"),
            call("combine", recipe="OUT/recipe", output="OUT/again"),
            call(
                "combine", *PAIR, output="OUT/tuned", method="ties", set=["whole=0"], **{"lambda": 1.3, "density": 0.4}
            ),
            call("combine", *PAIR, output="OUT/q.safetensors", to="kohya", modules="q_proj", energy=0.9, json=False),
            call("combine", *PAIR, dry_run=True, size="4KiB", uniform=True),
            call("combine", *PAIR, method="nonsense", output="OUT/none"),
            call("combine", PAIR[0], f"{PAIR[0]}:-1", output="OUT/zero", drop_dead=True),
        ),
    )


def _elementary() -> Iterator[Case]:
    subjects = (*TRAINED, *MADE, EXAMPLES[0])
    for subject in subjects:
        path = subject.path
        load = subject.load | (subject.base_option if "dora" in path else {})
        end = ".safetensors" if "kohya" in path else ""
        first = "*layers.0.*" if "mixtral" in path else "*0*"  # of a stack of experts all go or none
        calls = (
            call("negate", path, output=f"OUT/negated{end}", **load),
            call("scale", path, by=0.3, output=f"OUT/scaled{end}", **load),
            call("subtract", path, f"OUT/scaled{end}", output=f"OUT/rest{end}", **load),
            call("interpolate", path, f"OUT/negated{end}", at=0.25, output=f"OUT/between{end}", **load),
            call("drop", path, modules=first, output=f"OUT/dropped{end}", **load),
            call("scale", path, by=1e-5, dtype="f16", output=f"OUT/lost{end}", **load),
        )
        yield Case(f"elementary/{path}", calls)
    a, b = PAIR
    yield Case(
        "elementary/options",
        (
            call("negate", a, modules="q_proj", output="OUT/n", json=False),
            call("scale", a, by=0, output="OUT/zero", to="kohya", json=False),
            call("subtract", a, b, output="OUT/s", modules="v_proj", json=False),
            call("interpolate", a, b, at=1.5, output="OUT/i", dtype="bf16", json=False),
            call("drop", a, modules="v_proj", output="OUT/d", to="gguf", base="made/llama", json=False),
            call("subtract", a, a, output="OUT/nothing", drop_dead=True),
            call("drop", a, modules="nonsense", output="OUT/e"),
            call("negate", a, dry_run=True),
        ),
    )


def _intruders() -> Iterator[Case]:
    for subject in (*TRAINED, *MADE):
        options = {**subject.base_option, **subject.load}
        calls = (
            call("intruders", subject.path, no_cache=True, **options),
            call("intruders", subject.path, top=3, threshold=0.9, cache="OUT/cache", **options),
            call("intruders", subject.path, top=3, threshold=0.9, cache="OUT/cache", json=False, **options),
            call(
                "intruders",
                subject.path,
                remove=0.5,
                output="OUT/mended",
                uniform="mlx" in subject.path,
                no_cache=True,
                **options,
            ),
        )
        yield Case(f"intruders/{subject.path}", calls)
    for subject in (EXAMPLES[0], REAL[2]):
        looked = call("intruders", subject.path, base="minilm", no_cache=True, modules="*layer.0.*query", top=5)
        yield Case(f"intruders/{subject.path}", (looked,))


CASES = (*_convert(), *_compress(), *_combine(), *_elementary(), *_intruders())
