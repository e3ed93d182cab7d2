"""Quantised bases, told by the tensors that only they store, and refused by name: their numbers are codes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np

from loralens.core.lazy import LazyArray
from loralens.errors import FormatError

Tensors = Mapping[str, LazyArray]

FLOAT8_METHODS = frozenset({"fp8", "fbgemm_fp8", "compressed-tensors", "modelopt"})  # scales beside float8 weights


@final
@dataclass(frozen=True, slots=True)
class Quantisation:
    """One way to store codes instead of weights.

    Attributes
    ----------
    name : str
        As people know it.
    ends : tuple of str
        Ends of keys, each of which some tensor must have.
    codes : str
        End of the keys of the codes, and their dtype, where the keys alone do not tell.
    dtype : str
    shaped : bool
        Whether codes lie in the weight's own shape, under its own key.
    """

    name: str
    ends: tuple[str, ...]
    codes: str = ""
    dtype: str = ""
    shaped: bool = False


# In the order in which they are asked.
QUANTISATIONS = (
    Quantisation("bitsandbytes NF4", (".quant_state.bitsandbytes__nf4",)),
    Quantisation("bitsandbytes FP4", (".quant_state.bitsandbytes__fp4",)),
    Quantisation("bitsandbytes 4-bit", (".absmax", ".quant_map")),
    Quantisation("bitsandbytes int8", (".SCB",), shaped=True),
    Quantisation("GPTQ", (".qweight", ".g_idx")),
    Quantisation("AWQ", (".qweight", ".qzeros", ".scales")),  # GPTQ too, where it leaves out g_idx: the config says
    Quantisation("MLX", (".scales",), codes=".weight", dtype="uint32"),
    Quantisation("compressed-tensors", (".weight_packed",)),
    Quantisation("NVFP4 (modelopt)", (".weight_scale_2",), codes=".weight", dtype="uint8"),
    Quantisation("MXFP4", ("_blocks", "_scales"), codes="_blocks", dtype="uint8"),
    Quantisation("HQQ", (".W_q",)),
    Quantisation("AQLM", (".codebooks", ".codes")),
    Quantisation("quanto", (".weight._data",)),
    Quantisation("integer", (".weight", ".weight_scale"), codes=".weight", dtype="int8", shaped=True),
)


def check_numbers(tensors: Tensors, config: Mapping[str, Any] | None) -> None:
    """Refuse a base whose weights are stored as codes.

    Raises
    ------
    FormatError
        It is quantised.
    """
    quantisation = _quantisation(tensors, config)
    if quantisation:
        raise _quantised_error(quantisation, config)


def check_shapes(tensors: Tensors, config: Mapping[str, Any] | None) -> None:
    """Refuse a base whose keys and shapes are not those of its weights.

    Raises
    ------
    FormatError
        It is quantised, and the codes do not lie in the shape of the weights.
    """
    quantisation = _quantisation(tensors, config)
    if quantisation and not quantisation.shaped:
        raise _quantised_error(quantisation, config)


def _quantisation(tensors: Tensors, config: Mapping[str, Any] | None) -> Quantisation | None:
    for quantisation in QUANTISATIONS:
        if all(_any_ends(tensors, end) for end in quantisation.ends) and (
            not quantisation.codes
            or any(
                key.endswith(quantisation.codes) and str(t.dtype) == quantisation.dtype for key, t in tensors.items()
            )
        ):
            return quantisation
    if any(
        key.endswith(".weight") and t.ndim >= 2 and np.issubdtype(t.dtype, np.integer) for key, t in tensors.items()
    ):
        return Quantisation(_stated_method(config) or "integer", (), shaped=True)
    return None


def _any_ends(keys: Iterable[str], end: str) -> bool:
    return any(key.endswith(end) for key in keys)


def _stated_method(config: Mapping[str, Any] | None) -> str:
    """The method that ``config.json`` names."""
    section = (config or {}).get("quantization_config")
    method = section.get("quant_method") if isinstance(section, dict) else None
    return ascii(method)[1:-1][:40] if isinstance(method, str) and method not in FLOAT8_METHODS else ""


def _quantised_error(quantisation: Quantisation, config: Mapping[str, Any] | None) -> FormatError:
    name = "GPTQ" if quantisation.name == "AWQ" and _stated_method(config) == "gptq" else quantisation.name
    source = (config or {}).get("_name_or_path")
    source_text = f" ({ascii(source)[1:-1][:80]})" if isinstance(source, str) and "/" in source else ""
    return FormatError(
        f"its weights are quantised: {name}{source_text}",
        fix="give the 16-bit model it was made from: an adapter trained on a quantised base fits that sibling",
    )
