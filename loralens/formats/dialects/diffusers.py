"""Reading diffusers: ``pytorch_lora_weights.safetensors``, one file for the UNet or transformer and the text encoders.

Names keep their component: ``unet.down_blocks.0.….attn1.to_q``, ``transformer.…``, ``text_encoder.…``. The module
`keys` describes the generations of keys. The names in a file that a model and not a pipeline saved have no component.

The scale comes from ``lora_adapter_metadata`` in the header (see the module `metadata`). Without this entry it is α/r
if a module has a tensor ``alpha``, and otherwise 1: diffusers reads such files in this way, whatever they were trained
with. ai-toolkit writes the same files with the α of its training folded into the factors.

Tensors that are not half of a pair are the ``lora_magnitude_vector`` of DoRA (in ai-toolkit ``magnitude``), one number
for each output, a bias of B, and others such as the norms of a control LoRA.
"""

import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, final

from loralens.core.adapter import Adapter, Extra, Finding
from loralens.core.image_names import LANGUAGE_MODEL, ORIGINAL, are_of_transformer, in_pipeline
from loralens.core.lazy import LazyArray
from loralens.core.lowrank import Layout, LowRank, Scaling
from loralens.core.names import some
from loralens.core.stored import parse_json
from loralens.core.structured import Update
from loralens.core.together import NORMS
from loralens.errors import LEAVE_OUT, FormatError, LoraLensError, MismatchError, place
from loralens.formats.dialects import pairs
from loralens.formats.dialects.pairs import (
    PEFT_NORMS,
    STORED,
    Fields,
    Leaf,
    Metadata,
    Modules,
    Parts,
    Tensors,
    add_tensors,
    alpha_findings,
    check_all_dora,
    check_encoder,
    magnitude_findings,
    missing_magnitudes,
    pack_pair,
    stored_parts,
    stored_scaling,
)
from loralens.formats.dialects.peft.config import Clock, PeftConfig
from loralens.formats.dialects.peft.writer import rank_fields, translate_companions
from loralens.formats.files.container import Stored
from loralens.formats.files.json_text import check_printable

COMPONENTS = ("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3")
# The parts of a pair. PEFT has names of its own for the factors of an embedding.
HALVES = ("A", "B", "embedding_A", "embedding_B")
# Leaves of LyCORIS, by which its files are told from diffusers' and ComfyUI's.
LYCORIS = re.compile(r"\.(hada_\w+|lokr_\w+|oft_blocks|oft_diag|on_input|[ab][12]\.weight)$|[._]lora_mid\.weight$")

# style → the keys of its halves. No key fits two of them.
_STYLES = {
    "peft": re.compile(r"^(?P<path>.+)\.lora_(?P<half>[AB])(?:\.(?!weight$|bias$)[^.]+)?\.weight$"),
    "embedding": re.compile(r"^(?P<path>.+)\.lora_(?P<half>embedding_[AB])(?:\.[^.]+)?$"),
    "bare": re.compile(r"^(?P<path>.+)\.lora_(?P<half>[AB])$"),
    "layer": re.compile(r"^(?P<path>.+)\.lora(?:_linear_layer)?\.(?P<half>down|up)\.weight$"),
    "processor": re.compile(r"^(?P<path>.+\.(?:to_(?:q|k|v|out)|add_[qkv]_proj))_lora\.(?P<half>down|up)\.weight$"),
}
# part → the keys of tensors beside a pair, in all styles
_COMPANIONS = {
    "alpha": re.compile(r"^(?P<path>.+?)(?:\.lora|\.lora_linear_layer|_lora)?\.alpha$"),
    "magnitude": re.compile(r"^(?P<path>.+)\.(?:lora_magnitude_vector(?:\.weight)?|magnitude)$"),
    "lora_bias": re.compile(r"^(?P<path>.+?)(?:\.lora_B(?:\.[^.]+)?|\.lora(?:_linear_layer)?\.up|_lora\.up)\.bias$"),
}
_PARTS = {"down": "A", "up": "B"}
# The names of the processor's projections in CLIP and in the UNet.
_IN_TEXT_ENCODER = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_IN_UNET = {"to_out": "to_out.0"}
# The parts of a UNet, with which its paths begin if they have no component.
_UNET_ROOTS = ("down_blocks", "mid_block", "up_blocks")


