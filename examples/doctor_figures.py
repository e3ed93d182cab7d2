"""How often every finding of `loralens doctor` is raised, and how often rightly: reports/doctor_figures.md.

    python examples/doctor_figures.py FOLDER      FOLDER has one adapter in each folder; the table replaces the old one

Real adapters: a finding is right if `REASONS` names the adapter and what is wrong with it. That table was written by
hand, after the configurations, the logs of training and the tensors were read.

Injected faults: every fault of `FAULTS` is made in eight adapters that are in order. A finding that the same adapter
did not have before is right if the fault is one that the code is about. "Found" counts the cases in which the code was
raised among those in which such a fault was made.

The script ends with 1 if a code does not earn its level. A warning needs ten raised cases in all, nine of ten of them
right among real and among injected cases, and a fix for each. Errors state what is in the files, and need the same
share of right ones. Notes need nothing.
"""

import json
import logging
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

import loralens
from loralens.analysis.doctor import diagnosis_codes

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "reports" / "doctor_figures.md"
START, END = "<!-- figures: examples/doctor_figures.py -->", "<!-- end of figures -->"
LEVELS = ("error", "warning", "note")
CASES, SHARE = 10, 0.9
OWN = ("20newsgroups-r8-seed0", "reuters-r8-r8-seed0", "tweet-sentiment-r8-seed0")
OTHERS = (
    "Day21-Track3-Finetuning-__r8",
    "GPTLoRA__lora-model",
    "gemma3-270m-svg-lora-par__adapter",
    "lora-imdb-distilbert",
    "sentiment-analysis__final_model",
)
# Pattern of names of real adapters, code, and why the finding is right. What is not here was raised wrongly.
REASONS = (
    ("self_healing_dag__*", "head-missing", "the class has a head, which was random, frozen and not saved"),
    ("Medical_Question_Answeri__*", "alpha-beside-scale", "lora_layers: of the mlx-lm that multiplied by α/r as well"),
    ("flan-t5-base-MedicalQnA__*", "target-unmatched", "target_modules has V where T5 has v, which was not trained"),
)
# Notes that state computed numbers, which are right by definition.
COMPUTED = ("spike", "rank-impossible", "rank-unused", "codes-merge")
PREFIX = "base_model.model."


