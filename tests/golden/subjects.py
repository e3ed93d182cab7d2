"""Subjects: the adapters that cases are about, with what their files leave open and the bases they belong to."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.golden.sources import ROOT

MARKS = ("expected.safetensors", "load.json")


@dataclass(frozen=True)
class Subject:
    """An adapter's path in the folder of a run, the options that loading it takes, and its base if there is one."""

    path: str
    load: dict[str, Any] = field(default_factory=dict)
    base: str | None = None

    @property
    def base_option(self) -> dict[str, str]:
        """The base as an option, where there is one."""
        return {"base": self.base} if self.base else {}


TRAINED = (
    Subject("trained/gpt2-conv1d", base="made/base-gpt2"),
    Subject("trained/bert-rslora-run/checkpoint-60", base="made/base-bert"),
    Subject("trained/bloom-merged", base="made/base-bloom"),
    Subject("trained/llama-dora", base="made/base-llama"),
    Subject("trained/llama-mlx", base="made/base-llama"),
    Subject("trained/mixtral-experts", base="made/base-mixtral"),
    Subject("trained/opt-bf16-partly-zero", base="made/base-opt"),
    Subject("trained/roberta-loralib", {"alpha": 8}, "made/base-roberta"),
    Subject("trained/unet-kohya/trained.safetensors", base="made/base-unet"),
    Subject("trained/unet-diffusers", base="made/base-unet"),
)

EXAMPLES = tuple(
    Subject(f"examples/{name}", base="minilm")
    for name in (
        "20newsgroups-r8-seed0", "20newsgroups-r8-seed1", "20newsgroups-r64-seed0", "reuters-r8-r8-seed0",
        "reuters-r8-r64-seed0", "tweet-sentiment-r8-seed0",
    )
)  # fmt: skip

MADE = (
    Subject("made/small-a", base="made/base-bf16"),
    Subject("made/llama-a", base="made/llama"),
    Subject("made/llama-tied-a", base="made/llama-tied"),
    Subject("made/bert-a", base="made/bert"),
    Subject("made/faint", base="made/base-bf16"),
)

_MINILM = ("minilm-souravt-ckpt100", "minilm-souravt-ckpt400", "minilm-souravt-ckpt750", "minilm-souravt-finetuned")
REAL = (
    *(Subject(f"real/{name}", base="minilm") for name in _MINILM),
    *(
        Subject(f"real/{name}")
        for name in (
            "flux-aitoolkit-r16", "gemma270m-aowei-main", "gemma270m-zouhe0", "gpt2-emotion-anirudh",
            "labram-eeg-partialzero", "opt125m-bf16-r16", "qwen05b-mlx-100", "qwen05b-peft-r8",
            "roberta-agnews-biasall", "sam-vitb-rank2", "sam-vitb-rank4", "sam-vitb-rank8", "sam-vitb-rank16",
            "sd15-cloneofsimo-disney-r1", "sd15-diffusers-processor", "sd15-timohavdk-diffusers",
            "sd15-timohavdk-kohya", "neg-2byte", "neg-lfs-pointer",
        )
    ),
    *(
        Subject(f"real/{name}")
        for name in ("bertbase-rslora-epoch2", "bloom560m-mergedlinear", "neg-prompt-tuning")
    ),
    Subject("real/roberta-mnli-loralib", {"alpha": 16}),
)  # fmt: skip


def _conformance() -> tuple[Subject, ...]:
    """One adapter of every dialect, with what its ``load.json`` says."""
    subjects = []
    for folder in sorted((ROOT / "tests" / "conformance").iterdir()):
        if (folder / MARKS[0]).is_file():
            weights = [path for path in folder.iterdir() if path.name not in MARKS and path.suffix != ".json"]
            subjects.append(Subject(f"conformance/{folder.name}/{weights[0].name}", _load_options(folder / MARKS[1])))
    return tuple(subjects)


def _load_options(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.is_file() else {}


CONFORMANCE = _conformance()
EVERY = (*CONFORMANCE, *TRAINED, *EXAMPLES, *MADE, *REAL)
