"""What a merge does to the predictions of a language model on real texts, in and out of the domain of the adapter.

The model runs three times on every batch: with the weights of the base, with W + ΔW in float32, which is the unmerged
adapter, and with the numbers that the merge writes.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from loralens.analysis.behaviour import sum_divergences
from loralens.choices import RoundingMode
from loralens.core.attached import call, frozen_evaluation
from loralens.core.lazy import Array
from loralens.core.messages import note, progress
from loralens.core.names import some
from loralens.errors import MismatchError, OptionError, place
from loralens.formats.models.base_cache import float_copy, float_folder
from loralens.linalg.codes import GGML_BLOCK, dequantise_nf4, quantise_nf4
from loralens.linalg.device import Device
from loralens.merging.codec import Codec, FloatCodec, GridBlock, prepare, prepare_merge
from loralens.merging.merge_plan import TensorPlan
from loralens.verbs.merges.merge_inputs import MergeInputs
from loralens.verbs.models.loaded import Loaded
from loralens.verbs.models.models import load_model, restore_settings
from loralens.verbs.models.texts import InputText, TextSource, read_texts, text_label

if TYPE_CHECKING:  # torch is imported where a model is loaded
    from torch import Tensor

MOST = 16  # texts of each kind: a minute or two for a model of 135 million weights on one core
LENGTH = 96  # tokens after which a text is cut
LONG = 60  # characters from which a paragraph is used as a text
BATCH = 2  # texts at a time: the predictions of all tokens for every word are in memory three times


VERSIONS = ("base", "unmerged", "merged")


def measure_on_texts(
    inputs: MergeInputs,
    data: TextSource,
    *,
    rounding: RoundingMode,
    seed: int,
    device: Device,
) -> dict[str, Any]:
    """The losses and divergences on ``data`` and on as many general texts, as a JSON object.

    Raises
    ------
    OptionError
        The base cannot be run as a causal language model here.
    MismatchError
        The model has no parameter of the name and shape of a weight that changes.
    """
    # One text more than is used shows whether there are more.
    texts = read_texts(data, limit=MOST + 1)
    first, texts = "the first " if len(texts) > MOST else "", texts[:MOST]
    general, label = general_texts(len(texts))
    source = _runnable(inputs)
    with restore_settings(source):
        loaded = load_model(source, device="cpu", dtype="f32", threads=None)
        if loaded.head != "causal":
            raise OptionError("--data measures the predictions of a causal language model", fix="leave out --data")
        use = _versions(loaded, inputs, rounding=rounding, seed=seed, device=device)
        with progress("running the model", len(texts) + len(general)) as step:
            measured = {
                kind: _measure(loaded, use, part, step) for kind, part in (("in_domain", texts), ("general", general))
            }
    why = ", which bounds the time" if first else ""
    note(f"measured on {first}{len(texts)} texts of {text_label(data)}{why}, and on {len(general)} of {label}")
    return {**measured, "general_texts": label}


def general_texts(limit: int) -> tuple[list[InputText], str]:
    """At most ``limit`` texts that are not of the task, and their label: paragraphs of the help of Python."""
    # The help of Python is on every machine, and is plain English, although about one subject.
    from pydoc_data.topics import topics

    paragraphs = [" ".join(part.split()) for topic in sorted(topics) for part in topics[topic].split("\n\n")]
    long = [InputText(part) for part in paragraphs if len(part) >= LONG]
    # Spread over the topics, which are sorted by name.
    return long[:: max(1, len(long) // max(limit, 1))][:limit], "the help of Python"


def _runnable(inputs: MergeInputs) -> str | Path:
    """The base as floats that transformers can run; codes are decoded once, into the cache."""
    name = Path(inputs.base).name
    if inputs.files.gguf:
        return float_folder(name, inputs.files.gguf.paths)
    if not (inputs.decoded or inputs.coded):
        return inputs.base
    return float_copy(name, inputs.files.root, inputs.checkpoint.tensors)


def _versions(
    loaded: Loaded, inputs: MergeInputs, *, rounding: RoundingMode, seed: int, device: Device
) -> Callable[[str], None]:
    """A function that puts one of the three versions of the changing weights into the model."""
    import torch

    parameters = dict(loaded.model.named_parameters())
    plans = {key: plan for key, plan in inputs.plan.tensors.items() if _changes(inputs, plan)}
    strange = [key for key, plan in plans.items() if key not in parameters or parameters[key].shape != plan.shape]
    if strange:
        what = f"the model has no parameter with the name and the shape of {some(strange, 3)}"
        raise MismatchError(what, fix="leave out --data")
    # The model holds the base already.
    versions: dict[str, dict[str, Tensor]] = {name: {key: parameters[key].data for key in plans} for name in VERSIONS}
    for key, plan in plans.items():
        unmerged, merged = np.empty(plan.matrix, np.float32), np.empty(plan.matrix, np.float32)
        with place(key):
            # The rows of a block are valid until the next one.
            for start, *both in changed_rows(inputs, plan, rounding, seed, device):
                rows = slice(start, start + len(both[0]))
                unmerged[rows], merged[rows] = both
            if key in inputs.quantised.keys:
                type_ = inputs.block_type(key)
                if type_:
                    merged = type_.quantise(merged.reshape(-1, GGML_BLOCK)).numbers
                else:
                    merged = dequantise_nf4(*quantise_nf4(merged.reshape(-1)))
        for name, numbers in (("unmerged", unmerged), ("merged", merged)):
            versions[name][key] = torch.from_numpy(numbers.reshape(plan.shape))

    def use(version: str) -> None:
        for key, numbers in versions[version].items():
            parameters[key].data = numbers

    return use


def _changes(inputs: MergeInputs, plan: TensorPlan) -> bool:
    """Whether the merge changes a weight by more than its dtype."""
    trained = bool(plan.segments or plan.tokens) or plan.replacement is not None
    # Weights that become new codes change, whether or not the adapter moves them.
    return trained or plan.key in inputs.quantised.keys


def changed_rows(
    inputs: MergeInputs,
    plan: TensorPlan,
    rounding: RoundingMode,
    seed: int,
    device: Device,
) -> Iterator[tuple[int, Array, Array]]:
    """The first row of every block of a weight, its rows with the whole update, and as the merge writes them."""
    # New codes are made from float32.
    dtype = np.float32 if plan.key in inputs.quantised.keys else None
    codec: Codec = FloatCodec(plan, dtype) if dtype else inputs.codec(plan.key, plan.key, rounding, seed)
    # Rows of trained tokens are put in after the update, which the merge in float32 does.
    exact = prepare_merge(plan, dtype=np.float32, device=device).blocks() if plan.tokens else None
    for block in prepare(codec, device=device).blocks():
        W = block.W.astype(np.float32)
        updated = W if block.D is None else W + block.D
        if isinstance(block, GridBlock):
            yield block.start, updated, block.grid.values(block.codes)
            continue
        unmerged = updated if block.dora_factors is None else updated * block.dora_factors
        yield block.start, next(exact).merged if exact else unmerged, block.numbers(block.merged)


def _measure(loaded: Loaded, use: Callable[[str], None], texts: list[InputText], step: Any) -> dict[str, float | int]:
    """Means over the predicted tokens of some texts: losses and Kullback-Leibler divergences, in nats."""
    import torch

    tokens, losses, divergences = 0, dict.fromkeys(VERSIONS, 0.0), dict.fromkeys(("merged", "base"), 0.0)
    with frozen_evaluation(loaded.model, gradient=False):
        for batch in loaded.batches(texts, batch=BATCH, length=LENGTH, step=step):
            ids, mask = batch["input_ids"][:, 1:], batch["attention_mask"].bool()
            # A token after padding has nothing to be predicted from.
            counted = mask[:, 1:] & mask[:, :-1]
            targets = ids[counted][:, None]
            tokens += len(targets)
            predictions: dict[str, Tensor] = {}  # the logarithms of the probabilities of all words
            for name in VERSIONS:
                use(name)
                logits: Tensor = call(loaded.model, batch).logits[:, :-1]
                predictions[name] = logits.float().log_softmax(-1)[counted]
                losses[name] -= float(torch.gather(predictions[name], 1, targets).sum())
            for name in divergences:
                divergences[name] += sum_divergences(predictions["unmerged"], predictions[name])
    sums = {f"loss_{name}": loss for name, loss in losses.items()}
    sums |= {f"kl_unmerged_{name}": divergence for name, divergence in divergences.items()}
    return {"tokens": tokens, **{name: total / max(tokens, 1) for name, total in sums.items()}}
