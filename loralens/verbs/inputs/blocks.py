"""The options ``preset`` and ``block_weights`` of `scale` and `drop`: weights for the blocks of image models."""

from collections.abc import Mapping, Sequence
from typing import TypedDict

from loralens.core.adapter import Adapter
from loralens.errors import OptionError
from loralens.formats.dialects.image import model_of


class BlockWeights(TypedDict, total=False):
    """Weights for the blocks of SD, SDXL and FLUX.1, as block weight tools write them.

    Attributes
    ----------
    preset : str, optional
        The name of a preset, such as ``OUTALL``; docs/commands/scale.md lists them.
    block_weights : str, mapping or sequence of float, optional
        ``"IN04=0,MID=1"``, ``{"IN04": 0, "MID": 1}``, or the weights of all blocks in their order. They come after the
        preset, and blocks that neither names keep the weight 1.
    """

    preset: str | None
    block_weights: str | Mapping[str, float] | Sequence[float] | None


def weights_by_module(adapter: Adapter, options: BlockWeights) -> dict[str, float] | None:
    """The weight of each module; None if neither option is given.

    Raises
    ------
    OptionError
        The adapter is of no known image model, or the model has no such preset or block.
    """
    preset, blocks = options.get("preset"), options.get("block_weights")
    if preset is None and blocks is None:
        return None
    model = model_of(adapter)
    if model is None:
        raise OptionError(
            "weights of blocks are for adapters of SD 1.5, SD 2, SDXL and FLUX.1, and this one has other modules",
            fix="choose modules by their names: --modules GLOB",
        )
    # Imported here, since most adapters are scaled and cut without it.
    from loralens.core.naming.block_weights import weights_of_modules

    layers = {name: model.find(name, module.shape)[0] for name, module in adapter.items()}
    return weights_of_modules(model, layers, preset=preset, blocks=blocks)
