from typing_extensions import Buffer

def multiply(
    B: Buffer, A: Buffer, rank: int, B2: Buffer, A2: Buffer, rank2: int, rows: int, columns: int, is_map: bool,
    D: Buffer, /,
) -> bool: ...  # fmt: skip
def gram(X: Buffer, Y: Buffer, m: int, r: int, k: int, by_rows: bool, G: Buffer, /) -> bool: ...
def gram_of_factors(
    X: Buffer, width: int, X2: Buffer, width2: int, m: int, by_rows: bool, step: int, least: int,
    block: Buffer, part: Buffer, G: Buffer, /,
) -> bool: ...  # fmt: skip
def multiply_twice(
    W: Buffer, half: bool, rows: int, n: int, X: Buffer, width: int, known: bool, Y: Buffer, Z: Buffer, /
) -> bool: ...
def project(W: Buffer, half: bool, rows: int, n: int, R: Buffer, width: int, Y: Buffer, /) -> float: ...
def subtract(merged: Buffer, D: Buffer, R: Buffer, /) -> None: ...
def merge(W: Buffer, D: Buffer, lost: Buffer, merged: Buffer, places: Buffer, there: Buffer, /) -> tuple[int, int]: ...
def predict(W: Buffer, D: Buffer, sample: Buffer, d: Buffer, lost: Buffer, /) -> tuple[int, int]: ...
def prune(rows: Buffer, words: Buffer, factors: Buffer, end: float, kept: Buffer, /) -> None: ...
def elect(
    a: Buffer, b: Buffer, kept_a: Buffer, kept_b: Buffer, least_a: float, least_b: float, out: Buffer, /
) -> None: ...
def widen(halves: Buffer, wide: Buffer, /) -> None: ...
def stack_factors(
    factors: list[Buffer], kind: int, rank: int, size: int, turned: bool, scales: Buffer,
    rows: Buffer, grams: Buffer, peaks: Buffer, /,
) -> None: ...  # fmt: skip
def convolve(
    B: Buffer, B_factors: Buffer, B_positions: Buffer, B_signs: Buffer,
    A: Buffer, A_factors: Buffer, A_positions: Buffer, A_signs: Buffer,
    rank: int, turns: Buffer, total: Buffer, /,
) -> None: ...  # fmt: skip
