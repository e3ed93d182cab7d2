"""Recognising quantised base models by the tensors that only they store. They are refused: their numbers are codes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np

from loralens.core.lazy import LazyArray
from loralens.errors import FormatError

Tensors = Mapping[str, LazyArray]

# Methods of ``quantization_config`` that store float8 weights with scales, among them methods that store codes too. The
# name of such a method does not say which it is.
FLOAT8_METHODS = frozenset({"fp8", "fbgemm_fp8", "compressed-tensors", "modelopt"})


@final
@dataclass(frozen=True, slots=True)
class Quantisation:
    """A method of quantisation, and how its files are recognised.

    Attributes
    ----------
    ends
        Ends of keys. For each of them some key must have this end.
    codes, dtype
        The end of the keys of the codes, and their dtype, if ``ends`` are not unique to the method.
    shaped
        Whether the codes have the shape and the key of the weight.
    """

    name: str
    ends: tuple[str, ...]
    codes: str = ""
    dtype: str = ""
    shaped: bool = False


# The first one that fits is taken, so a method comes before those whose ends its own files have too.
QUANTISATIONS = (
    Quantisation("bitsandbytes NF4", (".quant_state.bitsandbytes__nf4",)),
    Quantisation("bitsandbytes FP4", (".quant_state.bitsandbytes__fp4",)),
    Quantisation("bitsandbytes 4-bit", (".absmax", ".quant_map")),
    Quantisation("bitsandbytes int8", (".SCB",), shaped=True),
    Quantisation("GPTQ", (".qweight", ".g_idx")),
    # GPTQ without g_idx has the same keys; `_quantised_error` then takes the name from the configuration.
    Quantisation("AWQ", (".qweight", ".qzeros", ".scales")),
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
        It is quantised, and the codes do not have the shape of the weights.
    """
    quantisation = _quantisation(tensors, config)
    if quantisation and not quantisation.shaped:
        raise _quantised_error(quantisation, config)


def _quantisation(tensors: Tensors, config: Mapping[str, Any] | None) -> Quantisation | None:
    for quantisation in QUANTISATIONS:
        if all(any(key.endswith(end) for key in tensors) for end in quantisation.ends) and (
            not quantisation.codes
            or any(
                key.endswith(quantisation.codes) and str(t.dtype) == quantisation.dtype for key, t in tensors.items()
            )
        ):
            return quantisation
    # Weights are matrices of floating point numbers. Matrices of integers are codes of a method not listed above.
    if any(
        key.endswith(".weight") and t.ndim >= 2 and np.issubdtype(t.dtype, np.integer) for key, t in tensors.items()
    ):
        return Quantisation(_stated_method(config) or "integer", (), shaped=True)
    return None


def _stated_method(config: Mapping[str, Any] | None) -> str:
    """The method that ``config.json`` names; empty for none, and for methods that may store float8 weights."""
    section = (config or {}).get("quantization_config")
    method = section.get("quant_method") if isinstance(section, dict) else None
    return ascii(method)[1:-1][:40] if isinstance(method, str) and method not in FLOAT8_METHODS else ""


def _quantised_error(quantisation: Quantisation, config: Mapping[str, Any] | None) -> FormatError:
    # The keys are the same, so only the configuration knows.
    name = "GPTQ" if quantisation.name == "AWQ" and _stated_method(config) == "gptq" else quantisation.name
    source = (config or {}).get("_name_or_path")
    source_text = f" ({ascii(source)[1:-1][:80]})" if isinstance(source, str) and "/" in source else ""
    return FormatError(
        f"its weights are quantised: {name}{source_text}",
        fix="give the 16-bit model it was made from: an adapter trained on a quantised base fits that sibling",
    )
