"""The columns of the modules of an adapter, for results that say what they have to say in sentences."""

from loralens.core.structured import Update
from loralens.tables.numbers import number, shape
from loralens.tables.table import ALWAYS, Column

NamedModule = tuple[str, Update]

COLUMNS: tuple[Column[NamedModule], ...] = (
    Column("name", lambda row: row[0], "module", align="left", priority=ALWAYS),
    Column("shape", lambda row: list(row[1].shape), "out × in", shape, csv=False, priority=3),
    Column("out", lambda row: row[1].shape[0], json=False),
    Column("in", lambda row: row[1].shape[1], json=False),
    Column("rank", lambda row: row[1].rank, "r", priority=7),
    Column("scale", lambda row: row[1].scale, "scale", number, priority=2),
)
