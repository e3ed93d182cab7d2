"""Cases of verbs that look: inspect, equal, spectrum, similarity, trajectory, survey, amplify, doctor, curve, report"""

from collections.abc import Iterator

from tests.golden.call import Case, call
from tests.golden.subjects import CONFORMANCE, EVERY, EXAMPLES, MADE, REAL, TRAINED, Subject

CONSUMERS = (
    "vllm", "sglang", "llama.cpp", "ollama", "tensorrt-llm", "lorax", "mlx", "comfyui", "sd-scripts", "diffusers",
    "peft",
)  # fmt: skip
SORTS = ("frobenius", "spectral", "nuclear", "numerical_rank", "stable_rank", "effective_rank", "participation_ratio")
SEEDS = ("examples/20newsgroups-r8-seed0", "examples/20newsgroups-r8-seed1")
RANKS = (SEEDS[0], "examples/20newsgroups-r64-seed0")
RUNS = {
    "trained-bert": ("trained/bert-rslora-run",),
    "trained-mlx": ("trained/llama-mlx",),
    "minilm": tuple(f"real/minilm-souravt-ckpt{step}" for step in (100, 400, 750)),
}
PAIRS = {
    "seeds": SEEDS,
    "ranks": RANKS,
    "tasks": ("examples/reuters-r8-r8-seed0", "examples/tweet-sentiment-r8-seed0"),
    "made": ("made/llama-a", "made/llama-b"),
    "gemma": ("real/gemma270m-aowei-main", "real/gemma270m-zouhe0"),
    "dialects": ("real/sd15-timohavdk-diffusers", "real/sd15-timohavdk-kohya"),
    "qwen": ("real/qwen05b-mlx-100", "real/qwen05b-peft-r8"),
    "sam": ("real/sam-vitb-rank2", "real/sam-vitb-rank16"),
    "trained": ("trained/unet-kohya/trained.safetensors", "trained/unet-diffusers"),
}


def _inspect() -> Iterator[Case]:
    for subject in EVERY:
        load = subject.load
        yield Case(f"inspect/{subject.path}", (call("inspect", subject.path, **load),))
    for subject in (*CONFORMANCE, *TRAINED, *MADE):
        calls = (call("inspect", subject.path, consumer=name, **subject.load) for name in CONSUMERS)
        yield Case(f"inspect-for/{subject.path}", tuple(calls))
    for subject in (*TRAINED, *MADE, *EXAMPLES):
        text = call("inspect", subject.path, json=False, **subject.base_option, **subject.load)
        base = call("inspect", subject.path, **subject.base_option, **subject.load)
        yield Case(f"inspect-base/{subject.path}", (base, text))
    yield Case(
        "inspect/options",
        (
            call("inspect", "made/llama-a", modules="q_proj"),
            call("inspect", "made/llama-a", "made/small-a", json=False),
            call("inspect", "trained/roberta-loralib"),
            call("inspect", "trained/roberta-loralib"),
            call("inspect", "made/missing"),
            call("inspect", "conformance/kohya-locon/adapter_model.safetensors", format="kohya", once=True),
            call("inspect", "conformance/loralib-plain/adapter_model.bin", scale=0.5),
        ),
    )


def _spectrum() -> Iterator[Case]:
    for subject in EVERY:
        json = call("spectrum", subject.path, **subject.load)
        yield Case(
            f"spectrum/{subject.path}", (json, call("spectrum", subject.path, json=False, csv=True, **subject.load))
        )
    for subject in (*TRAINED, *MADE, *EXAMPLES[:2]):
        options = {**subject.base_option, **subject.load}
        calls = (call("spectrum", subject.path, **options), call("spectrum", subject.path, json=False, **options))
        yield Case(f"spectrum-base/{subject.path}", calls)
    sorts = (call("spectrum", SEEDS[0], sort=name, top=3, json=False, csv=True) for name in SORTS)
    yield Case("spectrum/sorts", tuple(sorts))
    plots = (call("spectrum", "made/llama-a", plot=f"OUT/spectrum.{end}") for end in ("png", "svg", "pdf"))
    yield Case("spectrum/plots", (*plots, call("spectrum", *SEEDS, modules="query", plot="OUT/two.svg")))


def _similarity() -> Iterator[Case]:
    for name, pair in PAIRS.items():
        calls = [call("similarity", *pair), call("similarity", *pair, json=False)]
        if name in ("seeds", "made", "gemma"):
            calls += [call("similarity", *pair, of=half) for half in ("A", "B")]
            calls += [call("similarity", *pair, side="out", phi_rank=2)]
        yield Case(f"similarity/{name}", tuple(calls))
        options = {"load": call("equal", *pair), "text": call("equal", *pair, json=False, tolerance=0.5)}
        yield Case(f"equal/{name}", tuple(options.values()))
    for subject in (*TRAINED, *MADE, EXAMPLES[0]):
        yield Case(f"similarity-alone/{subject.path}", (call("similarity", subject.path, **subject.load),))
        yield Case(f"equal/{subject.path}", (call("equal", subject.path, subject.path, **subject.load),))
    paths = [subject.path for subject in EXAMPLES]
    many = (call("similarity", *paths), call("similarity", *paths, of="A"), call("similarity", *paths, json=False))
    yield Case("similarity-many/examples", many)
    few = ("made/llama-a", "made/llama-b", "made/llama-c")
    plots = (call("similarity", *few[:n], plot=f"OUT/{n}.{end}") for n in (1, 2, 3) for end in ("svg", "png"))
    yield Case("similarity/plots", (*plots, call("similarity", *few)))


