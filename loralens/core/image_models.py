"""The layers of SD 1.5, SD 2, SDXL and FLUX.1: their shapes, and their names in diffusers, in the original checkpoint
and in kohya's files.

The names are written as rules for each block, which a test compares with the model classes of diffusers and
transformers. The original checkpoints are those that ComfyUI loads and that sd-scripts trains SDXL and FLUX in. The
original FLUX keeps q, k and v in one matrix, ``qkv``, and in its single blocks q, k, v and the input of the MLP in
``linear1``; the layers of diffusers are rows of it.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cache
from math import prod
from typing import NamedTuple, final

from loralens.core.image_families import Family, Row, are_stated, families, families_of
from loralens.core.names import bare_form, encoder, inner_form

_T5 = re.compile(r"(^|[._])encoder[._]block[._]\d+[._]layer[._]")
Shape = tuple[int, ...]
Key = tuple[int, str]  # number of the text encoder or 0, and the name without its prefix and with underscores


class Layer(NamedTuple):
    """One layer of a model.

    Attributes
    ----------
    name : str
        The name in a diffusers pipeline, with its component.
    shape : tuple of int
        The shape of its weight in diffusers: (out, in), or (out, in, height, width) of a convolution.
    original : str
        The name in the original checkpoint, as ComfyUI has it. Layers of one original name are rows of one matrix, in
        the order of the table.
    swapped : bool
        Whether the two halves of its rows have the other order in the original checkpoint.
    """

    name: str
    shape: Shape
    original: str
    swapped: bool = False

    @property
    def update_shape(self) -> Shape:
        """(out, in) of ΔW."""
        return self.shape[0], prod(self.shape[1:])


@final
@dataclass(frozen=True, slots=True)
class ImageModel:
    """The layers of one architecture.

    Attributes
    ----------
    name : str
        What users call it.
    layers : tuple of Layer
    kohya_original : bool
        Whether sd-scripts uses the names of the original checkpoint; otherwise it uses those of diffusers.
    encoders : tuple of (str, str)
        The beginning of the names of each text encoder → the prefix of kohya's names.
    words : tuple of str
        Words in the name of a base model, in lower case, that mean this architecture.
    family : str
        The family in `loralens.core.image_families`; empty for SD 1.5, SD 2, SDXL and FLUX.1.
    native_only : frozenset of str
        The layers whose names in diffusers ComfyUI does not map: it has them by their original names alone.
    """

    name: str
    layers: tuple[Layer, ...]
    kohya_original: bool
    encoders: tuple[tuple[str, str], ...]
    words: tuple[str, ...]
    family: str = ""
    native_only: frozenset[str] = frozenset()
    by_original: Mapping[str, tuple[Layer, ...]] = field(init=False)
    _found: Mapping[Key, tuple[Layer, ...]] = field(init=False)

    def __post_init__(self) -> None:
        groups: dict[str, tuple[Layer, ...]] = {}
        for layer in self.layers:
            groups[layer.original] = (*groups.get(layer.original, ()), layer)
        object.__setattr__(self, "by_original", groups)
        spellings = {_key(original): group for original, group in groups.items()}
        object.__setattr__(self, "_found", spellings | {_key(layer.name): (layer,) for layer in self.layers})

    def find(self, name: str, shape: Shape) -> tuple[Layer, ...]:
        """The layers that a module adapts, in the order of its rows; empty if the model has no such module.

        The name may be of any dialect; ``shape`` is (out, in) of ΔW.
        """
        layers = self.layers_named(name)
        rows, width = sum(layer.shape[0] for layer in layers), layers[0].update_shape[1] if layers else 0
        return layers if shape == (rows, width) else ()

    def layers_named(self, name: str) -> tuple[Layer, ...]:
        """The layers that a module of this name adapts, whatever its shape."""
        return self._found.get(_key(name), ())

    def is_original(self, name: str) -> bool:
        """Whether a module is named as in the original checkpoint and not as in diffusers."""
        key = _key(name)
        return any(key == _key(layer.original) != _key(layer.name) for layer in self._found.get(key, ()))

    def kohya(self, layer: Layer) -> str:
        """The name in kohya's files of the module that holds a layer."""
        for start, prefix in self.encoders:
            if layer.name.startswith(start):
                return prefix + layer.name.removeprefix(start).replace(".", "_")
        inner = (layer.original if self.kohya_original else layer.name).partition(".")[2]
        return "lora_unet_" + inner.replace(".", "_")


def _key(name: str) -> Key:
    number = encoder(name)
    # Recent versions of transformers have no text_model around the layers of CLIP.
    return number, bare_form(name) if number else inner_form(name)


