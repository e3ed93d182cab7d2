"""Reading diffusers: ``pytorch_lora_weights.safetensors``, one file for the UNet or transformer and the text encoders.

Names keep their component: ``unet.down_blocks.0.….attn1.to_q``, ``transformer.…``, ``text_encoder.…``. The module
`keys` describes the generations of keys. The names in a file that a model and not a pipeline saved have no component.

The scale comes from ``lora_adapter_metadata`` in the header (see the module `metadata`). Without this entry it is α/r
if a module has a tensor ``alpha``, and otherwise 1: diffusers reads such files in this way, whatever they were trained
with. ai-toolkit writes the same files with the α of its training folded into the factors.

Tensors that are not half of a pair are the ``lora_magnitude_vector`` of DoRA (in ai-toolkit ``magnitude``), one number
for each output, a bias of B, and others such as the norms of a control LoRA.
"""

from collections.abc import Mapping

from loralens.core.adapter import Adapter, Extra, Finding
from loralens.core.lowrank import Layout, LowRank
from loralens.core.structured import Update
from loralens.formats.dialects import alpha, dora, pairs
from loralens.formats.dialects.diffusers.keys import HALVES, LYCORIS, are_diffusers_keys, diffusers_leaf
from loralens.formats.dialects.diffusers.metadata import KEY, Configs
from loralens.formats.dialects.pairs import Parts
from loralens.formats.files.container import Stored

NAME = "diffusers"
DORA = {"linear": "norms", "conv": "norms", "embedding": "norms"}  # as in PEFT, which diffusers uses
STORED = (*HALVES, "alpha")  # the parts of one module
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
    configs = Configs.of(stored.metadata)
    modules, extra = pairs.gather(
        stored.tensors,
        diffusers_leaf,
        update=lambda name, parts: _module(name, parts, configs) if parts.keys() & set(HALVES) else None,
        companions=lambda name, parts, update: _companions(name, parts, paired=update is not None),
    )
    of_dora = {name: module for name, module in modules.items() if configs.is_dora(name)}
    extra |= dora.missing_magnitudes(of_dora, extra, DORA, lambda name: f"{name}.lora_magnitude_vector")
    # The warnings that concern the numbers come first, then those about everything else.
    findings = _about_ranks(modules) + _about_alphas(modules, configs)
    findings += alpha.alpha_findings(modules, stored.metadata) + configs.findings() + _about_extras(extra)
    # Files of diffusers have no configuration beside them.
    if stored.config is not None:
        text = "adapter_config.json beside the file is not read: a diffusers file says its scale itself"
        findings.append(Finding("warning", "config-ignored", text, "move it away if it belongs to another adapter"))
    findings += dora.magnitude_findings(extra, software="diffusers")
    return pairs.make_adapter(stored, NAME, modules, extra, findings)


def _module(name: str, parts: Parts, configs: Configs) -> LowRank:
    prefix = "" if parts.keys() & {"A", "B"} else "embedding_"
    B, A = pairs.factors(parts, f"{prefix}B", f"{prefix}A")
    # The header comes first, as in diffusers.
    scaling = configs.scaling(name) or alpha.stored_scaling(parts, A.shape[0])
    origin = pairs.origin_of(NAME, parts, STORED)
    # The factors of an embedding have no kernel, and are laid out as a matrix already.
    if prefix:
        return LowRank(B, A, scaling.value, scaling=scaling, layout=Layout("embedding"), origin=origin)
    return pairs.pair(B, A, scaling=scaling, origin=origin)


def _companions(name: str, parts: Parts, *, paired: bool) -> dict[str, Extra]:
    """The extras of a module, or of a name that has no pair."""
    loose = {part: held for part, held in parts.items() if not paired or part not in STORED}
    return {key: Extra(part if paired else "other", name, tensor) for part, (key, tensor) in loose.items()}


def _about_ranks(modules: Mapping[str, Update]) -> list[Finding]:
    """Findings about ranks in the header that differ from the tensors; diffusers cannot load such a file."""
    text = "{}: the header says r = {} and the factors have rank {}"
    fix = f"correct {KEY}: the scale depends on it"
    return [
        Finding("error", "rank-disagrees", text.format(name, module.scaling.rank, module.rank), fix)
        for name, module in modules.items()
        if module.scaling.rank not in (None, module.rank)
    ]


def _about_alphas(modules: Mapping[str, Update], configs: Configs) -> list[Finding]:
    """A finding about modules with an α both in the header, which is used, and as a tensor."""
    both = [
        name
        for name, module in modules.items()
        if configs.component(name) is not None
        and module.origin
        # The tensor is ignored by the reader, but diffusers refuses the file.
        and any(k.endswith(".alpha") for k in module.origin.tensors)
    ]
    if not both:
        return []
    text = f"{len(both)} modules (the first is {both[0]}) have an alpha, but the one in {KEY} is used"
    return [Finding("warning", "alpha-twice", text, "remove one of the two: diffusers refuses a file with both")]


def _about_extras(extras: Mapping[str, Extra]) -> list[Finding]:
    """Findings about DoRA, and about tensors that belong to no pair."""
    count = sum(extra.role == "magnitude" for extra in extras.values())
    # The spectrum of ΔW alone is not that of the change of the weight, which the user should know.
    text = f"{count} modules are DoRA: magnitudes are kept, and what is measured is ΔW = scale·B·A"
    findings = [Finding("note", "use-dora", text)] if count else []
    return findings + pairs.unread_findings([key for key, extra in extras.items() if extra.role == "other"])
