"""Packing: several texts in one row, each with positions of its own, so that little of a batch is padding."""

from bisect import bisect_left, insort
from collections import defaultdict
from dataclasses import replace

from loralens.training.texts.tasks import Examples


def pack_texts(examples: Examples, length: int) -> Examples:
    """The same texts in as few rows of at most ``length`` tokens as best fit finds, the longest texts first.

    The first token of a text is not learned, since no token of the text comes before it. Every row begins its positions
    anew with every text, from which a model of transformers knows that they do not see each other.
    """
    rows: list[list[int]] = []
    room: list[int] = []  # the numbers of tokens that still fit into some row, each once, in order
    open_rows: dict[int, list[int]] = defaultdict(list)  # such a number → the rows into which so many fit
    for text in sorted(range(len(examples)), key=lambda number: (-len(examples.tokens[number]), number)):
        size = len(examples.tokens[text])
        place = bisect_left(room, size)
        if place < len(room):
            rest_length = room[place]
            row = open_rows[rest_length].pop()
            if not open_rows[rest_length]:
                del room[place]
            rows[row].append(text)
        else:
            row, rest_length = len(rows), length
            rows.append([text])
        rest_length -= size
        if rest_length > 0:
            if not open_rows[rest_length]:
                insort(room, rest_length)
            open_rows[rest_length].append(row)
    return _join(examples, rows)


def _join(examples: Examples, rows: list[list[int]]) -> Examples:
    tokens, learned, positions = [], [], []
    for row in rows:
        tokens.append([token for text in row for token in examples.tokens[text]])
        positions.append([place for text in row for place in range(len(examples.tokens[text]))])
        masks = [examples.learned[t] if examples.learned else [True] * len(examples.tokens[t]) for t in row]
        learned.append([mine and place > 0 for mask in masks for place, mine in enumerate(mask)])
    return replace(examples, tokens=tokens, learned=learned, positions=positions, members=rows)


def filled_share(examples: Examples, length: int) -> float:
    """The share of the tokens of rows of ``length`` that are not padding."""
    return sum(map(len, examples.tokens)) / (len(examples) * length)
