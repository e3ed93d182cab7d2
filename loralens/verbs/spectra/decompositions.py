"""The SVDs of base weights that a verb needs, read from a cache or computed."""

from collections.abc import Generator, Iterable, Mapping, Sequence
from pathlib import Path
from timeit import repeat

import numpy as np

from loralens.core.messages import note, progress, warn
from loralens.core.model_in_memory import ModelPath
from loralens.core.weights import Weight
from loralens.errors import FormatError, OptionError, place
from loralens.formats.records.cache import SvdCache, default_folder, svd_bytes, weight_digest
from loralens.linalg.device import Device
from loralens.linalg.lanczos import Decomposed, decompose
from loralens.tables.numbers import count, parse_size, size
from loralens.verbs.shared.options import SvdCaching

# Side of the matrix whose SVD is timed for an estimate: small, so that the estimate itself takes little time.
SAMPLE = 256


def svd_cache(options: SvdCaching) -> SvdCache | None:
    """The folder in which SVDs of weights are kept between runs; None with ``no_cache``.

    Raises
    ------
    OptionError
        Both a folder and ``no_cache`` were given, or ``cache_limit`` is not a size.
    """
    if options.no_cache and options.cache:
        raise OptionError("cache and no_cache exclude each other", fix="give one of the two")
    if options.no_cache:
        return None
    folder = Path(options.cache) if options.cache else default_folder()
    return SvdCache(folder, limit=parse_size(options.cache_limit))


def decompositions(
    weights: Mapping[str, Weight], cache: SvdCache | None, base: ModelPath, device: Device
) -> Generator[tuple[str, Decomposed], None, None]:
    """The SVDs of all weights, one after the other: read from the cache if they are there, else computed.

    A note says beforehand how long the missing ones take. Close the generator (`contextlib.closing`), so that its
    progress ends even if the caller fails.
    """
    # All weights are digested before any is decomposed, so that the note can say how many SVDs are missing.
    keys = {}
    with place(base):
        with progress("reading the base", len(weights)) as advance:
            for name, weight in weights.items():
                with place(name):
                    keys[name] = weight_digest(weight)
                if advance:
                    advance(1)
        missing = [name for name in weights if cache is None or keys[name] not in cache]
        _announce([weights[name] for name in missing], cache, device)
        with progress("working on the base", len(weights)) as advance:
            for name, weight in weights.items():
                W = cache.read(keys[name], weight.shape) if cache else None
                if W is None:
                    # The SVD was counted as kept, so its file exists but could not be read.
                    if name not in missing:
                        warn(f"the SVD kept for {name} is damaged: computed again")
                    with place(name):
                        W = decompose(weight.read(), device)
                    try:  # if the disk is full, the next run has to compute the SVD again, and this one goes on
                        if cache:
                            cache.write(keys[name], W)
                    except FormatError as error:
                        error.at("the SVDs are not kept")
                        warn(": ".join((*error.where, error.what)), error.fix)
                        cache = None
                yield name, W
                if advance:
                    advance(1)


def svd_seconds(weights: Iterable[Weight], device: Device) -> float:
    """An estimate of the time of dense SVDs on this machine, in seconds."""
    # The work is max·min² of the shape, up to a constant.
    total = sum(max(weight.shape) * min(weight.shape) ** 2 for weight in weights)
    # Less work than that of the sample takes milliseconds, and needs no generator of random numbers.
    if total <= SAMPLE**3:
        return 0.0
    W = np.random.default_rng(0).standard_normal((SAMPLE, SAMPLE))
    # The smaller of two timings: a disturbance can only make one longer, and the first one also warms up.
    return min(repeat(lambda: decompose(W, device), number=1, repeat=2)) / SAMPLE**3 * total


def duration(seconds: float) -> str:
    """A duration as text: ``45 s``, ``12 min``, ``1.5 h``."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _announce(weights: Sequence[Weight], cache: SvdCache | None, device: Device) -> None:
    """Note the time that the missing SVDs will take, and the disk space."""
    if not weights:
        return
    total = sum(map(svd_bytes, weights))
    time = duration(svd_seconds(weights, device))
    words = f"the SVD of {count(len(weights), 'weight')} of the base is computed first: about {time}"
    if cache:
        words += f", and {size(total)} kept in {cache.folder} for the next time"
        if total > cache.limit:
            words += f" as far as the limit of {size(cache.limit)} goes (--cache-limit)"
    note(words)
