"""How transformers loads the weights of a model: in a float dtype, or as codes of bitsandbytes (NF4 and int8)."""

from typing import TYPE_CHECKING, Any

from loralens.choices import CODES, FLOAT_TYPES
from loralens.requirements import missing_packages

if TYPE_CHECKING:  # torch takes a second
    from torch import device as Device  # noqa: N812


def weight_options(dtype: str, device: "Device") -> dict[str, Any]:
    """The keywords of ``from_pretrained`` for weights of a dtype of `loralens.choices.BaseDtype`.

    Raises
    ------
    OptionError
        bitsandbytes is not installed, which makes codes.
    """
    import torch

    if dtype not in CODES:
        return {"dtype": getattr(torch, FLOAT_TYPES[dtype])}
    try:
        import bitsandbytes  # noqa: F401
        from transformers import BitsAndBytesConfig
    except ImportError as error:
        raise missing_packages(f"a model in {dtype}", ("bitsandbytes",), error) from error
    # What is not coded, such as embeddings and norms, and the numbers in which coded layers compute.
    from loralens.training.precision import has_bfloat16

    make: Any = BitsAndBytesConfig  # without types
    other = torch.float32 if device.type == "cpu" else torch.bfloat16 if has_bfloat16(device) else torch.float16
    if dtype == "int8":
        config = make(load_in_8bit=True)
    else:
        # As in the QLoRA paper: the scales of the blocks are coded too.
        config = make(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=other,
        )
    return {"dtype": other, "quantization_config": config, "device_map": {"": device}}
