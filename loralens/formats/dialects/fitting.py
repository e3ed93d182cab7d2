"""Naming and dividing the modules of an adapter of another dialect as the dialect that is written has them."""

from collections.abc import Mapping
from typing import Any

from loralens.core.adapter import Adapter
from loralens.formats.dialects.experts import fit_experts

OF_IMAGE_MODELS = ("kohya", "diffusers", "comfyui")  # dialects of the programs that load adapters of image models


def fit(
    dialect: str, adapter: Adapter, *, base_config: Mapping[str, Any] | None = None, arch: str | None = None
) -> Adapter:
    """An adapter of another dialect with experts, and the layers of image models, named and divided as in ``dialect``.

    Parameters and errors are those of `fit_experts` and `fit_image`.
    """
    adapter = fit_experts(dialect, adapter, base_config=base_config, arch=arch)
    if dialect not in OF_IMAGE_MODELS:
        return adapter
    # Most adapters are of language models, and need no table of image models.
    from loralens.formats.dialects.image import fit_image

    return fit_image(dialect, adapter)