def style(key: str) -> str | None:
    """The generation of names that a half of a pair is from; None for any other key."""
    return next((name for name, regex in _STYLES.items() if regex.match(key)), None)


def diffusers_leaf(key: str) -> Leaf | None:
    """The canonical name of the module and the part of a key; None for a key that diffusers does not write."""
    for name, regex in _STYLES.items():
        match = regex.match(key)
        if match:
            return Leaf(_module(match["path"], name), _PARTS.get(match["half"], match["half"]))
    for part, regex in _COMPANIONS.items():
        match = regex.match(key)
        if match:
            return Leaf(_module(match["path"], _style_beside(key)), part)
    return None


def _style_beside(key: str) -> str:
    """The generation of the pair that an α, a magnitude or a bias belongs to, as far as its own key tells."""
    stem = key.removesuffix(".alpha").removesuffix(".up.bias")
    if stem != key and stem.endswith("_lora"):
        return "processor"
    return "layer" if stem != key and stem.endswith((".lora", ".lora_linear_layer")) else "peft"


def component(name: str) -> str:
    """The component of the pipeline that a module belongs to; empty if its name does not say."""
    first, dot, _ = name.partition(".")
    return first if dot and first in COMPONENTS else ""


def _module(path: str, written: str) -> str:
    """The canonical name of a path that is stored in the style ``written``."""
    if written not in ("layer", "processor"):
        return path
    # In the old style, the processor of an attention held the factors.
    path = path.replace(".processor.", ".")
    first = path.partition(".")[0]
    # diffusers saved the first text encoder alone under CLIP's own names.
    if first == "text_model":
        path = f"text_encoder.{path}"
    elif first not in COMPONENTS and (written == "processor" or first in _UNET_ROOTS):
        path = f"unet.{path}"
    if written == "layer":
        return path
    # The processor's names of projections are not those of the layers.
    head, _, last = path.rpartition(".")
    in_text_encoder = path.startswith("text_encoder")
    return f"{head}.{(_IN_TEXT_ENCODER if in_text_encoder else _IN_UNET).get(last, last)}"


def are_diffusers_keys(keys: Iterable[str], *, declared: bool) -> bool:
    """Whether the style of all pairs is one of diffusers; ``declared`` says that the header names the dialect."""
    styles = {key: found for key in keys if (found := style(key))}
    return bool(styles) and all(_fits(key, found, declared=declared) for key, found in styles.items())


def _fits(key: str, key_style: str, *, declared: bool) -> bool:
    # The old styles are written by diffusers alone, apart from these prefixes of other programs.
    if key_style in ("layer", "processor"):
        return not key.startswith(("diffusion_model.", "lora_", "lycoris_"))
    if declared:
        return True
    # Without `.weight`, only Mochi's transformer is diffusers'; other files of this style are loralib's.
    if key_style == "bare":
        return key.startswith("transformer.") and not LANGUAGE_MODEL.match(key)
    return bool(component(key)) and not LANGUAGE_MODEL.match(key)


KEY = "lora_adapter_metadata"
ConfigFields = dict[str, dict[str, Any]]  # component → LoraConfig
_FIX = "save the adapter again, or take this entry out of the header: diffusers then takes scale 1"


