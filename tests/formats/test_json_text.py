"""JSON in pieces is that of the whole value, whatever it holds."""

from io import BytesIO

import pytest

from loralens.formats.files.json_text import PIECE, dump, dumps, json_text, object_pieces, text_pieces

# Escapes, letters of two and of four bytes, and a byte of a path that is not UTF-8.
ODD = 'ä"\\\n\u2028😀\udc80'
VALUES = {
    "empty": {},
    "texts": {"a": ODD, ODD: "", "long": ODD * PIECE},
    "nested": {"a": {"b": [1, None, {"c": ODD}], "d": {}}, "e": [], "f": 1e300, "g": True},
    "many": {str(i): {"x": [i, str(i)]} for i in range(1000)},
}


def in_pieces(value):
    """The items of an object, in which objects are iterators of items again."""
    return ((name, in_pieces(inner) if isinstance(inner, dict) else inner) for name, inner in value.items())


@pytest.mark.parametrize("name", VALUES)
def test_an_object_in_pieces(name):
    value = VALUES[name]
    assert "".join(object_pieces(value.items())) == json_text(value)
    assert "".join(object_pieces(in_pieces(value))) == json_text(value)


@pytest.mark.parametrize("name", VALUES)
def test_an_indented_value_is_written_in_pieces(name):
    stream = BytesIO()
    dump(VALUES[name], stream)
    assert stream.getvalue() == dumps(VALUES[name]).encode("utf-8")


@pytest.mark.parametrize("text", ["", ODD, "a" * PIECE, ODD * PIECE], ids=["empty", "short", "one piece", "long"])
def test_a_text_in_pieces(text):
    assert "".join(text_pieces(text)) == json_text(text)
    assert max(map(len, text_pieces(text))) <= 12 * PIECE
