"""Writing diffusers: the tensors that were read if they still describe the adapter, otherwise the style of PEFT.

That style has ``<name>.lora_A.weight`` and ``lora_B.weight``. If a scale is not 1 or ranks differ, the header gets r
and α of every component. It then has all components, because diffusers makes an empty configuration for a missing one.
α is never also written as a tensor, because diffusers refuses a file with both.

Names of a single component from another dialect get the component before them, because a pipeline loads nothing
without it.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from loralens.core.adapter import Adapter, Extra
from loralens.core.image_names import ORIGINAL, are_of_transformer, in_pipeline
from loralens.core.lazy import LazyArray
from loralens.core.names import some
from loralens.core.structured import Update
from loralens.core.together import NORMS
from loralens.errors import LEAVE_OUT, FormatError, LoraLensError, MismatchError, place
from loralens.formats.dialects.diffusers.keys import component, diffusers_leaf
from loralens.formats.dialects.diffusers.metadata import KEY, Configs, dump_configs
from loralens.formats.dialects.diffusers.reader import NAME, detect, read
from loralens.formats.dialects.extras import add_tensors, check_all_dora, check_encoder
from loralens.formats.dialects.pairs import pack_pair, stored_parts
from loralens.formats.dialects.peft.config import PeftConfig
from loralens.formats.dialects.peft.writer import check_reread, rank_fields, translate_companions
from loralens.formats.files.container import Stored

KINDS = ("linear", "conv", "merged", "embedding")  # the kinds of weights in such files
_FLAT = ("lora_", "lycoris_")  # prefixes of kohya's names, which have underscores for dots
# part → the end of its key in the style of PEFT
_ENDINGS = {"alpha": "alpha", "magnitude": "lora_magnitude_vector", "lora_bias": "lora_B.bias"}

Fields = dict[str, dict[str, Any]]  # component → LoraConfig


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
            "diffusers calls them is known of SD, SDXL and FLUX.1 only",
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
        tensors.update(module.origin.tensors if module.origin else {})
    stored = Stored(tensors, adapter.metadata, adapter.config)
    # The header lists targets, which would still name the removed modules.
    if adapter.narrowed and KEY in (adapter.metadata or {}):
        return None
    reread, present = (
        {name: (module.shape, module.rank, module.scale) for name, module in source.items()}
        for source in (read(stored), adapter)
    )
    return stored if reread == present else None


def _pair(name: str, module: Update) -> Mapping[str, LazyArray]:
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
            fix="its layers are not those of SD, SDXL or FLUX.1, whose names are known: give --base, so that the names "
            "become those of the base model",
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


def _add_header(tensors: Mapping[str, LazyArray], adapter: Adapter) -> Stored:
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
    return replace(plain, metadata={**header, KEY: dump_configs(_fields(adapter))})


def _fields(adapter: Adapter) -> Fields:
    """The configuration of each component, with ranks, scales and targets as they are now."""
    old = Configs.of(adapter.metadata if adapter.format == NAME else None)
    members: dict[str, dict[str, Update]] = {}
    for name, module in adapter.items():
        owner = old.component(name)
        # A configuration without a component covers the modules of a single model.
        members.setdefault(component(name) if owner is None else owner, {})[name] = module
    fields: Fields = {part: dict(config.fields) for part, config in old.by_component.items()}
    for part, modules in members.items():
        with place(part or KEY):
            fields[part] = _update_config(fields.get(part), part, modules, adapter)
    return fields


def _update_config(
    old: Mapping[str, Any] | None, part: str, modules: Mapping[str, Update], adapter: Adapter
) -> dict[str, Any]:
    """The configuration of one component with ranks, alphas and targets that fit its modules."""
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


def _paths(modules: Mapping[str, Update], part: str) -> dict[str, Update]:
    """Modules by their path in the configuration, which fits with and without ``text_model`` around CLIP's layers.

    Recent versions of transformers have no ``text_model``. diffusers removes it from the keys of a file, but not from
    its configuration. PEFT compares the end of a path, so the shorter path fits both.
    """
    full = {name.removeprefix(f"{part}.") if part else name: module for name, module in modules.items()}
    short = {path.removeprefix("text_model."): module for path, module in full.items()}
    return short if len(short) == len(full) else full


def _check(stored: Stored, adapter: Adapter) -> None:
    """Refuse to write a file that would be read as another adapter."""
    try:
        back: Mapping[str, Update] = read(stored).modules if detect(stored) else {}
    except LoraLensError:
        back = {}
    strangers = sorted(set(adapter) ^ set(back))
    # For example a name that begins like another program's.
    if strangers:
        what = f"{strangers[0]} could not be read back from a diffusers file under this name"
        raise FormatError(what, fix="rename the module")
    check_reread(adapter.modules, back)
