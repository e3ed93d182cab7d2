"""Cases on a terminal of 80 × 24: what a screen shows, without colours and with them."""

from collections.abc import Iterator

from tests.golden.call import Call, Case, call

WIDE = "examples/20newsgroups-r64-seed0"
LOOKED_AT = {
    "inspect": call("inspect", WIDE, json=False),
    "path": Call("", (WIDE,)),
    "folder": Call("", ("examples",)),
    "folder of image adapters": Call("", ("conformance",)),
    "several": call("inspect", WIDE, WIDE, WIDE, json=False),
    "spectrum": call("spectrum", WIDE, json=False),
    "compress": call("compress", WIDE, rank=4, output="OUT/small", json=False),
    "doctor": call("doctor", WIDE, json=False),
    "similarity": call("similarity", WIDE, "examples/20newsgroups-r8-seed0", json=False),
    "explain": call("explain", "made/words/cat", base="made/llama-decided", data="made/texts.jsonl", json=False),
    "nothing": Call(""),
    "error": call("spectrum", WIDE, modules="qurey", json=False),
    "usage": call("merge", WIDE, json=False),
    "warning": call("doctor", "trained/roberta-loralib", json=False),
}


def _screens() -> Iterator[Case]:
    for name, looked_at in LOOKED_AT.items():
        calls = (Call(looked_at.verb, looked_at.inputs, looked_at.options, terminal=how) for how in ("plain", "colour"))
        yield Case(f"screen/{name}", tuple(calls))


CASES: tuple[Case, ...] = tuple(_screens())
