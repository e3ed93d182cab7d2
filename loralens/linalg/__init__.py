"""Numerical functions of arrays, which know nothing about LoRA."""

from typing import TYPE_CHECKING

from loralens.exports import lazy_exports

if TYPE_CHECKING:
    from loralens.linalg.chance import overlap_chance as overlap_chance
    from loralens.linalg.chance import projection_moments as projection_moments
    from loralens.linalg.device import Device as Device
    from loralens.linalg.exact import ExactProduct as ExactProduct
    from loralens.linalg.factor import Basis as Basis
    from loralens.linalg.lanczos import LeadingTriplets as LeadingTriplets
    from loralens.linalg.lanczos import leading_triplets as leading_triplets
    from loralens.linalg.measures import effective_rank as effective_rank
    from loralens.linalg.measures import stable_rank as stable_rank
    from loralens.linalg.product import product_bases as product_bases
    from loralens.linalg.product import product_norm as product_norm
    from loralens.linalg.product import product_singular_values as product_singular_values
    from loralens.linalg.product import product_svd as product_svd
    from loralens.linalg.rounding import round_to_dtype as round_to_dtype
    from loralens.linalg.subspace import linear_cka as linear_cka
    from loralens.linalg.subspace import phi_map as phi_map
    from loralens.linalg.subspace import principal_angles as principal_angles
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
