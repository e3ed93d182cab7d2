"""Recognise quantised bases that cannot be read, so that their codes are not taken for weights.

They are recognised by the keys and dtypes of their tensors. The layouts that can be read are in
`loralens.formats.models.low_bit`, and their tensors are decoded before this check.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from loralens.core.lazy import LazyArray
from loralens.errors import FormatError

Tensors = Mapping[str, LazyArray]

# Methods of ``quantization_config`` that store float8 weights with scales. Some of them can also store codes, and the
# name of the method does not say which of the two a model has.
FLOAT8_METHODS = frozenset({"fp8", "fbgemm_fp8", "compressed-tensors", "modelopt"})


class Quantisation(NamedTuple):
    """A method of quantisation, and how its files are recognised.

    Attributes
    ----------
    ends
        Ends of keys. The model must have keys with all of these ends.
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


# The first match counts. If the files of one method also contain the ends of another, the first is listed earlier.
QUANTISATIONS = (
    # Files of older versions, which have no quant_state. With one they can be read.
    Quantisation("bitsandbytes 4-bit", (".absmax", ".quant_map")),
    # GPTQ and AWQ come here only in packings that cannot be read.
    Quantisation("GPTQ", (".qweight", ".g_idx")),
    # GPTQ without g_idx has the same keys; `check_not_quantised` then takes the name from the configuration.
    Quantisation("AWQ", (".qweight", ".qzeros", ".scales")),
    Quantisation("compressed-tensors", (".weight_packed",)),
    Quantisation("HQQ", (".W_q",)),
    Quantisation("AQLM", (".codebooks", ".codes")),
    Quantisation("quanto", (".weight._data",)),
    Quantisation("integer", (".weight", ".weight_scale"), codes=".weight", dtype="int8", shaped=True),
)


def check_not_quantised(tensors: Tensors, config: Mapping[str, Any] | None, *, only_shapes: bool = False) -> None:
    """Refuse a base whose weights are stored as codes.

    With ``only_shapes``, codes that have the keys and the shapes of the weights are accepted.

    Raises
    ------
    FormatError
        It is quantised. The message names the method and, if the configuration does, the model it was made from.
    """
    quantisation = _quantisation(tensors, config)
    if quantisation is None or (only_shapes and quantisation.shaped):
        return
    # GPTQ without g_idx has the keys of AWQ, so only the configuration tells them apart.
    name = "GPTQ" if quantisation.name == "AWQ" and _stated_method(config) == "gptq" else quantisation.name
    source = (config or {}).get("_name_or_path")
    source_text = f" ({ascii(source)[1:-1][:80]})" if isinstance(source, str) and "/" in source else ""
    fix = "give the 16-bit model it was made from: an adapter that was trained on the quantised base fits it"
    raise FormatError(f"its weights are quantised: {name}{source_text}", fix=fix)


def _quantisation(tensors: Tensors, config: Mapping[str, Any] | None) -> Quantisation | None:
    for quantisation in QUANTISATIONS:
        ends = all(any(key.endswith(end) for key in tensors) for end in quantisation.ends)
        coded = (str(t.dtype) == quantisation.dtype for key, t in tensors.items() if key.endswith(quantisation.codes))
        if ends and (not quantisation.codes or any(coded)):
            return quantisation
    # Weights are matrices of floating point numbers. Matrices of integers are codes of a method not listed above.
    matrices = (t for key, t in tensors.items() if key.endswith(".weight") and t.ndim >= 2)
    if any(np.issubdtype(matrix.dtype, np.integer) for matrix in matrices):
        return Quantisation(_stated_method(config) or "integer", (), shaped=True)
    return None


def _stated_method(config: Mapping[str, Any] | None) -> str:
    """The method that ``config.json`` names; empty for none, and for methods that may store float8 weights."""
    section = (config or {}).get("quantization_config")
    method = section.get("quant_method") if isinstance(section, dict) else None
    return ascii(method)[1:-1][:40] if isinstance(method, str) and method not in FLOAT8_METHODS else ""
