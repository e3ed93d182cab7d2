"""Cases of verbs that write models and read what was written into them: merge, unmerge, verify, extract."""

from collections.abc import Iterator
from typing import Any

from tests.golden.call import Case, call
from tests.golden.subjects import EXAMPLES, MADE, REAL, TRAINED

BASES = ("made/base-f32", "made/base-f16", "made/base-bf16", "made/base-shards")
ROUNDINGS: dict[str, dict[str, Any]] = {
    "nearest": {"rounding": "nearest"},
    "stochastic": {"rounding": "stochastic", "seed": 5},
    "feedback": {"rounding": "feedback"},
}
RULES: dict[str, dict[str, Any]] = {
    "rank": {"rank": 2},
    "energy": {"energy": 0.9},
    "error": {"error": 0.2},
    "sv-ratio": {"sv_ratio": 3},
    "count": {"parameters": 200},
    "size": {"size": "4KiB"},
    "noise-edge": {"noise_edge": "rounding"},
    "median": {"noise_edge": "median"},
    "uniform": {"rank": 3, "uniform": True, "exact": True, "dtype": "bf16"},
}


def _merge() -> Iterator[Case]:
    for base in BASES:
        for name, options in ROUNDINGS.items():
            calls = (
                call("merge", "made/small-a", "made/faint:0.5", base=base, output="OUT/merged", **options),
                call("verify", "OUT/merged", base=base, adapter=["made/small-a", "made/faint:0.5"], **options),
                call("verify", "OUT/merged", base=base, adapter="made/small-b", json=False, **options),
                call("unmerge", "OUT/merged", output="OUT/base"),
                call(
                    "unmerge", "OUT/merged", adapter=["made/small-a", "made/faint:0.5"], output="OUT/near", json=False
                ),
            )
            yield Case(f"merge-{name}/{base}", calls)
    for dtype in ("f32", "bf16", "f16"):
        merged = call("merge", "made/small-a", base="made/base-bf16", output="OUT/merged", dtype=dtype)
        yield Case(f"merge-dtype/{dtype}", (merged, call("unmerge", "OUT/merged", output="OUT/base")))
    for subject in (*TRAINED, *MADE):
        options = {**subject.base_option, **subject.load}
        calls = (
            call("merge", subject.path, output="OUT/merged", **options),
            call("verify", "OUT/merged", adapter=subject.path, **options),
            call("unmerge", "OUT/merged", output="OUT/base"),
            call("merge", subject.path, dry_run=True, json=False, output="OUT/dry", **options),
        )
        yield Case(f"merge/{subject.path}", calls)
    for subject in (EXAMPLES[0], REAL[2]):
        calls = (
            call("merge", subject.path, base="minilm", output="OUT/merged", modules="*layer.0.*query"),
            call("verify", "OUT/merged", base="minilm", adapter=subject.path, modules="*layer.0.*query"),
        )
        yield Case(f"merge/{subject.path}", calls)
    layer = "*layer.0.*"
    whole = call("merge", EXAMPLES[2].path, base="minilm", output="OUT/merged", rounding="feedback", dtype="bf16")
    found = call("extract", base="minilm", tuned="OUT/merged", output="OUT/found", rank=8, modules=layer)
    yield Case("merge/whole", (whole, found, call("unmerge", "OUT/merged", output="OUT/base")))
    small = {"base": "made/base-bf16", "output": "OUT/merged"}
    yield Case(
        "merge/options",
        (
            call("merge", "made/small-a", undo="none", certificate="none", json=False, **small),
            call("merge", "made/small-a", **small),
            call("merge", "made/small-a:2", overwrite=True, undo="OUT/back.undo", certificate="OUT/c.json", **small),
            call("unmerge", "OUT/merged", undo="OUT/back.undo", output="OUT/base", json=False),
            call("merge", "made/small-a", base="OUT/merged", output="OUT/twice", modules="q_proj"),
            call("merge", "made/llama-a", allow_missing=True, base="made/base-f32", output="OUT/missing"),
            call("merge", "made/bert-a", base="made/base-f32", output="OUT/wrong"),
        ),
    )
    yield Case(
        "merge/tied",
        (
            call("merge", "made/llama-tied-a", base="made/llama-tied", output="OUT/untied", untie=True),
            call("merge", "made/llama-tied-a", base="made/llama-tied", output="OUT/tied", keep_tied=True),
        ),
    )


def _extract() -> Iterator[Case]:
    merged = call("merge", "made/llama-a", base="made/llama", output="OUT/tuned", dtype="bf16", undo="none")
    for name, options in RULES.items():
        calls = (
            merged,
            call("extract", base="made/llama", tuned="OUT/tuned", output="OUT/found", **options),
            call("equal", "made/llama-a", "OUT/found", tolerance=0.1),
        )
        yield Case(f"extract/{name}", calls)
    for subject in (*TRAINED, MADE[3]):
        made = call("merge", subject.path, output="OUT/tuned", undo="none", **subject.base_option, **subject.load)
        found = call("extract", tuned="OUT/tuned", output="OUT/found", rank=4, **subject.base_option)
        yield Case(f"extract/{subject.path}", (made, found))
    pair = {"base": "made/llama", "tuned": "OUT/tuned"}
    yield Case(
        "extract/options",
        (
            merged,
            call("extract", rank=2, dry_run=True, json=False, **pair),
            call("extract", rank=2, output="OUT/k.safetensors", to="kohya", modules="q_proj", **pair),
            call("extract", output="OUT/x", drop_extra=True, noise_edge="rounding", modules="*", **pair),
            call("extract", rank=2, output="OUT/same", base="made/llama", tuned="made/llama"),
        ),
    )


CASES = (*_merge(), *_extract())
