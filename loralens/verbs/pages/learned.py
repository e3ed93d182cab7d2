"""What the adapters of a page learned, where their base is a language model that can be run here."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from loralens.analysis.merge_effect import Base
from loralens.charts.explanation_chart import explanation_chart
from loralens.core.messages import quote_word
from loralens.core.model_in_memory import ModelInMemory, ModelPath
from loralens.core.threads import processor_count
from loralens.errors import LoraLensError, OptionError
from loralens.formats.models.checkpoint import model_config
from loralens.formats.models.model_files import gguf_paths, resolve_path
from loralens.reporting.subject import Learned, Subject
from loralens.verbs.models.models import HEADS
from loralens.verbs.spectra.decompositions import duration

PATIENCE = 60.0  # seconds that running the base may take without --explain; the documentation promises "a minute"
# Tokens that are run: 32 texts of 20 and 8 questions of 40 by the base and by the adapter, and a quarter of the texts
# and all questions by two random updates.
TOKENS = 2 * (640 + 320) + 2 * (160 + 320)
# Operations a second: a core of an AMD EPYC does 5e10 with a 135M model in float32. The time limit also limits the
# memory: 2.4 GB for two cores.
CPU, GPU = 4e10, 1e13
CAUSAL = tuple(ending for ending, (_, head) in HEADS.items() if head == "causal")


def with_explanations(subjects: list[Subject], base: ModelPath, model: Base, wanted: bool | None) -> list[Subject]:
    """The subjects with what each learned, or with the reason why this is not shown. The base is loaded once.

    Nothing is said of models that predict no tokens, unless it was ``wanted``.
    """
    reason = _obstacle(base, model, len(subjects), wanted)
    if wanted is False or reason is None:
        return subjects
    if reason:
        return [_without(subject, reason, base) for subject in subjects]
    # They take 0.1 s to import.
    from loralens.verbs.models.models import restore_settings
    from loralens.verbs.served.explain import explain_on
    from loralens.verbs.served.predictions import LocalModel, bank, check_applies
    from loralens.verbs.served.vocabulary import NEUTRAL

    assert not isinstance(base, ModelInMemory)  # which is an obstacle
    found = []
    with restore_settings(base):
        try:
            local = LocalModel(base, device="auto", dtype="f32", threads=None)
        except LoraLensError as error:
            if wanted:
                raise
            return [_without(subject, f"{error.what}", base) for subject in subjects]
        for subject in subjects:
            try:
                if subject.non_finite:
                    raise OptionError("some modules hold NaN or Inf", fix="see the findings")
                check_applies(local, subject.adapter, subject.label)
                explanation = explain_on(local, bank()[:NEUTRAL], subject.adapter, subject.label, str(base))
            except LoraLensError as error:
                found.append(_without(subject, error.what, base))
                continue
            words = explanation.more or explanation.less
            learned = Learned(
                paragraphs=explanation.paragraphs(),
                chart=explanation_chart(explanation.more, explanation.less, explanation.texts) if words else None,
                table=explanation.listing()[0],
                record=explanation.record(),
            )
            found.append(replace(subject, learned=learned))
    return found


def _without(subject: Subject, reason: str, base: ModelPath) -> Subject:
    """The subject with the reason why nothing is said, and the command that says it."""
    command = subject.examination.command("explain", "--base", quote_word(str(base)))
    later = "" if isinstance(base, ModelInMemory) else f" ({command} shows it)"
    return replace(subject, learned=Learned(paragraphs=[f"What it learned is not shown: {reason}{later}."]))


def _obstacle(base: ModelPath, model: Base, adapters: int, wanted: bool | None) -> str | None:
    """Why the base is not run; empty if it can be, and None if nobody expects it to be."""
    causal = any(str(name).endswith(CAUSAL) for name in (model_config(base) or {}).get("architectures") or ())
    if isinstance(base, ModelInMemory):
        reason = "the base was given without a tokenizer"
        if wanted:
            raise OptionError(f"explain: {reason}", fix="give the path of the base")
        return reason if causal else None
    path = resolve_path(Path(base))
    if not wanted:
        # Of a GGUF file the metadata say which kind of model it is, as config.json does of a folder.
        if not causal:
            return None
        if not (path.is_dir() or gguf_paths(path)):
            return "the base is a file of weights without a tokenizer"
        if missing := [name for name in ("torch", "transformers") if find_spec(name) is None]:
            return f"{' and '.join(missing)} must be installed to run the base"
        operations = 2.0 * TOKENS * adapters * sum(tensor.size for tensor in model.tensors.values())
        if operations / (CPU * processor_count()) > PATIENCE and not _fits_gpu(operations, model):
            time = duration(operations / (CPU * processor_count()))
            return f"running the base would take about {time}"
    return ""


def _fits_gpu(operations: float, model: Base) -> bool:
    """Whether a GPU runs the base in time, and has the memory for its weights in float32."""
    import torch

    if not torch.cuda.is_available() or operations / GPU > PATIENCE:
        return False
    return bool(torch.cuda.mem_get_info()[0] > 5 * sum(tensor.size for tensor in model.tensors.values()))