@final
class Configs:
    """The configuration of each component by its name; empty if the header has none.

    Raises
    ------
    FormatError
        The entry is not a JSON object, or holds values that are not allowed.
    """

    def __init__(self, metadata: Metadata) -> None:
        fields: ConfigFields = {}
        with place(KEY):
            try:
                # Most files have no such entry.
                entry = parse_json((metadata or {}).get(KEY, "{}"))
            except ValueError as error:
                raise FormatError("is not valid JSON", fix=_FIX) from error
            if not isinstance(entry, dict):
                raise FormatError("is not a JSON object", fix=_FIX)
            for key, value in entry.items():
                check_printable(key)
                component, _, name = key.rpartition(".")
                fields.setdefault(component, {})[name] = value
            # All components share one time limit for their expressions, so that many of them cannot add up.
            clock = Clock()
            self.by_component = {component: PeftConfig(said, clock) for component, said in fields.items()}

    def component(self, name: str) -> str | None:
        """The component whose configuration applies to a module; None if there is none."""
        # The longest prefix that is a component decides.
        owner = name
        while self.by_component and owner:
            owner = owner.rpartition(".")[0]
            if owner in self.by_component:
                return owner
        return None

    def of(self, name: str) -> Fields:
        """The fields of the configuration that applies to a module."""
        component = self.component(name)
        return {} if component is None else self.by_component[component].fields

    def scaling(self, name: str) -> Scaling | None:
        """α, r and formula of a module; None if no configuration applies to it."""
        component = self.component(name)
        if component is None:
            return None
        # PEFT's patterns are for the paths inside of the component's model.
        path = name.removeprefix(f"{component}.") if component else name
        scaling = self.by_component[component].scaling(path)
        return replace(scaling, origin=scaling.origin.replace("adapter_config.json", KEY))

    def findings(self) -> list[Finding]:
        """Findings about settings that make the update of a component differ from scale·B·A on the original base."""
        return [
            replace(finding, text=f"{component}: {finding.text}" if component else finding.text)
            for component, config in self.by_component.items()
            for finding in config.variants()
            if finding.code != "use-dora"  # the reader finds DoRA by the magnitudes
        ]


NAME = "diffusers"
_FOREIGN = "base_model.model."  # PEFT's own prefix


def detect(stored: Stored) -> bool:
    """Whether a file is diffusers': by the style of its pairs and their components, or by its header.

    Pairs with ``lora_A.weight`` need a component before them, or an entry of diffusers in the header. Without such an
    entry, a PEFT configuration beside them makes them PEFT's.
    """
    declared, keys = KEY in (stored.metadata or {}), stored.tensors
    configured = not declared and (stored.config or {}).get("peft_type") == "LORA"
    peft = configured and any(".lora_A" in key for key in keys)
    # The last two leaves are kohya's and ComfyUI's.
    foreign = any(
        key.startswith(_FOREIGN) or LYCORIS.search(key) or key.endswith(("lora_down.weight", "lora_up.weight"))
        for key in keys
    )
    return not (peft or foreign) and are_diffusers_keys(keys, declared=declared)


def read(stored: Stored) -> Adapter:
    """The adapter of a diffusers file.

    Raises
    ------
    FormatError, ShapeError
        One half of a pair is missing, factors do not fit together, or the header or an α is not valid.
    """
    configs = Configs(stored.metadata)
    modules, extra = pairs.gather(
        stored.tensors,
        diffusers_leaf,
        update=lambda name, parts: _reader_module(name, parts, configs) if parts.keys() & set(HALVES) else None,
        companions=lambda name, parts, update: {
            key: Extra(part if update else "other", name, tensor)
            for part, (key, tensor) in parts.items()
            if update is None or part not in STORED
        },
    )
    of_dora = {name: module for name, module in modules.items() if configs.of(name).get("use_dora")}
    extra |= missing_magnitudes(of_dora, extra, PEFT_NORMS, "{}.lora_magnitude_vector")
    # The warnings that concern the numbers come first, then those about everything else.
    findings = _about_alphas(modules, configs)
    findings += alpha_findings(modules, stored.metadata) + configs.findings() + _about_extras(extra)
    # Files of diffusers have no configuration beside them.
    if stored.config is not None:
        text = "adapter_config.json beside the file is not read: a diffusers file says its scale itself"
        findings.append(Finding("warning", "config-ignored", text, "move it away if it belongs to another adapter"))
    findings += magnitude_findings(extra, software="diffusers")
    return pairs.make_adapter(stored, NAME, modules, extra, findings)


