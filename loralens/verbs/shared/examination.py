"""Adapters prepared for the checks of the doctor, for the verbs that show findings: `doctor` and `report`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import NamedTuple

import numpy as np

from loralens.analysis.diagnosis import CodesPrediction, Examination, Saving
from loralens.analysis.doctor import examine_all
from loralens.analysis.merge_effect import Base
from loralens.core.adapter import Adapter
from loralens.core.messages import progress
from loralens.core.model_in_memory import ModelPath
from loralens.core.threads import Step
from loralens.errors import LoraLensError
from loralens.formats.dialects.dialect_table import FORMATS
from loralens.formats.models.checkpoint import model_config
from loralens.merging.codec import GridCodec, TensorMerge, prepare
from loralens.merging.fidelity import DrawPrediction, join_rows
from loralens.merging.merge_plan import Segment
from loralens.merging.merge_rounding import MergeRounding, input_directions
from loralens.merging.planning import plan_merge
from loralens.verbs.shared.adapters import (
    base_model_at,
    base_model_of,
    command_line_options,
    only_modules,
    read_checkpoint,
    with_tied_head,
)
from loralens.verbs.shared.options import Reading

SAMPLE = 1 << 18  # entries of a module from which the prediction is made, as of the other predictions of the doctor


class _Share(NamedTuple):
    """The prediction of one module from a sample.

    ``weight`` is the number of its entries for each one in the sample, and ``in_own`` says whether the error in its own
    directions is predicted too.
    """

    prediction: DrawPrediction
    weight: float
    in_own: bool


def predict_codes(
    adapter: Adapter, base: Base, *, modules: Sequence[str] = (), step: Step | None = None
) -> CodesPrediction | None:
    """What a merge that keeps codes would do; None for a base of floats, or an adapter that does not fit it.

    ``step`` is called with 1 for every module whose weight is coded.
    """
    if not base.coded:
        return None
    try:
        plan = plan_merge(
            [(only_modules(adapter, modules), 1.0)],
            base.tensors,
            config=model_config(Path(base.name)) or {},
            conv1d=base.conv1d,
            allow_missing=True,
        )
        shares: dict[str, _Share] = {}
        layouts = []
        for key, tensor in plan.tensors.items():
            weight = base.coded.get(key)
            if weight is None:
                continue
            codec = GridCodec(tensor, weight, MergeRounding("stochastic", key=key))
            merge = prepare(codec)
            layouts.append(weight.layout)
            for segment in tensor.segments:
                # A module that was split into pieces is one step.
                if step and segment.module not in shares:
                    step(1)
                shares[segment.module] = _predict(merge, codec, segment)
    except LoraLensError:
        # Whatever is wrong is reported by the checks of names, shapes and numbers.
        return None
    return replace(_summary(shares, layouts), base=base.name) if shares else None


def _predict(merge: TensorMerge, codec: GridCodec, segment: Segment) -> _Share:
    """The prediction of one segment, from rows spread evenly over it."""
    columns, rows = merge.plan.matrix[1], segment.stop - segment.start
    picked = np.unique(np.linspace(segment.start, segment.stop - 1, max(1, SAMPLE // columns)).astype(int))
    prediction = DrawPrediction()
    V = None if segment.transposed else input_directions(segment.terms)
    grids, updates = [], []
    # Calls for single rows would take most of the time: neighbours are read together, and all are predicted at once.
    for neighbours in np.split(picked, np.flatnonzero(np.diff(picked) > 1) + 1):
        start, stop = int(neighbours[0]), int(neighbours[-1]) + 1
        grids.append(codec.rows(start, stop))
        updates.append(codec.added(grids[-1], *merge.update(segment, start, stop)))
    prediction.take(join_rows(grids), np.concatenate(updates), directions=V)
    return _Share(prediction, rows / len(picked), V is not None)


def _summary(shares: dict[str, _Share], layouts: Sequence[str]) -> CodesPrediction:
    def total(name: str) -> float:
        return float(sum(getattr(share.prediction, name) * share.weight for share in shares.values()))

    energy, entries = total("energy"), max(total("entries"), 1)
    known = energy > 0 and all(share.in_own for share in shares.values())
    return CodesPrediction(
        " and ".join(dict.fromkeys(layouts)),
        1 - total("lost") / energy if energy else 1.0,
        sqrt(total("variance") / energy) if energy else 0.0,
        sqrt(total("own") / energy) if known else None,
        total("moving") / entries,
        total("clipped") / entries,
        total("steps") / entries,
        {name: share.prediction.noise for name, share in shares.items()},
    )


def open_base(base: ModelPath) -> Base:
    """Open the model that adapters are compared with; a head that shares the weight of the embedding is included."""
    # Tensors are only opened here: the checks read those that an adapter has a module for.
    checkpoint = read_checkpoint(base)
    tensors = with_tied_head(checkpoint.tensors, base)
    return Base(str(base), tensors, checkpoint.conv1d, checkpoint.float8, base_model_at(base), checkpoint.coded)


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

    # The longest part: some rows of every weight are decoded.
    with progress("predicting the merge", sum(len(exam.readings) for exam in examinations)) as step:
        return [
            replace(exam, codes=predict_codes(exam.adapter, base, modules=modules, step=step)) for exam in examinations
        ]