# The first words of the normal forms of all names in both tables.
FIRST_WORDS = frozenset((
    "add", "context", "conv", "double", "down", "encoder", "final", "guidance", "img", "input", "label", "mid",
    "middle", "norm", "out", "output", "proj", "single", "text", "time", "transformer", "txt", "up", "vector", "x",
))  # fmt: skip


FAMILY_WORDS = frozenset((
    "adaln", "all", "audio", "av", "blocks", "cap", "caption", "condition", "context", "distilled", "double", "encoder",
    "final", "guidance", "head", "img", "joint", "layers", "noise", "norm", "out", "patch", "patchify", "pooled", "pos",
    "proj", "single", "t", "text", "time", "transformer", "txt", "vector", "visual", "x", "y",
))  # fmt: skip


def image_model(modules: Mapping[str, Shape], hints: Iterable[str | None] = ()) -> ImageModel | None:
    """The most likely architecture that has all these modules; None if there is none.

    The arguments are those of `likely_models`.
    """
    # Of several, the first: the older model, for which there are more adapters.
    return next(iter(likely_models(modules, hints)), None)


def likely_models(modules: Mapping[str, Shape], hints: Iterable[str | None] = ()) -> list[ImageModel]:
    """The architectures that have all these modules; more than one if nothing decides between them, older ones first.

    Parameters
    ----------
    modules : mapping of str to tuple of int
        Module, named as in any dialect → (out, in) of its update.
    hints : iterable of str
        What the file says about its base model. It decides between models that all have these modules: SD 1.5 and SDXL,
        for example, if only some blocks are adapted. Without a hint, names of the original checkpoint decide, because
        kohya's files have them for SDXL only, and after them the presence of a second text encoder.
    """
    # Decided without the tables, of which the first takes 25 ms to make, for the modules of most other models.
    first_words = {_key(name)[1].partition("_")[0] for name in modules}
    words = " ".join(hint.lower() for hint in hints if hint)
    fitting: list[ImageModel] = []
    if modules and first_words <= FIRST_WORDS:
        fitting = [model for model in image_models() if all(map(model.find, modules, modules.values()))]
    # A model whose family is named comes before SD and FLUX.1, which may have the same modules.
    if modules and first_words <= FAMILY_WORDS and (not fitting or are_stated(words)):
        fitting = family_models(modules, words) or fitting
    elif modules and first_words <= FAMILY_WORDS and not any(word in words for one in fitting for word in one.words):
        # The blocks of FLUX.1, HunyuanVideo and Chroma have equal names and shapes.
        fitting = [*fitting, *family_models(modules, words, scaled=False)]
        fitting = [one for one in fitting if _ends_with(one, modules)] or fitting

    def likelihood(model: ImageModel) -> tuple[bool, bool]:
        named = any(word in words for word in model.words)
        return named, model.kohya_original and any(
            name.startswith("lora_te1_") or (name.startswith("lora_unet_") and model.is_original(name))
            for name in modules
        )

    best = max(map(likelihood, fitting), default=None)
    return [model for model in fitting if likelihood(model) == best]


_BLOCK = re.compile(r"(.*?)\.(\d+)\.")


def _ends_with(model: ImageModel, modules: Mapping[str, Shape]) -> bool:
    """Whether the last block of every stack of which some block is adapted is adapted, which tells models apart."""
    depths: list[dict[str, int]] = []
    for layers in (model.layers, [model.find(*module)[0] for module in modules.items()]):
        depths.append({})
        for stack, number in (found.groups() for layer in layers if (found := _BLOCK.match(layer.name))):
            depths[-1][stack] = max(int(number), depths[-1].get(stack, 0))
    return all(depths[0][stack] == last for stack, last in depths[1].items())


# Families whose names other models have, too: without a word about the base, only the shapes of their models count.
_COMMON_NAMES = ("LTX-Video",)  # PixArt and Sana


def family_models(modules: Mapping[str, Shape], words: str, *, scaled: bool = True) -> list[ImageModel]:
    """The models of `loralens.core.image_families` that have all these modules, one for each family.

    Shapes decide between the sizes of a family. If they are those of no size, the names decide if ``scaled``, provided
    that they are the names of one family only; heights of layers that share a matrix are then in the usual proportion.
    """
    named = families_of([name for name in modules if not is_text_encoder(name)])
    stated = [family for family in named if any(word in words for word in family.words)]
    found = []
    for family in stated or named:
        fitting = [
            size for size in family.sizes if all(map(_of_size(family.name, size).find, modules, modules.values()))
        ]
        if fitting:
            model = _of_size(family.name, fitting[0])
            found.append(model if len(fitting) == 1 else replace(model, name=family.name))
    if found or not scaled or len(stated or named) != 1 or (not stated and named[0].name in _COMMON_NAMES):
        return found
    proportional = _scaled((stated or named)[0], modules)
    return [proportional] if proportional else []


