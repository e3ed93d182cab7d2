"""The SVDs of base weights that a verb needs: read from a cache if they are there, else computed."""

from collections.abc import Generator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from time import perf_counter

import numpy as np

from loralens.core.messages import note, warn
from loralens.core.progress import progress
from loralens.core.weights import Weight
from loralens.errors import FormatError, OptionError, place
from loralens.formats.records.cache import LIMIT, SvdCache, default_folder, svd_bytes, weight_digest
from loralens.linalg.device import Device
from loralens.linalg.rank_update import Decomposed, decompose
from loralens.tables.numbers import count, parse_size, size

SAMPLE = 256  # side of the matrix whose SVD is timed, so that the others' time can be said
COMPUTED = 20  # an SVD of W takes so many times what the rest of a module does (measured at n = 2048)


def svd_cache(
    folder: str | PathLike[str] | None = None, limit: str = LIMIT, *, no_cache: bool = False
) -> SvdCache | None:
    """Where SVDs of weights are kept between runs; None where they are not to be.

    Raises
    ------
    OptionError
        A folder and ``no_cache``; a limit that is no size.
    """
    if no_cache and folder:
        raise OptionError("cache and no_cache exclude each other", fix="give one of the two")
    return None if no_cache else SvdCache(Path(folder) if folder else default_folder(), limit=parse_size(limit))


def decompositions(
    weights: Mapping[str, Weight], cache: SvdCache | None, base: str | PathLike[str], device: Device
) -> Generator[tuple[str, Decomposed], None, None]:
    """The SVD of every weight, one after the other: read where it is kept, else computed, as a note says before.

    Close it, so that its progress ends whatever happens to who reads it.
    """
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
        work = {name: svd_work(weight) * (1 + COMPUTED * (name in missing)) for name, weight in weights.items()}
        with progress("working on the base", sum(work.values())) as advance:
            for name, weight in weights.items():
                W = cache.read(keys[name], weight.shape) if cache else None
                if W is None:
                    if name not in missing:
                        warn(f"the SVD kept for {name} is damaged: computed again")
                    with place(name):
                        W = decompose(weight.read(), device)
                    try:
                        if cache:
                            cache.write(keys[name], W)
                    except FormatError as error:
                        error.at("the SVDs are not kept")
                        warn(": ".join((*error.where, error.what)), error.fix)
                        cache = None
                yield name, W
                if advance:
                    advance(work[name])


def svd_work(weight: Weight) -> int:
    """What a dense SVD costs, max·min² of the shape."""
    return max(weight.shape) * min(weight.shape) ** 2


def seconds_per_product(device: Device) -> float:
    """Seconds that a dense SVD takes here, over max·min² of its shape."""
    W = np.random.default_rng(0).standard_normal((SAMPLE, SAMPLE))
    # The smaller of two timings: what disturbs a measurement only makes it longer.
    times = []
    for _ in range(2):  # the first one also warms up
        start = perf_counter()
        decompose(W, device)
        times.append(perf_counter() - start)
    # A dense SVD of n × n takes time proportional to n³ = max·min².
    return min(times) / SAMPLE**3


def duration(seconds: float) -> str:
    """Seconds, in words."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _announce(weights: Sequence[Weight], cache: SvdCache | None, device: Device) -> None:
    """What the missing SVDs will take."""
    if not weights:
        return
    seconds = sum(map(svd_work, weights)) * seconds_per_product(device)
    total = sum(map(svd_bytes, weights))
    words = f"the SVD of {count(len(weights), 'weight')} of the base comes first: about {duration(seconds)}"
    if cache:
        words += f", and {size(total)} kept in {cache.folder} for the next time"
        if total > cache.limit:
            words += f" as far as the limit of {size(cache.limit)} goes (--cache-limit)"
    note(words)
