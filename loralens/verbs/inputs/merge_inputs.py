"""The inputs of a merge, which `verify` shares: adapters with weights, the files of the base, and the plan."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from loralens.core.adapter import Adapter
from loralens.core.fingerprint import fingerprint
from loralens.core.names import select
from loralens.errors import FormatError, LoraLensError, place
from loralens.formats.files.apart import Input, adapter_inputs
from loralens.formats.files.container import read_json
from loralens.formats.files.json_text import dumps
from loralens.formats.models.checkpoint import model_config, open_checkpoint, resolve_path, stores_conv1d
from loralens.formats.models.float8 import scales_of
from loralens.formats.models.model_files import CONFIG, ModelFiles, model_files
from loralens.merging.plan import MergePlan
from loralens.merging.planning import plan_merge
from loralens.merging.recast import recast, recast_dtype
from loralens.verbs.inputs.adapters import Reading, labels, path_of, read_adapter
from loralens.verbs.inputs.bases import ModelPath, warn_of_bases
from loralens.verbs.inputs.weighted import Pair


@dataclass(frozen=True, slots=True)
class WeightedAdapter:
    """An adapter of a merge.

    Attributes
    ----------
    label : str
        Its path, or what an object is called.
    adapter : Adapter
        The modules that are merged, and what belongs to them.
    weight : float
        How many times the update counts.
    path : Path or None
        Where it was read from; None of an object.
    """

    label: str
    adapter: Adapter
    weight: float
    path: Path | None

    def record(self) -> dict[str, Any]:
        """Path, weight and fingerprint, as certificates and undo files state them; reads all of the adapter."""
        return {"path": self.label, "weight": self.weight, "fingerprint": fingerprint(self.adapter)}


@dataclass(frozen=True, slots=True)
class MergeInputs:
    """Adapters and base, read and matched.

    Attributes
    ----------
    base : str
        As given.
    dtypes : mapping of str to dtype
        Of every planned tensor as it will be written.
    dtype : str or None
        The dtype of the whole model that was asked for.
    """

    base: str
    files: ModelFiles
    plan: MergePlan
    dtypes: Mapping[str, np.dtype[Any]]
    adapters: Sequence[WeightedAdapter]
    dtype: str | None = None

    @property
    def narrowest(self) -> str:
        """The dtype of the adapted weights that holds least of an update."""
        dtypes = [self.dtypes[key] for key, tensor in self.plan.tensors.items() if tensor.slabs]
        return str(min(dtypes, key=lambda dtype: (dtype.itemsize, str(dtype)), default="float32"))

    def places(self, base: str = "the base") -> list[Input]:
        """What is read, in words and where it is; ``base`` in words."""
        paths = [str(adapter.path) for adapter in self.adapters if adapter.path]
        adapters = [place for path in paths for place in adapter_inputs(path)]
        return [(base, self.files.root), (base, Path(self.base)), *adapters]

    def texts(self) -> dict[str, str]:
        """Files beside the weights that change."""
        path = self.files.root / CONFIG
        if not self.plan.config or not path.is_file():
            return {}
        content = {**read_json(path), **self.plan.config}
        content = {name: value for name, value in content.items() if not (value is None and name in self.plan.config)}
        return {CONFIG: dumps(content)}

    def originals(self) -> dict[str, Any]:
        """What the undo file keeps of the base besides numbers: texts that change, headers of shards."""
        root = self.files.root
        names = [*self.texts(), *(index.name for index in self.files.indices)]
        return {
            "dropped": list(self.plan.dropped),
            "texts": {name: (root / name).read_bytes().decode("utf-8") for name in names},
            "headers": {shard.name: shard.header[8:].decode("utf-8") for shard in self.files.shards},
        }


def read_merge_inputs(
    adapters: Sequence[Pair],
    base: ModelPath,
    reading: Reading,
    *,
    modules: Sequence[str] = (),
    allow_missing: bool = False,
    untie: bool | None = None,
    dtype: str | None = None,
) -> MergeInputs:
    """Read and plan everything; no number of the base is read yet.

    Parameters
    ----------
    adapters : sequence of (path or Adapter, float)
    base : path
    reading : Reading
    modules : sequence of str
        Only these modules of the adapters: globs over names or kinds.
    allow_missing : bool
        Leave out modules that have no weight in the base.
    untie : bool, optional
        Whether a head that shares the embedding's weight gets one of its own; None: as the adapters need.
    dtype : str, optional
        NumPy's name of the dtype of the merged model; None: every tensor keeps its own.

    Raises
    ------
    FormatError
        A file that cannot be read, a quantised base, or an adapter whose update is no change of the base.
    MismatchError
        Adapters and base do not fit together.
    OptionError
        A glob that matches nothing, or an option that contradicts the adapters.
    """
    names = labels([source for source, _ in adapters])
    weighted: list[WeightedAdapter] = []
    for label, (source, weight) in zip(names, adapters, strict=True):
        adapter = read_adapter(source, reading, base=base, applies_all=True, label=label)
        weighted.append(WeightedAdapter(label, _select_modules(adapter, label, modules), weight, path_of(source)))
    warn_of_bases(names, [term.adapter for term in weighted])
    path = Path(base)
    open_checkpoint(path)  # refuses quantised weights, whose numbers are codes
    files, config = model_files(resolve_path(path)), model_config(path) or {}
    with place(base):
        scales = scales_of(files.tensors, config)
    try:
        planned = plan_merge(
            [(term.adapter, term.weight) for term in weighted],
            {key: tensor for key, tensor in files.tensors.items() if key not in scales.keys},
            config=config,
            conv1d=stores_conv1d(path),
            allow_missing=allow_missing,
            untie=untie,
            dtype=dtype,
            scales=scales.spread,
        )
    except LoraLensError as error:  # of an adapter by itself, or of the two together
        raise error.at(", ".join(names) if isinstance(error, FormatError) else str(base)) from None
    planned = recast(planned, files.tensors, dtype, scales=scales.spread, without=scales.keys, config=config)
    dtypes = {key: recast_dtype(tensor, dtype) for key, tensor in planned.tensors.items()}
    return MergeInputs(str(base), files, planned, dtypes, weighted, dtype)


def _select_modules(adapter: Adapter, label: str, modules: Sequence[str]) -> Adapter:
    """The modules that were asked for, and the stored tensors that belong to them."""
    if not modules:
        return adapter
    with place(label):
        names = set(select(adapter, modules))
    extra = {key: tensor for key, tensor in adapter.extra.items() if tensor.module in names}
    return replace(adapter, modules={name: adapter[name] for name in names}, extra=extra)
