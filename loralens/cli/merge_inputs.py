"""What a merge starts from: adapters with their weights, the files of a base, and the plan; shared with verify."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loralens.cli import options

if TYPE_CHECKING:  # keeps numpy out of --help
    import numpy as np

    from loralens.core.adapter import Adapter
    from loralens.formats.model_files import ModelFiles
    from loralens.merge.plan import Plan


@dataclass(frozen=True, slots=True)
class Inputs:
    """Adapters and base, read and matched.

    Attributes
    ----------
    base : str
        As given.
    files : ModelFiles
    plan : Plan
    dtypes : mapping of str to dtype
        Of every planned tensor as it will be written.
    adapters : list of dict
        Path, weight and fingerprint of each.
    """

    base: str
    files: "ModelFiles"
    plan: "Plan"
    dtypes: "Mapping[str, np.dtype[Any]]"
    adapters: list[dict[str, Any]]

    def texts(self) -> dict[str, str]:
        """Files beside the weights that change."""
        path = self.files.root / "config.json"
        if not self.plan.config or not path.is_file():
            return {}
        content = {**json.loads(path.read_text(encoding="utf-8")), **self.plan.config}
        return {"config.json": json.dumps(content, indent=2, ensure_ascii=False) + "\n"}

    def originals(self) -> dict[str, Any]:
        """What the undo file keeps of the base besides numbers: texts that change, heads of shards."""
        root = self.files.root
        names = [*self.texts(), *(index.name for index in self.files.indices)]
        return {
            "added": [key for key, tensor in self.plan.tensors.items() if tensor.base is None],
            "texts": {name: (root / name).read_text(encoding="utf-8") for name in names},
            "headers": {shard.name: shard.header[8:].decode("utf-8") for shard in self.files.shards},
        }


def inputs(
    adapters: Sequence[str],
    base: str,
    modules: Sequence[str],
    reading: Mapping[str, Any],
    *,
    allow_missing: bool = False,
    untie: bool = False,
    dtype: str | None = None,
) -> Inputs:
    """Everything read and planned; no number of the base yet."""
    from loralens.core.fingerprint import fingerprint
    from loralens.errors import place
    from loralens.formats.checkpoint import model_config, open_checkpoint, resolved, stores_conv1d
    from loralens.formats.model_files import model_files
    from loralens.merge.planning import plan

    loaded = [(path, *_load(path, modules, reading)) for path in adapters]
    path = Path(base)
    checkpoint = open_checkpoint(path)
    with place(base):
        planned = plan(
            [(adapter, weight) for _, adapter, weight in loaded],
            checkpoint.tensors,
            config=model_config(path),
            conv1d=stores_conv1d(path),
            allow_missing=allow_missing,
            untie=untie,
        )
    files = model_files(resolved(path))
    planned = _recast(planned, files, dtype)
    return Inputs(
        base,
        files,
        planned,
        {
            key: _dtype(tensor.source.dtype if tensor.base is None else tensor.base.dtype, dtype)
            for key, tensor in planned.tensors.items()
        },
        [{"path": path, "weight": weight, "fingerprint": fingerprint(adapter)} for path, adapter, weight in loaded],
    )


def _load(path: str, modules: Sequence[str], reading: Mapping[str, Any]) -> "tuple[Adapter, float]":
    """An adapter and how strongly it counts; only the modules asked for, with what belongs to them."""
    from loralens.core.names import select
    from loralens.errors import place
    from loralens.formats import load

    path, weight = options.weighted(path)
    adapter = load(path, **reading)
    options.warn(path, adapter)
    if not modules:
        return adapter, weight
    with place(path):
        chosen = set(select(adapter, modules))
    kept = {key: one for key, one in adapter.extra.items() if one.module in chosen}
    return replace(adapter, modules={name: adapter[name] for name in chosen}, extra=kept), weight


def _dtype(stored: "np.dtype[Any]", wanted: str | None) -> "np.dtype[Any]":
    """The dtype of a tensor in the merged model: only floats of 16 bits and more are changed."""
    import ml_dtypes  # noqa: F401 - teaches NumPy the name bfloat16
    import numpy as np

    if wanted is None or stored.kind not in "fV" or stored.itemsize < 2:
        return stored
    return np.dtype(wanted)


def _recast(plan: "Plan", files: "ModelFiles", dtype: str | None) -> "Plan":
    """The plan with every other tensor that changes its dtype, and what the configuration says of it."""
    from loralens.merge.plan import TensorPlan, as_matrix

    if dtype is None:
        return plan
    others = {
        key: TensorPlan(key, tensor, as_matrix(tensor.shape))
        for key, tensor in files.tensors.items()
        if key not in plan.tensors and _dtype(tensor.dtype, dtype) != tensor.dtype
    }
    config = dict(plan.config)
    path = files.root / "config.json"
    said = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    config |= {name: dtype for name in ("torch_dtype", "dtype") if name in said}
    return replace(plan, tensors={**plan.tensors, **others}, config=config)
