"""Records: numbers as JSON can say them."""

from loralens.tables.numbers import known as known
from loralens.tables.numbers import matrix as matrix