@dataclass
class Files:
    """A folder of PEFT in memory, and the base that it is compared with."""

    tensors: dict[str, Any]
    config: dict[str, Any]
    rng: Any
    base: dict[str, Any] = field(default_factory=dict)
    base_config: dict[str, Any] = field(default_factory=dict)
    base_name: str = "base"
    # What lora_parameters says, if the adapter is converted to MLX; nothing is a file without its configuration.
    mlx: dict[str, Any] | None = None
    beside: "list[Files]" = field(default_factory=list)

    def names(self) -> list[str]:
        return [key.removesuffix(".lora_A.weight") for key in self.tensors if key.endswith(".lora_A.weight")]

    def get(self, name: str) -> tuple[Any, Any]:
        """B and A of a module."""
        return self.tensors[f"{name}.lora_B.weight"], self.tensors[f"{name}.lora_A.weight"]

    def put(self, name: str, B: Any, A: Any) -> None:
        self.tensors[f"{name}.lora_B.weight"] = np.ascontiguousarray(B, dtype=np.float32)
        self.tensors[f"{name}.lora_A.weight"] = np.ascontiguousarray(A, dtype=np.float32)

    def drop(self, name: str) -> None:
        for half in "AB":
            del self.tensors[f"{name}.lora_{half}.weight"]

    def one(self) -> str:
        names = self.names()
        return names[int(self.rng.integers(len(names)))]

    def block(self) -> list[str]:
        """The modules of a block between the first and the last."""
        numbers = sorted({number for name in self.names() if (number := block_of(name)) is not None})
        number = numbers[int(self.rng.integers(1, len(numbers) - 1))]
        return [name for name in self.names() if block_of(name) == number]

    def copy(self) -> "Files":
        same = Files(dict(self.tensors), json.loads(json.dumps(self.config)), self.rng)
        same.base, same.base_config = dict(self.base), dict(self.base_config)
        return same

    def write(self, folder: Path) -> None:
        if self.mlx is not None:
            replace(self, mlx=None).write(folder.with_name("before"))
            loralens.convert(folder.with_name("before"), to="mlx", drop_extra=True, output=folder)
            # Without the record that the conversion leaves in the file, as a trainer writes it.
            (file,) = folder.glob("*.safetensors")
            save_file(load_file(file), file, metadata={"format": "mlx"})
            settings = folder / "adapter_config.json"
            if not self.mlx:
                settings.unlink()
                return
            config = json.loads(settings.read_text("utf-8"))
            config["lora_parameters"] |= self.mlx
            config.pop("fine_tune_type", None)
            settings.write_text(json.dumps(config))
            return
        folder.mkdir(parents=True)
        save_file(self.tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        if self.config:
            (folder / "adapter_config.json").write_text(json.dumps(self.config))


def block_of(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


@dataclass(frozen=True)
class Fault:
    """A fault.

    Attributes
    ----------
    name : str
    codes : tuple of str
        The codes that are about it, which should be raised.
    make : callable
        Makes it, and returns False where it cannot be made.
    base : bool
        Whether it is about a base.
    also : tuple of str
        Codes that say something right about it, too.
    """

    name: str
    codes: tuple[str, ...]
    make: Callable[[Files], Any]
    base: bool = False
    also: tuple[str, ...] = ()


def each(
    names: Callable[[Files], Sequence[str]], change: Callable[[Any, Any], tuple[Any, Any]]
) -> Callable[[Files], None]:
    """Change B and A of some modules."""

    def make(files: Files) -> None:
        for name in names(files):
            files.put(name, *change(*files.get(name)))

    return make


def alone(files: Files) -> list[str]:
    return [files.one()]


def every(files: Files) -> list[str]:
    return files.names()


def set_config(**fields: Any) -> Callable[[Files], None]:
    return lambda files: files.config.update(fields)


def scaled(factor: float) -> Callable[[Files], None]:
    return lambda files: files.config.update(lora_alpha=files.config["lora_alpha"] * factor)


def spoil(value: float, factor: str) -> Callable[[Files], None]:
    def make(files: Files) -> None:
        key = f"{files.one()}.lora_{factor}.weight"
        files.tensors[key] = files.tensors[key].copy()
        files.tensors[key].flat[3] = value

    return make


def lose_one(files: Files) -> None:
    files.drop(files.one())


def lose_block(files: Files) -> None:
    for name in files.block():
        files.drop(name)


def write_over(halves: str) -> Callable[[Files], bool]:
    """Write a module, or one of its factors, over another one of its kind."""

    def make(files: Files) -> bool:
        name = files.one()
        kind = [other for other in files.names() if other.rsplit(".", 1)[1] == name.rsplit(".", 1)[1] and other != name]
        kind = [other for other in kind if files.get(other)[0].shape == files.get(name)[0].shape]
        if not kind:
            return False
        for half in halves:
            files.tensors[f"{name}.lora_{half}.weight"] = files.tensors[f"{kind[0]}.lora_{half}.weight"]
        return True

    return make


def heads(files: Files) -> list[str]:
    return [key for key in files.tensors if {"classifier", "score"} & set(key.split("."))]


def lose_head(files: Files) -> bool:
    found = heads(files)
    for key in found:
        del files.tensors[key]
    return bool(found)


def lose_head_of_class(files: Files) -> bool:
    mapping = {"base_model_class": "BertForSequenceClassification", "parent_library": "transformers"}
    files.config |= {"task_type": None, "auto_mapping": mapping, "modules_to_save": None}
    return lose_head(files)


def swap(B: Any, A: Any) -> tuple[Any, Any]:
    return A.T, B.T


def zero_rows(B: Any, A: Any) -> tuple[Any, Any]:
    return B * (np.arange(len(B)) % 2)[:, None], A


def zero_columns(B: Any, A: Any) -> tuple[Any, Any]:
    return B, A * (np.arange(A.shape[1]) >= A.shape[1] // 4)


def untrained(files: Files) -> None:
    for name in files.names():
        B, A = files.get(name)
        files.put(name, 0.01 * files.rng.standard_normal(B.shape), files.rng.standard_normal(A.shape))


def decomposed(rslora: bool, version: str) -> Callable[[Files], None]:
    """Factors as PEFT's combinations by an SVD leave them."""

    def make(files: Files) -> None:
        for name in files.names():
            B, A = (X.astype(np.float64) for X in files.get(name))
            (Q, R), (P, S) = np.linalg.qr(B), np.linalg.qr(A.T)
            U, s, Vh = np.linalg.svd(R @ S.T)
            files.put(name, Q @ U * s, Vh @ P.T)
        rank = files.config["r"]
        files.config |= {"lora_alpha": rank, "use_rslora": rslora, "peft_version": version, "rank_pattern": {}}

    return make


def side_by_side(**config: Any) -> Callable[[Files], None]:
    """Two adapters of other strengths side by side, with the α of one of them."""

    def make(files: Files) -> None:
        for name in files.names():
            B, A = files.get(name)
            turn = np.linalg.qr(files.rng.standard_normal((len(A), len(A))))[0]
            length = np.linalg.norm(A, axis=1).mean()
            other = files.rng.uniform(-1, 1, A.shape) * length * 3 / (A.shape[1] / 3) ** 0.5
            files.put(name, np.hstack([B, B @ turn / 3]), np.vstack([A, other]))
        files.config |= {"r": 2 * files.config["r"], "lora_alpha": files.config["r"] // 2, **config}

    return make


def split_in_parts(count: int) -> Callable[[Files], None]:
    """Projections whose parts were trained alone, stored as one pair with the α of a part."""

    def make(files: Files) -> None:
        for name in files.names():
            B, A = files.get(name)
            parts = np.array_split(np.arange(len(B)), count)
            whole = np.zeros((len(B), count * B.shape[1]))
            for i, rows in enumerate(parts):
                whole[rows, i * B.shape[1] : (i + 1) * B.shape[1]] = B[rows]
            files.put(name, whole, np.vstack([A + 0.01 * files.rng.standard_normal(A.shape) for _ in parts]))
        rank = files.config["r"]
        files.config |= {"r": count * rank, "lora_alpha": rank}

    return make


def another(noise: float = 0.0, *, keep_A: bool = False, factor: float = 1.0) -> Callable[[Files], None]:
    """A second adapter beside this one: a copy with noise, a multiple, or one of another task with the same first A."""

    def make(files: Files) -> None:
        second = files.copy()
        for name in files.names():
            B, A = files.get(name)
            if keep_A:
                second.put(
                    name, B[files.rng.permutation(len(B))], A + 0.02 * A.std() * files.rng.standard_normal(A.shape)
                )
            else:
                second.put(name, factor * (B + noise * B.std() * files.rng.standard_normal(B.shape)), A)
        files.beside.append(second)

    return make


def summed(first: float, second: float) -> Callable[[Files], None]:
    """Another adapter, and a weighted sum of both."""

    def make(files: Files) -> None:
        other, result = files.copy(), files.copy()
        for name in files.names():
            B, A = files.get(name)
            C, D = B[files.rng.permutation(len(B))], files.rng.standard_normal(A.shape) * A.std()
            other.put(name, C, D)
            result.put(name, np.hstack([first * B, second * C]), np.vstack([A, D]))
        result.config |= {"r": 2 * files.config["r"], "lora_alpha": 2 * files.config["lora_alpha"]}
        files.beside += [other, result]

    return make


def scaled_twice(make: Callable[[float], Callable[[Files], None]]) -> Callable[[Files], bool]:
    """A second adapter that was multiplied by α/r of the first one."""

    def with_scale(files: Files) -> bool:
        scale = files.config["lora_alpha"] / files.config["r"]
        if scale != 1:
            make(scale)(files)
        return bool(scale != 1)

    return with_scale


def beside_the_targets(files: Files) -> None:
    B, A = files.get(files.one())
    files.put(f"{PREFIX}elsewhere", B[::-1], A[::-1])


def with_prefix(prefix: str) -> Callable[[Files], None]:
    def make(files: Files) -> None:
        files.tensors = {prefix + key.removeprefix(PREFIX): tensor for key, tensor in files.tensors.items()}

    return make


def without_config(files: Files) -> None:
    files.config = {}


def as_mlx(**said: Any) -> Callable[[Files], None]:
    def make(files: Files) -> None:
        files.mlx = said

    return make


def one_A(files: Files) -> bool:
    """One A in all modules."""
    shapes = {files.get(name)[1].shape for name in files.names()}
    for name in files.names() if len(shapes) == 1 else ():
        files.put(name, files.get(name)[0], files.get(files.names()[0])[1])
    return len(shapes) == 1


def other_base_beside(name: str) -> Callable[[Files], None]:
    def make(files: Files) -> None:
        another(keep_A=True)(files)
        files.beside[0].config["base_model_name_or_path"] = name

    return make


def base_of(files: Files, *, ratio: float = 0.05) -> dict[str, Any]:
    """Gaussian weights in bfloat16, of which ‖ΔW‖ is ``ratio``."""
    scale = files.config["lora_alpha"] / files.config["r"]
    weights = {}
    for name in files.names():
        B, A = (X.astype(np.float64) for X in files.get(name))
        norm = scale * np.sqrt(np.sum((B.T @ B) * (A @ A.T)))
        W = files.rng.standard_normal((B.shape[0], A.shape[1])).astype(np.float32)
        W *= np.float32(norm / ratio / np.linalg.norm(W))
        # GPT-2 stores its weights the other way round, which its configuration would say; here all are alike.
        weights[f"{name.removeprefix(PREFIX)}.weight"] = W.astype(ml_dtypes.bfloat16)
    return weights


def rebased(ratio: float) -> Callable[[Files], None]:
    return lambda files: files.base.update(base_of(files, ratio=ratio))


def base_named(name: str) -> Callable[[Files], None]:
    def make(files: Files) -> None:
        files.base_name = name

    return make


def other_hidden_size(files: Files) -> None:
    for key, W in list(files.base.items()):
        files.base[key] = W[: len(W) - 8]


def lose_weight(files: Files) -> None:
    del files.base[f"{files.one().removeprefix(PREFIX)}.weight"]


def spoil_weight(value: float) -> Callable[[Files], None]:
    def make(files: Files) -> None:
        key = f"{files.one().removeprefix(PREFIX)}.weight"
        files.base[key] = files.base[key].copy()
        files.base[key].flat[5] = value

    return make


def in_codes(ratio: float) -> Callable[[Files], None]:
    """A base in NF4, as bitsandbytes stores it."""

    def make(files: Files) -> None:
        state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16"}
        stored: dict[str, Any] = {}
        for key, W in base_of(files, ratio=ratio).items():
            blocks = W.astype(np.float32).reshape(-1, 64)
            absmax = np.abs(blocks).max(axis=1)
            codes = np.searchsorted((NF4[1:] + NF4[:-1]) / 2, (blocks / absmax[:, None]).reshape(-1)).astype(np.uint8)
            stored[key] = (codes[::2] << 4 | codes[1::2]).reshape(-1, 1)
            stored[f"{key}.absmax"], stored[f"{key}.quant_map"] = absmax, NF4
            text = json.dumps({**state, "shape": list(W.shape)}).encode()
            stored[f"{key}.quant_state.bitsandbytes__nf4"] = np.frombuffer(text, np.uint8)
        files.base = stored
        section = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        files.base_config["quantization_config"] = section

    return make


# The levels of NF4 (Dettmers et al. 2023), as bitsandbytes has them.
NF4 = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
], np.float32)  # fmt: skip

MAPPING = {"base_model_class": "Model", "parent_library": "modeling_of_ours"}
FAULTS = (
    Fault("NaN in B", ("non-finite",), spoil(np.nan, "B")),
    Fault("Inf in A", ("non-finite",), spoil(np.inf, "A")),
    Fault("peft_type LOHA", ("unreadable",), set_config(peft_type="LOHA")),
    Fault("peft_type IA3", ("unreadable",), set_config(peft_type="IA3")),
    Fault("peft_type null", ("client",), set_config(peft_type=None)),
    Fault("no peft_type", ("client",), lambda f: f.config.pop("peft_type")),
    Fault("no prefix of names", ("prefix-missing",), with_prefix(""), also=("head-missing",)),
    Fault("half of the prefix", ("prefix-missing",), with_prefix("model."), also=("head-missing",)),
    Fault("the head lost", ("head-missing",), lose_head),
    Fault("the head of the class lost", ("head-missing",), lose_head_of_class),
    Fault("B and A exchanged in all modules", ("factors-swapped",), each(every, swap)),
    Fault("B and A exchanged in one module", ("factors-swapped",), each(alone, swap)),
    Fault("B of a module zero", ("zero-update",), each(alone, lambda B, A: (0 * B, A))),
    Fault("A of a block zero", ("zero-update",), each(Files.block, lambda B, A: (B, 0 * A))),
    Fault("a module lost", ("module-missing",), lose_one, also=("target-unmatched",)),
    Fault("a block lost", ("module-missing",), lose_block, also=("target-unmatched",)),
    Fault("a module written over another", ("module-copied",), write_over("AB")),
    Fault("a module written over another, again", ("module-copied",), write_over("AB")),
    Fault("A written over another", ("factor-copied",), write_over("A")),
    Fault("B written over another", ("factor-copied",), write_over("B")),
    Fault("half of the rows of B zero", ("dead-rows",), each(every, zero_rows)),
    Fault("half of the rows of one B zero", ("dead-rows",), each(alone, zero_rows)),
    Fault("a quarter of the columns of A zero", ("dead-columns",), each(every, zero_columns)),
    Fault("a quarter of the columns of one A zero", ("dead-columns",), each(alone, zero_columns)),
    Fault("one module × 10", ("outlier",), each(alone, lambda B, A: (10 * B, A))),
    Fault("one module × 100", ("outlier",), each(alone, lambda B, A: (100 * B, A))),
    Fault("one module × 0.1", ("outlier",), each(alone, lambda B, A: (B / 10, A))),
    Fault("one block × 20", ("outlier",), each(Files.block, lambda B, A: (20 * B, A))),
    Fault("α × 100", ("scale-large",), scaled(100)),
    Fault("α × 1000", ("scale-large",), scaled(1000)),
    Fault("α = 0", ("scale-zero",), scaled(0)),
    Fault("α = 0 in one module", ("scale-zero",),
          lambda f: f.config.update(alpha_pattern={f.one().removeprefix(PREFIX): 0}), also=("client",)),
    Fault("α negative", ("scale-negative",), scaled(-1)),
    Fault("α / 1000", ("scale-small",), scaled(1e-3)),
    Fault("random factors", ("random-spectrum",), untrained),
    Fault("random factors, again", ("random-spectrum",), untrained),
    Fault("code of its own", ("foreign-code",), set_config(auto_mapping=MAPPING)),
    Fault("auto_map", ("foreign-code",), set_config(auto_map={"AutoModel": "modeling.Model"})),
    Fault("an SVD by PEFT 0.15", ("svd-combined",), decomposed(False, "0.15.0")),
    Fault("an SVD by PEFT 0.10", ("svd-combined",), decomposed(False, "0.10.0")),
    Fault("an SVD with rsLoRA", ("rslora-combined",), decomposed(True, "0.15.0")),
    Fault("an SVD with rsLoRA by PEFT 0.21", ("rslora-combined",), decomposed(True, "0.21.2")),
    Fault("two side by side", ("concat-alpha",), side_by_side()),
    Fault("two side by side, again", ("concat-alpha",), side_by_side()),
    Fault("two side by side by an old PEFT", ("concat-alpha",), side_by_side(peft_version="0.10.0")),
    Fault("three parts in one pair", ("split-qkv-alpha",), split_in_parts(3)),
    Fault("four parts in one pair", ("split-qkv-alpha",), split_in_parts(4)),
    Fault("r doubled in the configuration", ("rank-disagrees",), lambda f: f.config.update(r=2 * f.config["r"])),
    Fault("r halved in the configuration", ("rank-disagrees",), lambda f: f.config.update(r=f.config["r"] // 2)),
    Fault("no target", ("module-untargeted", "target-unmatched"), set_config(target_modules=["nowhere"])),
    Fault("a module beside the targets", ("module-untargeted",), beside_the_targets),
    Fault("no configuration", ("alpha-unknown",), without_config),
    Fault("no configuration of MLX", ("alpha-unknown",), as_mlx()),
    Fault("an α beside the scale of MLX", ("alpha-beside-scale",), as_mlx(alpha=32.0), also=("names-unknown",)),
    Fault("α as the scale of MLX", ("scale-is-alpha",), as_mlx(alpha=16.0, scale=16.0), also=("alpha-beside-scale",)),
    Fault("the same with 24", ("scale-is-alpha",), as_mlx(alpha=24.0, scale=24.0), also=("alpha-beside-scale",)),
    Fault("one A in all modules", ("factor-shared",), one_A),
    Fault("init_lora_weights pissa", ("mutated-base",), set_config(init_lora_weights="pissa"), also=("client",)),
    Fault("init_lora_weights olora", ("mutated-base",), set_config(init_lora_weights="olora"), also=("client",)),
    Fault("a copy beside it", ("combination",), another(), also=("shared-initialisation",)),
    Fault("a copy with noise beside it", ("near-copy", "shared-initialisation"), another(0.08)),
    Fault("one from the same seed beside it", ("shared-initialisation",), another(keep_A=True)),
    Fault("a sum beside it", ("combination",), summed(0.7, 0.3)),
    Fault("a sum, scaled twice", ("combination-scale",), scaled_twice(lambda scale: summed(0.7 * scale, 0.3 * scale))),
    Fault("a copy, scaled twice", ("combination-scale",), scaled_twice(lambda scale: another(factor=scale)),
          also=("shared-initialisation",)),
    Fault("one of another base beside it", ("bases-differ",), other_base_beside("org/llama-7b"),
          also=("shared-initialisation",)),
    Fault("one of a base of another family", ("bases-differ",), other_base_beside("org/opt-13b"),
          also=("shared-initialisation",)),
    Fault("another base", ("base-differs",), base_named("org/llama-7b"), base=True),
    Fault("a base of another family", ("base-differs",), base_named("falcon-7b"), base=True),
    Fault("a base of another size", ("base-mismatch",), other_hidden_size, base=True),
    Fault("a base without a weight", ("base-mismatch",), lose_weight, base=True),
    Fault("NaN in the base", ("base-non-finite",), spoil_weight(np.nan), base=True),
    Fault("Inf in the base", ("base-non-finite",), spoil_weight(np.inf), base=True),
    Fault("‖ΔW‖ = 3 ‖W‖", ("update-dominates",), rebased(3.0), base=True),
    Fault("‖ΔW‖ = 100 ‖W‖", ("update-dominates",), rebased(100.0), base=True),
    Fault("‖ΔW‖ = 0.3 % of ‖W‖", ("merge-lossy",), rebased(3e-3), base=True),
    Fault("‖ΔW‖ = 0.25 % of ‖W‖", ("merge-lossy",), rebased(2.5e-3), base=True),
    Fault("‖ΔW‖ = 0.03 % of ‖W‖", ("below-rounding",), rebased(3e-4), base=True),
    Fault("‖ΔW‖ = 0.01 % of ‖W‖", ("below-rounding",), rebased(1e-4), base=True),
    Fault("‖ΔW‖ = 0.05 % of ‖W‖ in NF4", ("codes-weak", "codes-merge"), in_codes(5e-4), base=True),
    Fault("‖ΔW‖ = 0.02 % of ‖W‖ in NF4", ("codes-weak", "codes-merge"), in_codes(2e-4), base=True),
)  # fmt: skip


@dataclass
class Tally:
    """What is counted for a code."""

    levels: set[str] = field(default_factory=set)
    real: int = 0
    real_right: int = 0
    injected: int = 0
    injected_right: int = 0
    made: int = 0
    found: int = 0
    without_fix: int = 0


def findings(paths: Sequence[Path], base: Path | None) -> list[Any]:
    return list(loralens.doctor(*map(str, paths), base=base).findings)


def examine(files: Files, folder: Path) -> list[Any]:
    """The findings about the files, written to a folder of their own."""
    shutil.rmtree(folder, ignore_errors=True)
    paths = [folder / name for name in ("adapter", "second", "third")][: 1 + len(files.beside)]
    for path, one in zip(paths, [files, *files.beside], strict=True):
        one.write(path)
    base = folder / files.base_name if files.base else None
    if base:
        base.mkdir(parents=True)
        save_file(files.base, base / "model.safetensors", metadata={"format": "pt"})
        (base / "config.json").write_text(json.dumps(files.base_config))
    return findings(paths, base)


def add_injected(table: dict[str, Tally], source: Path, seed: int) -> None:
    config = json.loads((source / "adapter_config.json").read_text("utf-8"))
    well = Files(load_file(source / "adapter_model.safetensors"), config, np.random.default_rng(seed))
    with TemporaryDirectory() as folder:
        before = {False: {one.code for one in examine(well.copy(), Path(folder) / "case")}}
        with_base = well.copy()
        with_base.base, with_base.base_config = base_of(well), {"model_type": "llama"}
        before[True] = {one.code for one in examine(with_base.copy(), Path(folder) / "case")}
        for fault in FAULTS:
            case = (with_base if fault.base else well).copy()
            if fault.make(case) is False:
                continue
            raised = [one for one in examine(case, Path(folder) / "case") if one.code not in before[fault.base]]
            for code in {*fault.codes} - before[fault.base]:
                tally = table.setdefault(code, Tally())
                tally.made += 1
                tally.found += code in {one.code for one in raised}
            for code in {one.code for one in raised}:
                tally = table.setdefault(code, Tally())
                tally.injected += 1
                tally.injected_right += code in (*fault.codes, *fault.also)
                if code not in (*fault.codes, *fault.also) and "-v" in sys.argv:
                    print(f"{source.name}: {fault.name}: {code}", file=sys.stderr)
            if "-v" in sys.argv and (lost := {*fault.codes} - {one.code for one in raised} - before[fault.base]):
                print(f"{source.name}: {fault.name}: not found: {', '.join(sorted(lost))}", file=sys.stderr)
            add_levels(table, raised)


def add_levels(table: dict[str, Tally], found: Sequence[Any]) -> None:
    for one in found:
        tally = table.setdefault(one.code, Tally())
        tally.levels.add(one.level)
        tally.without_fix += one.level != "note" and not one.fix


def add_real(table: dict[str, Tally], folder: Path) -> int:
    count = 0
    for path in sorted(folder.iterdir()):
        if not path.is_dir():
            continue
        # A folder of MLX may have a checkpoint instead of the last adapter.
        file = (
            path if (path / "adapter_model.safetensors").is_file() else next(iter(sorted(path.glob("*.safetensors"))))
        )
        found = findings([file], None)
        count += 1
        add_levels(table, found)
        for code in {one.code for one in found}:
            tally = table.setdefault(code, Tally())
            tally.real += 1
            right = any(fnmatch(path.name, pattern) and code == named for pattern, named, _ in REASONS)
            tally.real_right += right
            if not right and code not in COMPUTED and "-v" in sys.argv:
                print(f"{path.name}: {code}", file=sys.stderr)
    return count


def failures(table: dict[str, Tally]) -> list[str]:
    """The codes that do not earn their level."""
    found = []
    for code, tally in table.items():
        if tally.levels <= {"note"}:
            continue
        if tally.real_right < SHARE * tally.real or tally.injected_right < SHARE * tally.injected:
            found.append(f"{code}: fewer than nine of ten are right")
        if tally.real + tally.injected < CASES:
            found.append(f"{code}: raised in {tally.real + tally.injected} cases only")
        if tally.without_fix:
            found.append(f"{code}: no fix")
    return found


def share(right: int, of: int) -> str:
    return f"{right} of {of}" if of else "–"


def text_of(table: dict[str, Tally], real: int) -> str:
    order = [*diagnosis_codes(), *sorted(table.keys() - diagnosis_codes().keys())]
    lines = [
        f"| code | level | {real} real adapters: right of raised | injected: right of raised | found of made |",
        "| --- | --- | --- | --- | --- |",
    ]
    for code in order:
        if code in table:
            one = table[code]
            level = ", ".join(level for level in LEVELS if level in one.levels)
            cells = [
                share(one.real_right, one.real),
                share(one.injected_right, one.injected),
                share(one.found, one.made),
            ]
            if code in COMPUTED:
                cells[:2] = f"{one.real} raised", f"{one.injected} raised"
            lines.append(f"| `{code}` | {level} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    logging.getLogger("loralens").setLevel(logging.ERROR)
    folder = Path(sys.argv[1])
    table: dict[str, Tally] = {}
    real = add_real(table, folder)
    sources = [ROOT / "examples" / "adapters" / name for name in OWN] + [folder / name for name in OTHERS]
    for seed, source in enumerate(sources):
        add_injected(table, source, seed)
    text = text_of(table, real)
    page = PAGE.read_text("utf-8")
    head, _, rest = page.partition(START)
    PAGE.write_text(f"{head}{START}\n{text}\n{END}{rest.partition(END)[2]}", "utf-8")
    print(text)
    bad = failures(table)
    print("\n".join(bad))
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