def _reader_module(name: str, parts: Parts, configs: Configs) -> LowRank:
    # The header comes first, as in diffusers.
    def scaling(parts: Parts, rank: int) -> Scaling:
        return configs.scaling(name) or stored_scaling(parts, rank)

    if parts.keys() & {"A", "B"}:
        return pairs.read_pair(parts, NAME, scaling)
    # The factors of an embedding have no kernel, and are laid out as a matrix already.
    module = pairs.read_pair(parts, NAME, scaling, "embedding_B", "embedding_A", conv=False)
    B, A = module.factors
    return LowRank(B, A, module.scale, scaling=module.scaling, layout=Layout("embedding"), origin=module.origin)


def _about_alphas(modules: Modules, configs: Configs) -> list[Finding]:
    """Findings about ranks in the header that differ from the tensors, and about modules with a second α."""
    # diffusers cannot load such a file.
    text = "{}: the header says r = {} and the factors have rank {}"
    fix = f"correct {KEY}: the scale depends on it"
    findings = [
        Finding("error", "rank-disagrees", text.format(name, module.scaling.rank, module.rank), fix)
        for name, module in modules.items()
        if module.scaling.rank not in (None, module.rank)
    ]
    both = [
        name
        for name, module in modules.items()
        if configs.component(name) is not None and any(k.endswith(".alpha") for k in _tensors_read(module))
    ]
    # The tensor is ignored by the reader, but diffusers refuses the file.
    if both:
        text = f"{len(both)} modules (the first is {both[0]}) have an alpha, but the one in {KEY} is used"
        fix = "remove one of the two: diffusers refuses a file with both"
        findings.append(Finding("warning", "alpha-twice", text, fix))
    return findings


def _tensors_read(module: Update) -> Tensors:
    return module.origin.tensors if module.origin else {}


def _about_extras(extras: Mapping[str, Extra]) -> list[Finding]:
    """Findings about DoRA, and about tensors that belong to no pair."""
    count = sum(extra.role == "magnitude" for extra in extras.values())
    # The spectrum of ΔW alone is not that of the change of the weight, which the user should know.
    text = f"{count} modules are DoRA: magnitudes are kept, and what is measured is ΔW = scale·B·A"
    findings = [Finding("note", "use-dora", text)] if count else []
    return findings + pairs.unread_findings([key for key, extra in extras.items() if extra.role == "other"])


KINDS = ("linear", "conv", "merged", "embedding")  # the kinds of weights in such files
_FLAT = ("lora_", "lycoris_")  # prefixes of kohya's names, which have underscores for dots
# part → the end of its key in the style of PEFT
_ENDINGS = {"alpha": "alpha", "magnitude": "lora_magnitude_vector", "lora_bias": "lora_B.bias"}


def write(adapter: Adapter) -> Stored:
    """The adapter as diffusers stores it.

    Raises
    ------
    FormatError, MismatchError
        The file cannot hold a kind of weight, a name that diffusers would pass over, or an extra; or an update is not a
        pair.
    """
    unchanged = _stored_file(adapter)
    if unchanged is not None:
        return unchanged
    names: dict[str, str] = {}
    # diffusers' own adapters keep their names, also those without a component.
    if adapter.format != NAME:
        for name in adapter:
            with place(name):
                check_encoder(name)
        transformer = are_of_transformer(adapter)
        names = {name: new for name in adapter if (new := in_pipeline(name, transformer=transformer)) != name}
        adapter = adapter.renamed(names)
        _check_names(adapter)
    tensors: dict[str, LazyArray] = {}
    for name, module in adapter.items():
        with place(name):
            tensors.update(_pair(name, module))
    add_tensors(tensors, _extras(adapter))
    stored = _add_header(dict(sorted(tensors.items())), adapter)
    _check(stored, adapter)
    return replace(stored, names={new: name for name, new in names.items()})


