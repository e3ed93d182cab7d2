"""``loralens calibrate``: what real inputs excite in an adapter."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loralens.cli import options
from loralens.cli.running import running
from loralens.cli.terminal import say
from loralens.verbs.inputs.loaded import Loaded
from loralens.verbs.inputs.texts import Text

if TYPE_CHECKING:  # keeps numpy out of --help
    from loralens.core.moments import Moments
    from loralens.verbs.inputs.cut import Cut


@click.command("calibrate")
@click.option("--adapter", required=True, metavar="A", help="The adapter: a file, a folder, or a Hub id.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, metavar="FILE", help="A .safetensors.")
@running
@click.option("--out-side", is_flag=True, help="Measure gradients at the outputs too: a loss and a backward pass.")
@click.option("--overwrite", is_flag=True, help="Replace FILE.")
@click.option("--dry-run", is_flag=True, help="Check model, adapter and texts; run and write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable report.")
@options.reading
def command(
    model: str,
    adapter: str,
    data: Path,
    output: Path,
    limit: int | None,
    batch: int,
    length: int,
    device: str,
    dtype: str,
    threads: int | None,
    out_side: bool,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    **reading: Any,
) -> None:
    """Measure what real inputs excite in every module of an adapter: K = E[z zᵀ], z = A x.

    The model runs with the adapter on, so x are the inputs that its modules will see. The r × r matrices go to a small
    file; compress --activations uses them to keep what matters on such inputs. Some hundred texts like those of later
    use are enough. The same call on the same machine gives the same bytes.
    """
    from loralens.cli.progress import progress
    from loralens.compression.calibration import measure_moments
    from loralens.core.attached import Attachment
    from loralens.errors import place
    from loralens.formats.records.moments import check_target, save_moments
    from loralens.verbs.inputs.cut import count_cut
    from loralens.verbs.inputs.models import load_model
    from loralens.verbs.inputs.texts import read_texts

    check_target(output, overwrite=overwrite)
    texts = read_texts(data, limit=limit)
    loaded_adapter = options.read_adapter(adapter, reading, base=model, whole=True)
    loaded = load_model(model, device=device, dtype=dtype, threads=threads)
    cut = count_cut(loaded, [text.text for text in texts], length=length)
    cut.warn(str(data))
    loss = _objective(loaded, texts) if out_side else None
    with place(model):
        attachment = Attachment(loaded.model, loaded_adapter)
    for key, why in attachment.left_out.items():
        say(f"warning: {adapter}: {key} is not applied ({why})", err=True)
    if dry_run:
        _rehearse(attachment.hooked, texts=len(texts), cut=cut, output=output, as_json=as_json)
        return
    with progress("running the model", len(texts)) as step:
        batches: Any = loaded.batches(texts, batch=batch, length=length, step=step)
        found = measure_moments(
            loaded.model,
            _labelled(loaded, texts, batches, batch) if loss and loaded.head == "classifier" else batches,
            adapter=loaded_adapter,
            out_side=out_side,
            loss=loss,
            source={"texts": len(texts), "length": length, "dtype": dtype, "data": data.name},
        )
    save_moments(found, output, overwrite=overwrite)
    _report(found, texts=len(texts), cut=cut, output=output, as_json=as_json)


def _objective(loaded: Loaded, texts: Sequence[Text]) -> Any:
    """The loss of the model's head."""
    from loralens.compression.objective import label, next_token
    from loralens.errors import OptionError

    if loaded.head == "causal":
        return next_token
    if loaded.head == "classifier" and all(text.label is not None for text in texts):
        return label
    needs = 'texts with a "label" each' if loaded.head == "classifier" else "a causal language model or a classifier"
    raise OptionError(f"--out-side differentiates a loss, and for that needs {needs}", fix="leave out --out-side")


def _labelled(
    loaded: Loaded, texts: Sequence[Text], batches: Iterator[dict[str, Any]], size: int
) -> Iterator[dict[str, Any]]:
    """Batches with the numbers of their labels."""
    import torch

    from loralens.errors import OptionError

    config: Any = loaded.model.config
    names = {name: number for number, name in config.id2label.items()}
    numbers = names | {str(number): number for number in range(config.num_labels)}
    for i, inputs in enumerate(batches):
        part = [str(text.label) for text in texts[i * size : (i + 1) * size]]
        unknown = [name for name in part if name not in numbers]
        if unknown:
            raise OptionError(f"the model knows no label {unknown[0]!r}", fix=f"use its own: {', '.join(names)}")
        yield {**inputs, "labels": torch.tensor([numbers[name] for name in part])}


def _rehearse(hooked: Sequence[str], *, texts: int, cut: "Cut", output: Path, as_json: bool) -> None:
    """What would be measured."""
    if as_json:
        modules = [{"name": name} for name in hooked]
        click.echo(json.dumps({"target": None, "texts": texts, "cut": cut.record(), "modules": modules}))
    else:
        say(f"would write {output}: moments of {len(hooked)} modules on {texts} texts")


def _report(found: "Moments", *, texts: int, cut: "Cut", output: Path, as_json: bool) -> None:
    """What was measured on stdout, and what was not on stderr."""
    from loralens.version import __version__

    inputs = max((moment.count for _, moment in found.items()), default=0)
    _warn([f"{name} ({why})" for name, why in found.unmeasured.items()], "cannot be measured")
    _warn(found.unreached, "were reached by no input")
    if as_json:
        record = {
            "loralens": __version__,
            "target": str(output),
            "fingerprint": found.fingerprint,
            "source": dict(found.source),
            "cut": cut.record(),
            "modules": [{"name": name, "rank": len(m.K), "count": m.count} for name, m in found.items()],
            "unreached": list(found.unreached),
            "unmeasured": dict(found.unmeasured),
        }
        click.echo(json.dumps(record))
        return
    say(f"wrote {output}: moments of {len(found)} modules over {inputs:,} positions of {texts} texts")


def _warn(names: Sequence[str], what: str) -> None:
    if names:
        from loralens.core.names import some

        say(f"warning: {len(names)} modules {what}: {some(names)}", err=True)
        click.echo("  fix: compress truncates these by their weights alone", err=True)