def is_text_encoder(name: str) -> bool:
    """Whether a module belongs to CLIP or T5 by its name."""
    return bool(encoder(name) or _T5.search(name))


@cache
def _of_size(name: str, size: str) -> ImageModel:
    """The model of a family with the shapes of one of its sizes."""
    family = families()[name]
    layers = [
        _family_layer(row, str(i), tuple(shape))
        for row in family.layers
        for start, stop, *shape in row.sizes.get(size, ())
        for i in range(start, stop)
    ]
    encoders: tuple[tuple[str, str], ...] = ()
    if name == "SD3":
        layers += [*_clip("text_encoder.", "clip_l", 768, 12), *_clip("text_encoder_2.", "clip_g", 1280, 32)]
        layers += _t5(24, "text_encoder_3.")
        encoders = (("text_encoder.", "lora_te1_"), ("text_encoder_2.", "lora_te2_"), ("text_encoder_3.", "lora_te3_"))
    return _family_model(family, f"{name} {size}".strip(), layers, encoders)


def _scaled(family: Family, modules: Mapping[str, Shape]) -> ImageModel | None:
    """The layers of a family that an adapter has, with shapes that fit its modules; None if there are none."""
    layers: dict[str, Layer] = {}
    ratios: dict[str, Fraction] = {}
    for name, (rows, width) in modules.items():
        members, number = family.rows_named(name)
        if not members:
            return None  # a layer of a text encoder
        # The proportions are those of the first size.
        matrix = [row for row in family.layers if row.native == members[0].native]
        sizes = [next(iter(row.sizes.values()))[0][2:] for row in matrix]
        # Whether the halves of its rows are swapped depends on the number of blocks, which is not known.
        if len({row.name for row in matrix}) < len(matrix):
            return None
        ratio = Fraction(rows, sum(size[0] for row, size in zip(matrix, sizes, strict=True) if row in members))
        if ratios.setdefault(members[0].native.replace("#", number), ratio) != ratio:
            return None
        for row, (height, _, *kernel) in zip(matrix, sizes, strict=True):
            if (height * ratio).denominator != 1 or width % prod(kernel):
                return None
            layer = _family_layer(row, number, (int(height * ratio), width // prod(kernel), *kernel))
            layers[layer.name] = layer
    return _family_model(family, family.name, list(layers.values()), ())


def _family_layer(row: Row, number: str, shape: Shape) -> Layer:
    name, native = (text.replace("#", number) for text in (row.name, row.native))
    return Layer(f"transformer.{name}", shape, f"diffusion_model.{native}", bool(row.swapped))


def _family_model(family: Family, name: str, layers: list[Layer], encoders: tuple[tuple[str, str], ...]) -> ImageModel:
    lacking = family.lacks("comfyui", "transformer.D")
    native_only = frozenset(layer.name for layer in layers if lacking & _in_table(layer.name))
    return ImageModel(name, tuple(layers), True, encoders, tuple(family.words), family.name, native_only)


def _in_table(name: str) -> set[str]:
    """What a layer may be called in the table of the families: its first number may be that of a block, or not."""
    name = name.removeprefix("transformer.")
    return {name, re.sub(r"(?<=\.)\d+(?=\.)", "#", name, count=1)}


@cache
def image_models() -> tuple[ImageModel, ...]:
    """The table of the architectures."""
    first, second = ("text_encoder.", "lora_te1_"), ("text_encoder_2.", "lora_te2_")
    only, t5 = (("text_encoder.", "lora_te_"),), ("text_encoder_2.", "lora_te3_")
    clip_l = tuple(_clip("text_encoder.", "clip_l", 768, 12))
    clip_h = tuple(_clip("text_encoder.", "clip_h", 1024, 23))
    projection = Layer(
        "text_encoder_2.text_projection", (1280, 1280), "text_encoders.clip_g.transformer.text_projection"
    )
    clip_g = (*_clip("text_encoder_2.", "clip_g", 1280, 32), projection)
    sd15, sd2 = (_inside("unet", _unet((1, 1, 1, 0), cross, linear)) for cross, linear in ((768, False), (1024, True)))
    sdxl = _inside("unet", _unet((0, 2, 10), 2048, linear=True, added=2816))
    return (
        ImageModel("SD 1.5", sd15 + clip_l, False, only, ("sd_v1", "sd_1", "sd1", "v1-5", "stable-diffusion-v1")),
        ImageModel("SD 2", sd2 + clip_h, False, only, ("sd_v2", "sd_2", "sd2", "v2-1", "stable-diffusion-2")),
        ImageModel("SDXL", sdxl + clip_l + clip_g, True, (first, second), ("xl", "pony", "illustrious")),
        ImageModel("FLUX.1", (*_inside("transformer", _flux(19, 38)), *clip_l, *_t5(24)), True, (first, t5), ("flux",)),
    )


def _inside(component: str, layers: Iterable[Layer]) -> tuple[Layer, ...]:
    """The layers of a component, with its name in diffusers and in the original checkpoint."""
    return tuple(
        layer._replace(name=f"{component}.{layer.name}", original=f"diffusion_model.{layer.original}")
        for layer in layers
    )


def _unet(depths: tuple[int, ...], cross: int, linear: bool, added: int = 0) -> Iterator[Layer]:
    """The layers of a UNet with so many transformer blocks in each level, and ``added`` inputs of another embedding."""
    channels = (320, 640, 1280, 1280)[: len(depths)]
    first, last = channels[0], len(depths) - 1
    yield Layer("conv_in", (first, 4, 3, 3), "input_blocks.0.0")
    yield from _pair("time_embedding.linear_{}", "time_embed.{}", (first, TIME, TIME))
    if added:
        yield from _pair("add_embedding.linear_{}", "label_emb.0.{}", (added, TIME, TIME))
    width, number, skipped = first, 1, [first]
    for level, (out, depth) in enumerate(zip(channels, depths, strict=True)):
        for i in range(2):
            yield from _resnet(f"down_blocks.{level}.resnets.{i}", f"input_blocks.{number}.0", width, out)
            block = f"down_blocks.{level}.attentions.{i}", f"input_blocks.{number}.1"
            yield from _attention(*block, out, depth, cross, linear)
            width, number = out, number + 1
            skipped.append(out)
        if level < last:
            yield Layer(f"down_blocks.{level}.downsamplers.0.conv", (out, out, 3, 3), f"input_blocks.{number}.0.op")
            number += 1
            skipped.append(out)
    yield from _resnet("mid_block.resnets.0", "middle_block.0", width, width)
    yield from _attention("mid_block.attentions.0", "middle_block.1", width, max(depths), cross, linear)
    yield from _resnet("mid_block.resnets.1", "middle_block.2", width, width)
    number = 0
    for level, (out, depth) in enumerate(zip(channels[::-1], depths[::-1], strict=True)):
        for i in range(3):
            # On its way up, each block also gets what the block of the same level had on the way down.
            above = width + skipped.pop()
            yield from _resnet(f"up_blocks.{level}.resnets.{i}", f"output_blocks.{number}.0", above, out)
            block = f"up_blocks.{level}.attentions.{i}", f"output_blocks.{number}.1"
            yield from _attention(*block, out, depth, cross, linear)
            width, number = out, number + 1
        if level < last:
            behind = 2 if depth else 1
            name = f"output_blocks.{number - 1}.{behind}.conv"
            yield Layer(f"up_blocks.{level}.upsamplers.0.conv", (out, out, 3, 3), name)
    yield Layer("conv_out", (4, first, 3, 3), "out.2")


TIME = 1280  # the width of the embedding of the time step in every UNet here


def _pair(name: str, original: str, widths: Shape) -> Iterator[Layer]:
    """Two linear layers with an activation between them: numbers 1 and 2 in diffusers, 0 and 2 in the original."""
    for i in (0, 1):
        yield Layer(name.format(i + 1), (widths[i + 1], widths[i]), original.format(2 * i))


def _resnet(name: str, original: str, width: int, out: int) -> Iterator[Layer]:
    yield Layer(f"{name}.conv1", (out, width, 3, 3), f"{original}.in_layers.2")
    yield Layer(f"{name}.time_emb_proj", (out, TIME), f"{original}.emb_layers.1")
    yield Layer(f"{name}.conv2", (out, out, 3, 3), f"{original}.out_layers.3")
    if width != out:
        yield Layer(f"{name}.conv_shortcut", (out, width, 1, 1), f"{original}.skip_connection")


def _attention(name: str, original: str, width: int, depth: int, cross: int, linear: bool) -> Iterator[Layer]:
    if not depth:
        return
    kernel = () if linear else (1, 1)
    layers: dict[str, Shape] = {"proj_in": (width, width, *kernel), "proj_out": (width, width, *kernel)}
    for i in range(depth):
        block = f"transformer_blocks.{i}"
        for attention, source in (("attn1", width), ("attn2", cross)):
            inputs = {"to_q": width, "to_k": source, "to_v": source, "to_out.0": width}
            layers |= {f"{block}.{attention}.{part}": (width, size) for part, size in inputs.items()}
        # The first layer of the MLP is gated, so it has twice the width.
        layers |= {f"{block}.ff.net.0.proj": (8 * width, width), f"{block}.ff.net.2": (width, 4 * width)}
    for inner, shape in layers.items():
        yield Layer(f"{name}.{inner}", shape, f"{original}.{inner}")


def _clip(start: str, original: str, width: int, blocks: int) -> Iterator[Layer]:
    """The layers of a CLIP text encoder."""
    attention = {f"self_attn.{part}_proj": (width, width) for part in ("q", "k", "v", "out")}
    kinds = {**attention, "mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    for i in range(blocks):
        for kind, shape in kinds.items():
            name = f"text_model.encoder.layers.{i}.{kind}"
            yield Layer(start + name, shape, f"text_encoders.{original}.transformer.{name}")


def _t5(blocks: int, start: str = "text_encoder_2.") -> Iterator[Layer]:
    """The layers of the encoder of T5 XXL."""
    kinds: dict[str, Shape] = {f"0.SelfAttention.{part}": (4096, 4096) for part in "qkvo"}
    kinds |= {f"1.DenseReluDense.wi_{i}": (10240, 4096) for i in (0, 1)}
    kinds["1.DenseReluDense.wo"] = (4096, 10240)
    for i in range(blocks):
        for kind, shape in kinds.items():
            name = f"encoder.block.{i}.layer.{kind}"
            yield Layer(start + name, shape, f"text_encoders.t5xxl.transformer.{name}")


WIDTH, MLP = 3072, 12288  # of FLUX


def _flux(double: int, single: int) -> Iterator[Layer]:
    """The layers of FLUX.1 with this many blocks of both kinds."""
    yield Layer("x_embedder", (WIDTH, 64), "img_in")
    yield Layer("context_embedder", (WIDTH, 4096), "txt_in")
    for name, original, width in (
        ("timestep_embedder", "time_in", 256),
        ("guidance_embedder", "guidance_in", 256),
        ("text_embedder", "vector_in", 768),
    ):
        for i, end in enumerate(("in_layer", "out_layer")):
            inputs = WIDTH if i else width
            yield Layer(f"time_text_embed.{name}.linear_{i + 1}", (WIDTH, inputs), f"{original}.{end}")
    for i in range(double):
        for kind, shape, original in _DOUBLE:
            yield Layer(f"transformer_blocks.{i}.{kind}", shape, f"double_blocks.{i}.{original}")
    for i in range(single):
        for kind, shape, original in _SINGLE:
            yield Layer(f"single_transformer_blocks.{i}.{kind}", shape, f"single_blocks.{i}.{original}")
    yield Layer("norm_out.linear", (2 * WIDTH, WIDTH), "final_layer.adaLN_modulation.1", swapped=True)
    yield Layer("proj_out", (64, WIDTH), "final_layer.linear")


# Name in diffusers, shape, name in the original. Layers of one original name are listed in the order of its rows.
_SQUARE = (WIDTH, WIDTH)
_DOUBLE: tuple[tuple[str, Shape, str], ...] = (
    ("norm1.linear", (6 * WIDTH, WIDTH), "img_mod.lin"),
    ("norm1_context.linear", (6 * WIDTH, WIDTH), "txt_mod.lin"),
    *((f"attn.to_{part}", _SQUARE, "img_attn.qkv") for part in "qkv"),
    *((f"attn.add_{part}_proj", _SQUARE, "txt_attn.qkv") for part in "qkv"),
    ("attn.to_out.0", _SQUARE, "img_attn.proj"),
    ("attn.to_add_out", _SQUARE, "txt_attn.proj"),
    ("ff.net.0.proj", (MLP, WIDTH), "img_mlp.0"),
    ("ff.net.2", (WIDTH, MLP), "img_mlp.2"),
    ("ff_context.net.0.proj", (MLP, WIDTH), "txt_mlp.0"),
    ("ff_context.net.2", (WIDTH, MLP), "txt_mlp.2"),
)
_SINGLE: tuple[tuple[str, Shape, str], ...] = (
    ("norm.linear", (3 * WIDTH, WIDTH), "modulation.lin"),
    *((f"attn.to_{part}", _SQUARE, "linear1") for part in "qkv"),
    ("proj_mlp", (MLP, WIDTH), "linear1"),
    ("proj_out", (WIDTH, WIDTH + MLP), "linear2"),
)
