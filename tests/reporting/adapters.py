"""Adapters of known spectra that several tests of the report share."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

import loralens
from loralens import Adapter, Diagnosis, LowRank
from loralens.analysis import examine_all
from loralens.core import Scaling
from loralens.formats import encode_adapter
from loralens.reporting.document import Report
from loralens.reporting.make import make_report
from loralens.reporting.subject import Dialect, Subject, measure_collection, measure_subject
from loralens.verbs.pages.page import pairs_table, subject_tables

NAMES = [f"model.layers.{block}.self_attn.{kind}" for block in range(3) for kind in ("q_proj", "v_proj")]


def drawn(seed: int = 0, *, rank: int = 6, names: Sequence[str] = NAMES, width: int = 20) -> Adapter:
    """An adapter with falling spectra, other ones in every module, and two widths."""
    rng = np.random.default_rng(seed)
    modules = {}
    for i, name in enumerate(names):
        fall = rng.uniform(0.2, 0.9) ** np.arange(rank)
        B = rng.standard_normal((width + 4 * (i % 2), rank)) * fall
        A = rng.standard_normal((rank, width))
        modules[name] = LowRank(
            B.astype(np.float32), A.astype(np.float32), 2.0, scaling=Scaling("alpha/r", 2 * rank, rank)
        )
    return loralens.Adapter(modules=modules, base_model="tiny/base")


def dense_of(adapter: Adapter) -> dict[str, np.ndarray]:
    """ΔW of every module by its definition, in float64."""
    return {n: float(m.scale) * m.B.astype(np.float64) @ m.A.astype(np.float64) for n, m in adapter.items()}


def dialect(name: str = "peft", *, one_rank: bool = False) -> Dialect:
    return Dialect(name, lambda adapter: encode_adapter(adapter, name), one_rank)


def measured(adapters: Mapping[str, Adapter], to: Dialect | None = None) -> list[Subject]:
    return [measure_subject(one, one.path, to or dialect()) for one in examine_all(adapters)]


def report(subjects: Sequence[Subject], findings: Sequence[Diagnosis], **options: Any) -> Report:
    """The report of subjects and of their comparison, with the tables that the verb gives it."""
    subjects = [replace(subject, tables=subject_tables(subject)) for subject in subjects]
    together = measure_collection(subjects) if len(subjects) > 1 else None
    table = together and pairs_table([subject.label for subject in subjects], together)
    return make_report(subjects, findings, collection=together and replace(together, table=table), **options)