def _check_names(adapter: Adapter) -> None:
    """Refuse names of which a pipeline of diffusers would load none, or only some."""
    original = [name for name in adapter if name.startswith(ORIGINAL)]
    if original:
        raise MismatchError(
            f"{len(original)} modules are named as in the original checkpoint ({some(original, 1)}), and what "
            "diffusers calls them is not known: their names and shapes are of no model that loralens has",
            fix="give the file to diffusers as it is: of many models it reads ComfyUI's names",
        )
    without = [name for name in adapter if not component(name)]
    if without and len(without) < len(adapter):
        first = without[0].partition(".")[0]
        raise MismatchError(
            f"the names of {len(without)} modules ({some(without, 1)}) do not begin with a component of the pipeline, "
            "as the others do, so diffusers would leave them out",
            fix=f"say what they belong to with loralens convert: --prefix {first}=transformer.{first}",
        )


def _stored_file(adapter: Adapter) -> Stored | None:
    """The tensors that the adapter was read from, without removed modules; None if they no longer describe it."""
    if adapter.format != NAME or not all(m.origin and m.origin.format == NAME for m in adapter.modules.values()):
        return None
    tensors = {key: extra.tensor for key, extra in adapter.extra.items() if extra.role not in NORMS}
    for module in adapter.modules.values():
        tensors.update(_tensors_read(module))
    stored = Stored(tensors, adapter.metadata, adapter.config)
    # The header lists `target_modules`, which would still name the removed modules.
    if adapter.narrowed and KEY in (adapter.metadata or {}):
        return None
    reread, present = (
        {name: (module.shape, module.rank, module.scale) for name, module in source.items()}
        for source in (read(stored), adapter)
    )
    return stored if reread == present else None


def _pair(name: str, module: Update) -> Tensors:
    """The two halves of a module under keys of its canonical name."""
    kind = module.layout.kind
    # Experts, for example, have no keys that diffusers reads.
    if kind not in KINDS:
        what = f"diffusers files hold linear layers, convolutions and embeddings, but this is of kind {kind!r}"
        raise FormatError(what, fix=LEAVE_OUT)
    if name.startswith(_FLAT):
        what = "this is a name with underscores for dots, under which diffusers would load nothing"
        raise MismatchError(
            what,
            fix="its layers are not those of a model in docs/formats.md, whose names are known: give --base, so that "
            "the names become those of the base model",
        )
    # The halves as they were stored, if the module was read from a diffusers file.
    parts = stored_parts(module, NAME, diffusers_leaf)
    prefix = "embedding_" if kind == "embedding" else ""
    B, A = (parts[f"{prefix}B"][1], parts[f"{prefix}A"][1]) if parts else pack_pair(module)
    if kind == "embedding":
        return {f"{name}.lora_embedding_A": A, f"{name}.lora_embedding_B": B}
    return {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}


def _extras(adapter: Adapter) -> dict[str, LazyArray]:
    """The extras: unchanged in diffusers' own dialect; from other dialects, DoRA magnitudes and biases of B."""
    if adapter.format == NAME:
        return {_key(key, extra): extra.tensor for key, extra in adapter.extra.items() if extra.role not in NORMS}
    tensors = translate_companions(adapter, "a diffusers file")
    # PEFT, which diffusers uses, makes all modules of a component DoRA or none.
    check_all_dora(adapter, "diffusers", part=component)
    return tensors


def _key(key: str, extra: Extra) -> str:
    """The key of an extra if it names its module, else a key with the same ending and the module's present name."""
    parts = diffusers_leaf(key)
    return key if parts is None or parts.name == extra.module else f"{extra.module}.{_ENDINGS[parts.part]}"


