"""What a merge starts from: adapters with their weights, the files of a base, and the plan; shared with verify."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loralens.cli import options
from loralens.cli.bases import warn_of_bases

if TYPE_CHECKING:  # keeps numpy out of --help
    import numpy as np

    from loralens.core.adapter import Adapter
    from loralens.formats.files.apart import Input
    from loralens.formats.models.model_files import ModelFiles
    from loralens.merging.plan import Plan


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
    dtype : str or None
        That was asked for.
    """

    base: str
    files: "ModelFiles"
    plan: "Plan"
    dtypes: "Mapping[str, np.dtype[Any]]"
    adapters: list[dict[str, Any]]
    dtype: str | None = None

    @property
    def narrowest(self) -> str:
        """The dtype of the adapted weights that holds least of an update."""
        held = [self.dtypes[key] for key, tensor in self.plan.tensors.items() if tensor.slabs]
        return str(min(held, key=lambda one: (one.itemsize, str(one)), default="float32"))

    def places(self, base: str = "the base") -> "list[Input]":
        """What is read, in words and where it is; ``base`` in words."""
        from loralens.formats.files.apart import adapter_inputs

        adapters = [found for adapter in self.adapters for found in adapter_inputs(adapter["path"])]
        return [(base, self.files.root), (base, Path(self.base)), *adapters]

    def texts(self) -> dict[str, str]:
        """Files beside the weights that change."""
        from loralens.formats.models.model_files import CONFIG

        path = self.files.root / CONFIG
        if not self.plan.config or not path.is_file():
            return {}
        from loralens.formats.files.container import dumps, read_json

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


def inputs(
    adapters: Sequence[str],
    base: str,
    modules: Sequence[str],
    reading: Mapping[str, Any],
    *,
    allow_missing: bool = False,
    untie: bool | None = None,
    dtype: str | None = None,
) -> Inputs:
    """Everything read and planned; no number of the base yet."""
    from loralens.core.fingerprint import fingerprint
    from loralens.errors import FormatError, LoraLensError, place
    from loralens.formats.models.checkpoint import model_config, open_checkpoint, resolved, stores_conv1d
    from loralens.formats.models.float8 import scales_of
    from loralens.formats.models.model_files import model_files
    from loralens.merging.planning import plan
    from loralens.merging.recast import recast, recast_dtype

    loaded = [_load(path, base, modules, reading) for path in adapters]
    warn_of_bases([path for path, _, _ in loaded], [adapter for _, adapter, _ in loaded])
    path = Path(base)
    open_checkpoint(path)  # refuses quantised weights, whose numbers are codes
    files, config = model_files(resolved(path)), model_config(path) or {}
    with place(base):
        scales = scales_of(files.tensors, config)
    try:
        planned = plan(
            [(adapter, weight) for _, adapter, weight in loaded],
            {key: tensor for key, tensor in files.tensors.items() if key not in scales.keys},
            config=config,
            conv1d=stores_conv1d(path),
            allow_missing=allow_missing,
            untie=untie,
            dtype=dtype,
            scales=scales.spread,
        )
    except LoraLensError as error:  # of an adapter by itself, or of the two together
        raise error.at(", ".join(adapters) if isinstance(error, FormatError) else base) from None
    planned = recast(planned, files.tensors, dtype, scales=scales.spread, without=scales.keys, config=config)
    return Inputs(
        base,
        files,
        planned,
        {key: recast_dtype(tensor, dtype) for key, tensor in planned.tensors.items()},
        [{"path": path, "weight": weight, "fingerprint": fingerprint(adapter)} for path, adapter, weight in loaded],
        dtype,
    )


def _load(path: str, base: str, modules: Sequence[str], reading: Mapping[str, Any]) -> "tuple[str, Adapter, float]":
    """What ``ADAPTER[:W]`` says: path, adapter (of the modules asked for, and what belongs to them), and weight."""
    from loralens.core.names import select
    from loralens.errors import place

    path, weight = options.weighted(path)
    adapter = options.read_adapter(path, reading, base=base, whole=True)
    if not modules:
        return path, adapter, weight
    with place(path):
        chosen = set(select(adapter, modules))
    kept = {key: one for key, one in adapter.extra.items() if one.module in chosen}
    return path, replace(adapter, modules={name: adapter[name] for name in chosen}, extra=kept), weight
