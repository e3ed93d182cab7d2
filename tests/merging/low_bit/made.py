"""A planned merge into one coded weight, with the stored tensor of its codes."""

from dataclasses import replace
from itertools import pairwise

import numpy as np

from loralens import LowRank
from loralens.core import LazyArray
from loralens.merging.codec import GridCodec, prepare
from loralens.merging.merge_plan import Segment, TensorPlan
from loralens.merging.merge_record import MergeRecorder
from loralens.merging.merge_rounding import MergeRounding
from tests.draws import draw_factors
from tests.merging.low_bit.grids import grid, weight


class Made:
    """A weight (out, in), a pair for all of its rows or for two parts of them, and the stored bytes."""

    def __init__(self, layout="Q4_1", rows=24, columns=64, *, size=1e-3, parts=1, seed=0):
        rng = np.random.default_rng(seed)
        self.grid = grid(layout, rows, columns, seed=seed)
        self.weight = weight(self.grid, layout)
        edges = np.linspace(0, rows, parts + 1).astype(int).tolist()
        self.segments = tuple(
            Segment(f"m{i}", start, stop, ((1.0, LowRank(*draw_factors(rng, stop - start, columns, 3, "f4"), size)),))
            for i, (start, stop) in enumerate(pairwise(edges))
        )
        self.plan = TensorPlan("w", self.weight.floats(), (rows, columns), self.segments)

    @property
    def D(self):
        return np.vstack([strength * one.dense() for segment in self.segments for strength, one in segment.terms])

    def merge(self, mode="stochastic", **options):
        rounding = MergeRounding(mode, key="w", **options)
        return prepare(GridCodec(self.plan, self.weight, rounding, self.weight.stored, self.stored()))

    def bytes_of(self, codes):
        return self.weight.encode(0, codes)

    def stored(self, codes=None):
        data = np.ascontiguousarray(self.bytes_of(self.grid.codes if codes is None else codes))
        return LazyArray.of(data)

    def file_bytes(self, blocks):
        """What the writer makes of the bytes of the rows in their own order."""
        rows, order = list(blocks), self.weight.row_order
        data = np.concatenate(rows)
        return (data if order is None else data[np.argsort(order)]).reshape(-1)

    def reordered(self, order):
        """The same weight with its rows elsewhere in the file; row i is at order[i]."""
        inner, order = self.weight, np.asarray(order, np.intp)
        self.weight = replace(inner, row_order=order)
        self.bytes_of = lambda codes: inner.encode(0, codes)[np.argsort(order)]
        return self

    def in_one(self):
        """The same weight in a layout whose bytes are made of all codes at once, columns first."""
        inner = self.weight

        def encode(start, codes):
            assert start == 0
            return np.ascontiguousarray(inner.encode(0, codes).T).reshape(-1)

        self.weight = replace(inner, by_rows=False, encode=encode)
        return self


def merged(made, mode="stochastic", **options):
    """The merged bytes and the record of the merge."""
    recorder = MergeRecorder(made.merge(mode, **options))
    return made.file_bytes(recorder.blocks()), recorder.record()
