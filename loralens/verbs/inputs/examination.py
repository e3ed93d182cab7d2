"""Adapters prepared for the checks of the doctor, for the verbs that show findings: `doctor` and `report`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from loralens.analysis.checks.examination import Examination, Saving
from loralens.analysis.checks.merge_effect import Base
from loralens.analysis.doctor import examine_all
from loralens.core.adapter import Adapter
from loralens.core.progress import progress
from loralens.formats.dialects.table import FORMATS
from loralens.formats.models.checkpoint import stores_conv1d
from loralens.verbs.inputs.adapters import Reading, command_line_options
from loralens.verbs.inputs.bases import ModelPath, base_model_at, base_model_of, read_checkpoint, with_tied_head


def open_base(base: ModelPath) -> Base:
    """Open the model that adapters are compared with; a head that shares the weight of the embedding is included."""
    # Tensors are only opened here: the checks read those that an adapter has a module for.
    checkpoint = read_checkpoint(base)
    tensors = with_tied_head(checkpoint.tensors, base)
    return Base(str(base), tensors, stores_conv1d(Path(base)), checkpoint.float8, base_model_at(base), checkpoint.coded)


def examine_adapters(
    adapters: Mapping[str, Adapter],
    *,
    base: Base | None,
    modules: Sequence[str],
    reading: Reading,
    dtype: str | None = None,
    stochastic: bool = False,
    saving: Saving | None = None,
) -> list[Examination]:
    """Read every adapter once, and prepare it for `loralens.analysis.doctor.run_checks`.

    Parameters
    ----------
    adapters : mapping of str to Adapter
        The adapters by their labels.
    base : Base or None
    modules : sequence of str
        Globs over module names or kinds; all modules if empty.
    reading : Reading
        The options of reading, which the commands in remedies repeat.
    dtype : str, optional
        The dtype of a merged model; by default that of each weight.
    stochastic : bool
        Whether a merge rounds stochastically instead of to the nearest number.
    saving : callable, optional
        What a smaller file would save, see `Examination`.
    """
    # A module is read, and then compared with its weight. The second takes longer, as the whole weight is read.
    rounds = 2 if base else 1
    with progress("examining", rounds * sum(map(len, adapters.values()))) as step:
        examinations = examine_all(
            adapters,
            base=base,
            dtype=dtype,
            stochastic=stochastic,
            modules=modules,
            # Remedies for an adapter of a dialect without a writer write PEFT's.
            only_read={form.name for form in FORMATS if not form.writer},
            # A remedy that leaves out --alpha would fail, or give another adapter.
            reading=command_line_options(reading),
            named={label: base_model_of(adapter) for label, adapter in adapters.items()},
            step=step,
        )
    if saving is not None:
        examinations = [replace(exam, saving=saving) for exam in examinations]
    if base is None or not base.coded:
        return examinations
    from loralens.verbs.inputs.code_prediction import predict_codes  # with the code of merging, for few bases

    # The longest part: some rows of every weight are decoded.
    with progress("predicting the merge", sum(len(exam.readings) for exam in examinations)) as step:
        return [
            replace(exam, codes=predict_codes(exam.adapter, base, modules=modules, step=step)) for exam in examinations
        ]