def _add_header(tensors: Tensors, adapter: Adapter) -> Stored:
    """The tensors, with ranks and scales in the header if the tensors alone do not tell them."""
    own = adapter.format == NAME
    plain = Stored(tensors, adapter.metadata if own else {"format": "pt"}, adapter.config if own else None)
    # Without a header, diffusers applies every module at scale 1, and takes one rank for a component.
    ranks = {(component(name), module.rank) for name, module in adapter.items()}
    one_rank = len(ranks) == len({part for part, _ in ranks})
    uniform = one_rank and all(module.scale == 1 for module in adapter.modules.values())
    header = plain.metadata or {}
    if uniform and KEY not in header and detect(plain):
        return plain
    # diffusers sorts the keys of patterns too, but PEFT takes the first key that matches, so they keep their order.
    fields = {
        f"{part}.{name}" if part else name: v for part, said in _fields(adapter).items() for name, v in said.items()
    }
    return replace(plain, metadata={**header, KEY: json.dumps(dict(sorted(fields.items())), indent=2)})


def _fields(adapter: Adapter) -> ConfigFields:
    """The configuration of each component, with ranks, scales and `target_modules` as they are now."""
    old = Configs(adapter.metadata if adapter.format == NAME else None)
    members: dict[str, dict[str, Update]] = {}
    for name, module in adapter.items():
        owner = old.component(name)
        # A configuration without a component covers the modules of a single model.
        members.setdefault(component(name) if owner is None else owner, {})[name] = module
    fields: ConfigFields = {part: dict(config.fields) for part, config in old.by_component.items()}
    for part, modules in members.items():
        with place(part or KEY):
            fields[part] = _update_config(fields.get(part), part, modules, adapter)
    return fields


def _update_config(old: Fields | None, part: str, modules: Modules, adapter: Adapter) -> dict[str, Any]:
    """The configuration of one component with ranks, alphas and `target_modules` that fit its modules."""
    config = PeftConfig(old or {})
    terms = {
        path: (module.rank, module.scaling.alpha_for(module.scale, module.rank, config.formula))
        for path, module in _paths(modules, part).items()
    }
    # The change of the base depends on r, so a new r would be another base.
    if any(config.rank(path) != rank for path, (rank, _) in terms.items()):
        config.check_base_unchanged()
    roles = {extra.role for extra in adapter.extra.values() if extra.module in modules}
    fields: dict[str, Any] = {
        "peft_type": "LORA",
        "use_dora": bool(roles & {"magnitude", "norms"}),
        "lora_bias": "lora_bias" in roles,
        **(old or {}),
        **rank_fields(terms),
    }
    # Targets that fit are kept: they may be a short expression.
    if adapter.narrowed or "target_modules" not in fields or PeftConfig(fields).unmatched_modules(terms):
        fields["target_modules"] = list(terms)
    return fields


def _paths(modules: Modules, part: str) -> dict[str, Update]:
    """Modules by their path in the configuration, which fits with and without ``text_model`` around CLIP's layers.

    Recent versions of transformers have no ``text_model``. diffusers removes it from the keys of a file, but not from
    its configuration. PEFT compares the end of a path, so the shorter path fits both.
    """
    full = {name.removeprefix(f"{part}.") if part else name: module for name, module in modules.items()}
    short = {path.removeprefix("text_model."): module for path, module in full.items()}
    return short if len(short) == len(full) else full


def _check(stored: Stored, adapter: Adapter) -> None:
    """Refuse to write a file that would be read as another adapter."""
    back: Iterable[str] = ()
    with suppress(LoraLensError):
        back = read(stored) if detect(stored) else ()
    strangers = sorted(set(adapter) ^ set(back))
    # For example a name that begins like another program's.
    if strangers:
        what = f"{strangers[0]} could not be read back from a diffusers file under this name"
        raise FormatError(what, fix="rename the module")
