"""What a model is called in an adapter that was trained on it, and a digest of its weights."""

import os
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from loralens.verbs.inputs.models import ModelSource

if TYPE_CHECKING:  # torch takes a second
    from torch import nn


def model_name(model: ModelSource) -> str:
    """The name of the base in the adapter: the Hub id or the package, or the name of the folder.

    For a model that was given as an object it is the name of the path from which it was loaded, or its class.
    """
    if isinstance(model, tuple):
        loaded_from = model[0].config.name_or_path
        return model_name(loaded_from) if loaded_from else type(model[0]).__name__
    if not Path(model).exists():
        return str(model)
    # The path is left out: it would mean nothing on another machine, and may contain the name of the user.
    folder = Path(os.path.realpath(model))
    cache = folder.parent.parent.name  # a Hub id in the cache: models--org--name/snapshots/…
    hub = folder.parent.name == "snapshots" and cache.startswith("models--")
    return cache.removeprefix("models--").replace("--", "/", 1) if hub else folder.name


def digest_of_model(model: "nn.Module") -> str:
    """The SHA-256 of the names, dtypes, shapes and numbers of the weights of a model, in hexadecimal."""
    import torch

    digest = sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        # As bytes, since NumPy does not know bfloat16.
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
