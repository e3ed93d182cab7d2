"""``loralens behave``: what adapters do to a model's outputs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loralens.cli import options
from loralens.cli.models import Loaded, running
from loralens.cli.record import known
from loralens.cli.terminal import say

if TYPE_CHECKING:  # keeps numpy out of --help
    from loralens.analysis.behaviour import Behaviour, Contrast

SHOWN = 3  # tensors named in a warning before the rest is counted
POSITIONS = {"causal": "tokens", "masked": "tokens", "classifier": "texts", "": "tokens"}


@click.command("behave")
@click.option("--adapters", "first", required=True, multiple=True, metavar="A [B …]", help="One adapter, or several.")
@click.argument("more", nargs=-1, metavar="")
@running
@click.option("--json", "as_json", is_flag=True, help="Machine-readable, every layer.")
@options.reading
def command(
    first: tuple[str, ...],
    more: tuple[str, ...],
    model: str,
    data: Path,
    limit: int | None,
    batch: int,
    length: int,
    device: str,
    dtype: str,
    threads: int | None,
    as_json: bool,
    **reading: Any,
) -> None:
    """Show what each adapter does to the outputs of its base on real inputs, and how far adapters are apart.

    KL divergence and logits where the model has a head, hidden states always. Updates are added in float32, and
    nothing is merged.
    """
    from loralens.analysis.behaviour import measure_behaviour
    from loralens.cli.cut import count_cut
    from loralens.cli.models import load_model
    from loralens.cli.progress import progress
    from loralens.cli.texts import read_texts
    from loralens.errors import place

    texts = read_texts(data, limit=limit)
    names = _names((*first, *more))
    adapters = {name: options.read_adapter(path, reading, base=model, whole=True) for name, path in names.items()}
    loaded = load_model(model, device=device, dtype=dtype, threads=threads)
    cut = count_cut(loaded, [text.text for text in texts], length=length)
    cut.warn(str(data))
    config: Any = loaded.model.config
    config.output_hidden_states = True
    with place(model), progress("running the model", len(texts)) as step:
        batches = loaded.batches(texts, batch=batch, length=length, step=step)
        found = measure_behaviour(loaded.model, batches, adapters=adapters)
    _warn(found)
    if as_json:
        seen = {"file": str(data), "texts": len(texts), "cut": cut.record()}
        click.echo(json.dumps(_record(found, loaded, model=model, data=seen, names=names)))
    else:
        _show(found, loaded, model=model, data=data, texts=len(texts))


def _names(paths: tuple[str, ...]) -> dict[str, str]:
    """What each adapter is called: the last part of its path, or the path where two would be called alike."""
    from loralens.analysis.behaviour import BASE
    from loralens.errors import OptionError

    if len(set(paths)) < len(paths):
        raise OptionError("an adapter is named twice", fix="name each one once")
    ends = [Path(path).name for path in paths]
    return {
        end if end and end != BASE and ends.count(end) == 1 else path: path
        for end, path in zip(ends, paths, strict=True)
    }


def _warn(found: "Behaviour") -> None:
    """What was not applied, or not as it is, on stderr."""
    for name, left_out in found.left_out.items():
        _name(name, "is not applied", [f"{key} ({why})" for key, why in left_out.items()])
    for name, idle in found.idle.items():
        _name(name, "was never called by the model", list(idle))
    for name, changed in found.changed.items():
        _name(name, "has no layer of its own: its weight was changed, and so rounded", list(changed))


def _name(adapter: str, what: str, things: list[str]) -> None:
    for thing in things[:SHOWN]:
        say(f"warning: {adapter}: {thing} {what}", err=True)
    if len(things) > SHOWN:
        say(f"warning: {adapter}: and {len(things) - SHOWN} more", err=True)


def _show(found: "Behaviour", loaded: Loaded, *, model: str, data: Path, texts: int) -> None:
    from loralens.cli.table import Column, Table, show

    count = found.positions or found.states
    title = f"{model} on {texts} texts of {data}: {count:,} {POSITIONS[loaded.head]}"
    head = (Column("KL (nats)"), Column("logits rms"), Column("same top")) if found.positions else ()
    columns = [Column("from", "left"), Column("to", "left"), *head, Column("hidden, last")]
    show(Table(title, columns, [_row(one) for one in found.contrasts]))
    _show_layers([one for one in found.contrasts if one.first == found.contrasts[0].first])


def _show_layers(from_base: "list[Contrast]") -> None:
    """Hidden states layer by layer, one column an adapter; adapters against each other are in the JSON."""
    from loralens.cli.table import Column, Table, number, show

    rows = [
        [str(layer), *map(number, apart)]
        for layer, apart in enumerate(zip(*(o.hidden for o in from_base), strict=True))
    ]
    columns = [Column("layer"), *(Column(one.second) for one in from_base)]
    show(Table("hidden states, ‖h − h_base‖ / ‖h_base‖ by layer, 0: the embeddings", columns, rows))


def _row(one: "Contrast") -> list[str]:
    from loralens.cli.table import number

    last = [number(one.hidden[-1])] if one.hidden else [""]
    if one.kl is None or one.logits is None or one.agreement is None:
        return [one.first, one.second, *last]
    return [one.first, one.second, number(one.kl), number(one.logits), f"{one.agreement:.2%}", *last]


def _record(
    found: "Behaviour", loaded: Loaded, *, model: str, data: Mapping[str, Any], names: Mapping[str, str]
) -> dict[str, Any]:
    """The JSON object: the table, with every layer, and what was not applied."""
    from loralens.version import __version__

    return {
        "loralens": __version__,
        "model": model,
        "head": loaded.head or None,
        "data": {**data, "positions": found.positions or None, "states": found.states},
        "adapters": [
            {
                "name": name,
                "path": path,
                "not_applied": dict(found.left_out[name]),
                "never_called": list(found.idle[name]),
                "rounded": list(found.changed[name]),
            }
            for name, path in names.items()
        ],
        "contrasts": [
            {
                "first": one.first,
                "second": one.second,
                "kl": known(one.kl),
                "logits": known(one.logits),
                "agreement": one.agreement,
                "hidden": [known(value) for value in one.hidden],
            }
            for one in found.contrasts
        ],
    }
