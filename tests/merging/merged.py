"""What a merge makes of tensors in memory, for tests that need no files."""

from typing import Any

import numpy as np

from loralens.merging.codec import prepare_merge
from loralens.merging.planning import plan_merge as plan_merge


def merged(tensor: Any, **options: Any) -> Any:
    """What `loralens.merge` writes for a planned tensor."""
    blocks = prepare_merge(tensor, **options).blocks()
    return np.concatenate([block.merged.copy() for block in blocks]).reshape(tensor.shape)


def merge_all(adapters: Any, base: Any, *, dtype: Any = None, **options: Any) -> dict[str, Any]:
    """Every tensor that adapters with weights change, merged, by key."""
    tensors = plan_merge(adapters, base, **options).tensors
    return {key: merged(tensor, dtype=dtype) for key, tensor in tensors.items()}
