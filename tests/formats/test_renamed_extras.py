"""A tensor that does not belong to a pair follows its module: through every writer, when modules get other names."""

import numpy as np
import pytest

import loralens
from loralens import Adapter
from loralens.core import Extra, LazyArray
from loralens.formats import FORMATS, encode_adapter
from tests.models import low_rank

BLOCK = "attentions.0.transformer_blocks.0.attn1"
OLD = [f"unet.down_blocks.0.{BLOCK}.to_q", f"unet.down_blocks.0.{BLOCK}.to_out.0"]
NEW = [f"unet.up_blocks.1.{BLOCK}.to_q", f"unet.up_blocks.1.{BLOCK}.to_out.0"]
HOLDS = {  # dialect → roles of extras that it has a place for, from another dialect too
    "peft": {"magnitude", "lora_bias"},
    "diffusers": {"magnitude", "lora_bias"},
    "kohya": {"magnitude", "magnitude_in"},
    "comfyui": {"magnitude_in"},
    "mlx": {"magnitude"},
    "loralib": {"bias"},
}
WAYS = [
    (source, target, role)
    for source, roles in HOLDS.items()
    for target, held in HOLDS.items()
    for role in sorted(roles & held)
]


def form(name: str) -> loralens.formats.Format:
    return next(form for form in FORMATS if form.name == name)


def numbers(name: str, role: str) -> np.ndarray:
    size = 4 if role == "magnitude_in" else 6
    return (np.arange(size) + 1 + 10 * len(name)).astype(np.float32)


def adapter(role: str) -> Adapter:
    """Two modules, and a tensor of a role beside each."""
    modules = {name: low_rank(6, 4, seed=i) for i, name in enumerate(OLD)}
    parameter = "bias" if role == "bias" else "weight"
    extra = {f"x.{name}": Extra(role, name, LazyArray.of(numbers(name, role)), parameter) for name in OLD}
    return Adapter(modules=modules, extra=extra, format="nobody's")


def written(made: Adapter, dialect: str) -> Adapter:
    """The adapter as the dialect's reader gives it back from a file, under the file's own names."""
    return form(dialect).read(encode_adapter(made, dialect)[0])


@pytest.mark.parametrize(("source", "target", "role"), WAYS, ids=[" ".join(way) for way in WAYS])
def test_extras_are_renamed_with_their_modules(source: str, target: str, role: str) -> None:
    read = written(adapter(role), source)
    file_names = {file: name for name in OLD for file in read if file.endswith(("q", "to_q")) == name.endswith("q")}
    assert len(file_names) == 2
    moved = read.renamed({file: NEW[OLD.index(name)] for file, name in file_names.items()})
    assert set(moved) == set(NEW)

    back = written(moved, target)
    held = {extra.module: extra for extra in back.extra.values() if extra.role == role}
    assert set(held) == set(back), f"{role} stands beside {set(held)}, and the modules are {set(back)}"
    for file, extra in held.items():
        (old,) = [name for name in OLD if name.endswith("q") == file.endswith("q")]
        np.testing.assert_array_equal(extra.tensor.read().ravel(), numbers(old, role))
    assert not any("down_blocks" in key for key in (*back.extra, *encode_adapter(moved, target)[0].tensors))
