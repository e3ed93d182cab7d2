"""Reading diffusers: ``pytorch_lora_weights.safetensors``, one file for the UNet or transformer and the text encoders.

Names keep their component: ``unet.down_blocks.0.….attn1.to_q``, ``transformer.…``, ``text_encoder.…``. The module
`keys` describes the generations of keys. The names in a file that a model and not a pipeline saved have no component.

The scale comes from ``lora_adapter_metadata`` in the header (see the module `metadata`). Without this entry it is α/r
if a module has a tensor ``alpha``, and otherwise 1: diffusers reads such files in this way, whatever they were trained
with. ai-toolkit writes the same files with the α of its training folded into the factors.

Tensors that are not half of a pair are the ``lora_magnitude_vector`` of DoRA (in ai-toolkit ``magnitude``), one number
for each output, a bias of B, and others such as the norms of a control LoRA.
"""

from collections.abc import Iterable, Mapping

from loralens.core.adapter import Adapter, Extra, Finding
from loralens.core.lowrank import Layout, LowRank
from loralens.core.structured import Update
from loralens.errors import ShapeError
from loralens.formats.dialects import alpha, dora
from loralens.formats.dialects.diffusers.keys import HALVES, LYCORIS, are_diffusers_keys, diffusers_leaf
from loralens.formats.dialects.diffusers.metadata import KEY, Configs
from loralens.formats.dialects.pairs import SAVE_AGAIN, Parts, gather, halves, origin_of, pair
from loralens.formats.files.container import Stored

NAME = "diffusers"
DORA = {"linear": "norms", "conv": "norms", "embedding": "norms"}  # as in PEFT, which diffusers uses
STORED = (*HALVES, "alpha")  # the parts of one module
_FOREIGN = ("base_model.model.",)  # PEFT's own prefix


def detect(stored: Stored) -> bool:
    """Whether a file is diffusers': by the style of its pairs and their components, or by its header.

    Pairs with ``lora_A.weight`` need a component before them, or an entry of diffusers in the header. Without such an
    entry, a PEFT configuration beside them makes them PEFT's.
    """
    declared = KEY in (stored.metadata or {})
    peft = (
        not declared
        and (stored.config or {}).get("peft_type") == "LORA"
        and any(".lora_A" in k for k in stored.tensors)
    )
    foreign = any(key.startswith(_FOREIGN) or LYCORIS.search(key) for key in stored.tensors)
    # These leaves are kohya's and ComfyUI's.
    down = any(key.endswith(("lora_down.weight", "lora_up.weight")) for key in stored.tensors)
    return not (peft or foreign or down) and are_diffusers_keys(stored.tensors, declared=declared)


def read(stored: Stored) -> Adapter:
    """The adapter of a diffusers file.

    Raises
    ------
    FormatError, ShapeError
        One half of a pair is missing, factors do not fit together, or the header or an α is not valid.
    """
    configs = Configs.of(stored.metadata)
    modules, extra = gather(
        stored.tensors,
        diffusers_leaf,
        update=lambda name, parts: _module(name, parts, configs) if parts.keys() & set(HALVES) else None,
        companions=lambda name, parts, update: _companions(name, parts, paired=update is not None),
    )
    bent = {name: module for name, module in modules.items() if configs.is_dora(name)}
    extra = {**extra, **dora.missing_magnitudes(bent, extra, DORA, lambda name: f"{name}.lora_magnitude_vector")}
    findings = [
        *_about_ranks(modules),
        *_about_alphas(modules, configs),
        *alpha.alpha_findings(modules, stored.metadata),
    ]
    # The warnings that concern the numbers come first, then those about everything else.
    findings += [
        *configs.findings(),
        *_about_extras(extra.items()),
        *_about_config(stored),
        *dora.magnitude_findings(extra, software="diffusers"),
    ]
    return Adapter(
        modules=modules,
        extra=extra,
        config=stored.config,
        metadata=stored.metadata,
        format=NAME,
        findings=tuple(findings),
    )


def _module(name: str, parts: Parts, configs: Configs) -> LowRank:
    prefix = "" if parts.keys() & {"A", "B"} else "embedding_"
    B, A = halves(parts, B=f"{prefix}B", A=f"{prefix}A")
    if A.ndim < 2 or not A.size or not B.size:
        raise ShapeError(f"B {B.shape} and A {A.shape} are not a pair", fix=SAVE_AGAIN)
    # The header comes first, as in diffusers.
    scaling = configs.scaling(name) or alpha.stored_scaling(parts, A.shape[0])
    origin = origin_of(NAME, parts, STORED)
    # The factors of an embedding have no kernel, and are laid out as a matrix already.
    if prefix:
        return LowRank(B, A, scaling.value, scaling=scaling, layout=Layout("embedding"), origin=origin)
    return pair(B, A, scaling=scaling, origin=origin)


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


def _about_extras(extras: Iterable[tuple[str, Extra]]) -> list[Finding]:
    """Findings about DoRA, and about tensors that belong to no pair."""
    roles: dict[str, list[str]] = {}
    for key, extra in extras:
        roles.setdefault(extra.role, []).append(key)
    findings = []
    # The spectrum of ΔW alone is not that of the change of the weight, which the user should know.
    if "magnitude" in roles:
        text = (
            f"{len(roles['magnitude'])} modules are DoRA: magnitudes are kept, and what is measured is ΔW = scale·B·A"
        )
        findings.append(Finding("warning", "use-dora", text))
    if "other" in roles:
        keys = roles["other"]
        text = f"{len(keys)} tensors belong to no pair and are kept unchanged: {', '.join(keys[:3])}"
        findings.append(Finding("warning", "tensor-unread", text))
    return findings


def _about_config(stored: Stored) -> list[Finding]:
    """A finding about a configuration beside the file, which files of diffusers do not have."""
    if stored.config is None:
        return []
    text = "adapter_config.json beside the file is not read: a diffusers file says its scale itself"
    return [Finding("warning", "config-ignored", text, "move it away if it belongs to another adapter")]