def _trajectory() -> Iterator[Case]:
    for name, run in RUNS.items():
        calls = (call("trajectory", *run, plot="OUT/run.svg"), call("trajectory", *run, json=False))
        yield Case(f"trajectory/{name}", calls)


def _survey() -> Iterator[Case]:
    for folder in ("conformance", "trained", "examples", "real"):
        calls = (
            call("survey", folder),
            call("survey", folder, json=False, csv=True),
            call("survey", folder, json=False),
            call("survey", folder, content=True),
        )
        yield Case(f"survey/{folder}", calls)


def _amplify() -> Iterator[Case]:
    for subject in (*TRAINED, *MADE, EXAMPLES[0], REAL[2]):
        options = {**subject.base_option, **subject.load}
        calls = [call("amplify", subject.path, **options)]
        if subject.base != "minilm":
            calls += [
                call("amplify", subject.path, json=False, no_top=True, **options),
                call("amplify", subject.path, exact=True, rank=[1, 2], directions=2, seed=3, **options),
            ]
        yield Case(f"amplify/{subject.path}", tuple(calls))
    plot = call("amplify", "made/llama-a", base="made/llama", phi_rank=2, plot="OUT/amplify.svg")
    yield Case("amplify/plot", (plot,))


def _doctor() -> Iterator[Case]:
    for subject in EVERY:
        yield Case(f"doctor/{subject.path}", (call("doctor", subject.path, **subject.load),))
    for subject in (*TRAINED, *MADE, *EXAMPLES[:2], *REAL[:1]):
        options = {**subject.base_option, **subject.load}
        calls = [call("doctor", subject.path, **options)]
        if subject.base != "minilm":
            calls += [
                call("doctor", subject.path, json=False, sarif="OUT/doctor.sarif", fail_on="warning", **options),
                call("doctor", subject.path, dtype="fp8", rounding="stochastic", **options),
            ]
        yield Case(f"doctor-base/{subject.path}", tuple(calls))
    yield Case("doctor/several", (call("doctor", *(subject.path for subject in EXAMPLES)),))
    mixed = ("made/small-a", "made/llama-a", "made/bert-a", "made/missing")
    yield Case("doctor/mixed", (call("doctor", *mixed, fail_on="error"), call("doctor", *mixed, json=False)))


def _curve() -> Iterator[Case]:
    for subject in (*CONFORMANCE, *TRAINED, *MADE, EXAMPLES[0], *REAL[:6]):
        yield Case(f"curve/{subject.path}", (call("curve", subject.path, **subject.load),))
    yield Case(
        "curve/options",
        (
            call("curve", "made/llama-a", json=False, plot="OUT/curve.svg"),
            call("curve", "made/llama-a", to="kohya", dtype="bf16", weights="relative"),
            call("curve", "made/llama-a", weights="made/weights.json", modules="*proj"),
            call("curve", "made/llama-a", to="gguf", base="made/llama"),
        ),
    )


def _report() -> Iterator[Case]:
    for subject in (*TRAINED, *MADE):
        options = {**subject.base_option, **subject.load}
        yield _page(subject, markdown=True, intruders=True, **options)
    yield _page(EXAMPLES[0], markdown=True)
    yield _page(EXAMPLES[3], base="minilm", no_intruders=True)
    run = call("report", "trained/bert-rslora-run", output="OUT/run.html", markdown=True)
    yield Case("report/run", (run,))
    for name in ("seeds", "made", "gemma"):
        yield Case(f"report/{name}", (call("report", *PAIRS[name], output="OUT/page.html", markdown=name == "made"),))


def _page(subject: Subject, **options: object) -> Case:
    return Case(f"report/{subject.path}", (call("report", subject.path, output="OUT/page.html", **options),))


def _explain() -> Iterator[Case]:
    options = {"base": "made/llama-decided", "data": "made/texts.jsonl", "threads": 1}
    cat, tree = "made/words/cat", "made/words/tree"
    yield Case(
        "explain",
        (
            call("explain", cat, samples=0, **options),
            call("explain", cat, json=False, samples=2, **options),
            call("explain", cat, siblings=tree, samples=0, **options),
            call("explain", cat, base="made/llama-decided", weights_only=True),
            call("explain", "made/llama-a", **options),
            call("explain", "made/bert-a", base="made/bert"),
            call("explain", "made/llama-tied-a", base="made/bert"),
            call("fleet", "index", "made/words", output="OUT/index"),
            call("fleet", "explain", json=False, base="made/llama-decided", fleet="OUT/index", forward=True, threads=1),
        ),
    )


CASES = (
    *_inspect(), *_spectrum(), *_similarity(), *_trajectory(), *_survey(), *_amplify(), *_doctor(), *_curve(),
    *_report(), *_explain(),
)  # fmt: skip
