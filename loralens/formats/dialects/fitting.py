"""Names and divides the modules of an adapter as the dialect that is written requires."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from loralens.core.adapter import Adapter
from loralens.formats.dialects.experts import fit_experts
from loralens.formats.files.container import Stored

OF_IMAGE_MODELS = ("kohya", "diffusers", "comfyui")  # dialects of the programs that load adapters of image models
# The beginnings of keys of metadata about the training, which none of these programs needs to load the file. Then the
# one such key that would be wrong in the new file: it holds a hash of the old tensors.
NOTES, OF_OLD_TENSORS = ("ss_", "modelspec."), "modelspec.hash_sha256"


def fit_to_dialect(
    dialect: str, adapter: Adapter, *, base_config: Mapping[str, Any] | None = None, arch: str | None = None
) -> Adapter:
    """The adapter, with its experts and its layers of image models named and divided as in ``dialect``.

    Parameters and errors are those of `fit_experts` and `fit_image`.
    """
    adapter = fit_experts(dialect, adapter, base_config=base_config, arch=arch)
    if dialect not in OF_IMAGE_MODELS:
        return adapter
    # Most adapters are of language models, and need no table of image models.
    from loralens.formats.dialects.image import fit_image

    return fit_image(dialect, adapter)


def carry_notes(dialect: str, adapter: Adapter, stored: Stored) -> Stored:
    """The file to write, with the metadata about the training that the adapter of another dialect has.

    Only dialects of image models carry such metadata, for example trigger words and tags. Metadata of the writer itself
    take precedence.
    """
    notes = {key: text for key, text in (adapter.metadata or {}).items() if key.startswith(NOTES)}
    notes.pop(OF_OLD_TENSORS, None)
    if dialect not in OF_IMAGE_MODELS or not notes:
        return stored
    return replace(stored, metadata={**notes, **(stored.metadata or {})})
