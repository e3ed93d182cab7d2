"""Arrays in, arrays out; no word of LoRA."""

from typing import TYPE_CHECKING

from loralens.exports import lazy_exports

if TYPE_CHECKING:
    from loralens.linalg.basis import Basis
    from loralens.linalg.chance import overlap_chance, projection_moments
    from loralens.linalg.device import Device
    from loralens.linalg.exact import ExactProduct
    from loralens.linalg.lanczos import LeadingTriplets, leading_triplets
    from loralens.linalg.measures import effective_rank, stable_rank
    from loralens.linalg.product import product_bases, product_norm, product_singular_values, product_svd
    from loralens.linalg.quantise import quantise_product
    from loralens.linalg.rounding import round_to_dtype
    from loralens.linalg.subspace import linear_cka, phi_map, principal_angles

__all__ = [
    "Basis",
    "Device",
    "ExactProduct",
    "LeadingTriplets",
    "effective_rank",
    "leading_triplets",
    "linear_cka",
    "overlap_chance",
    "phi_map",
    "principal_angles",
    "product_bases",
    "product_norm",
    "product_singular_values",
    "product_svd",
    "projection_moments",
    "quantise_product",
    "round_to_dtype",
    "stable_rank",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "Basis": "basis",
        "Device": "device",
        "ExactProduct": "exact",
        "LeadingTriplets": "lanczos",
        "effective_rank": "measures",
        "leading_triplets": "lanczos",
        "linear_cka": "subspace",
        "overlap_chance": "chance",
        "phi_map": "subspace",
        "principal_angles": "subspace",
        "product_bases": "product",
        "product_norm": "product",
        "product_singular_values": "product",
        "product_svd": "product",
        "projection_moments": "chance",
        "quantise_product": "quantise",
        "round_to_dtype": "rounding",
        "stable_rank": "measures",
    },
)
