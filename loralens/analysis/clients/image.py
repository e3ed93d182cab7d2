"""The rules that tell what ComfyUI and sd-scripts would reject, or silently ignore, in an adapter.

ComfyUI 0.3.64 reads its own names and those of kohya and LyCORIS. Of diffusers' and PEFT's names it reads those in its
maps. It skips an unknown name and writes a line to its log. sd-scripts 0.10.1 reads only kohya's files, with a
``load_state_dict`` that is not strict, so unknown names are skipped.
"""

from collections.abc import Callable, Iterator
from functools import partial

from loralens.core.adapter import Adapter, Finding
from loralens.core.names import some
from loralens.core.naming import image_names
from loralens.core.naming.image_models import image_model

READ = ("comfyui", "kohya", "lycoris", "diffusers", "peft", "xlabs")  # dialects of which ComfyUI knows some names
OWN = ("comfyui", "kohya", "lycoris")  # dialects that it reads completely
ALGORITHMS = (  # endings of keys from which comfy/weight_adapter builds updates that are not pairs here
    ".a1.weight", ".a2.weight", ".b1.weight", ".b2.weight", ".oft_blocks", ".rescale",
)  # fmt: skip
_OTHERS = "(of other models than SD, SDXL and FLUX.1 with --base PIPELINE, the folder of the whole pipeline)"
TO_COMFYUI = f"loralens convert … --to comfyui {_OTHERS}"
TO_KOHYA = f"loralens convert … --to kohya {_OTHERS}"
RENAME_KOHYA = "loralens convert … --to kohya"


error = partial(Finding, "error")  # about what makes a consumer refuse an adapter, or apply a different update
warning = partial(Finding, "warning")  # about what a consumer ignores, or handles differently in some versions


def _comfyui_names(adapter: Adapter) -> Iterator[Finding]:
    """``model_lora_keys_unet`` and ``model_lora_keys_clip`` of comfy/lora.py, ``convert_lora`` of lora_convert.py."""
    stored, files = stored_keys(adapter), _comfyui_files(adapter)
    unknown = {name: file for name, (file, known) in files.items() if not known}
    # If ComfyUI knows no name at all, the dialect is the reason, and a list of names would not help.
    if adapter.format == "xlabs" and unknown:
        yield error("dialect", "ComfyUI reads XLabs' names only where all blocks of FLUX are there", TO_COMFYUI)
    elif adapter.format not in READ or (unknown and len(unknown) == len(stored) and adapter.format not in OWN):
        yield error("dialect", f"is {adapter.format}, and ComfyUI reads {', '.join(OWN)}", TO_COMFYUI)
    else:
        yield from _report_unknown(unknown, len(stored), "ComfyUI", TO_COMFYUI)
        # Its maps of diffusers' transformers: SD3, FLUX, AuraFlow, PixArt, HunyuanVideo, HiDream, Qwen-Image.
        unsure = [file for file, known in files.values() if known and image_names.comfyui_may_lack(file)]
        if unsure:
            text = f"{len(unsure)} modules have names that no map of ComfyUI 0.3.64 has: {some(unsure, 1)}"
            fix = (
                "if ComfyUI's model has the names after the prefix: loralens convert … "
                "--prefix transformer.=diffusion_model."
            )
            yield warning("names-unmapped", text, fix)


def _comfyui_files(adapter: Adapter) -> dict[str, tuple[str, bool]]:
    """The name of each module in the file, and whether ComfyUI can know that name."""
    stored = stored_keys(adapter)
    # ComfyUI renames XLabs' names only in a complete file, by its ``convert_uso_lora``.
    if adapter.format == "xlabs":
        is_uso = image_names.is_uso(key for keys in stored.values() for key in keys)
        return {name: (keys[0], is_uso) for name, keys in stored.items()}
    files = {name: image_names.file_name(keys) for name, keys in stored.items()}
    return {
        name: (stored[name][0], False) if file is None else (file, image_names.comfyui_has(file))
        for name, file in files.items()
    }


def stored_keys(adapter: Adapter) -> dict[str, list[str]]:
    """The keys of each module in its file, for modules that were read from a file."""
    return {name: list(module.origin.tensors) for name, module in adapter.items() if module.origin}


def _report_unknown(unknown: dict[str, str], count: int, consumer: str, fix: str) -> Iterator[Finding]:
    if unknown:
        text = f"{consumer} ignores {len(unknown)} of {count} modules, whose names it does not have"
        yield error("names", f"{text}: {some(unknown.values(), 1)}", fix)


def _comfyui_scale(adapter: Adapter) -> Iterator[Finding]:
    """``load_lora``: the scale is α/rank with the ``.alpha`` beside a pair, and 1 without; nothing else is read."""
    # In these dialects the scale may stand in a header or a configuration.
    if adapter.format not in ("diffusers", "peft"):
        return
    stored = stored_keys(adapter)
    unsaid = [
        name
        for name, (_, known) in _comfyui_files(adapter).items()
        if known and adapter[name].scale != 1 and not any(key.endswith(".alpha") for key in stored[name])
    ]
    if unsaid:
        text = f"the scale of {some(unsaid, 1)} stands outside the weights, where ComfyUI does not look: it takes 1"
        yield error("scale", text, TO_COMFYUI)


def _comfyui_dora(adapter: Adapter) -> Iterator[Finding]:
    """``weight_decompose`` of weight_adapter/base.py, for a ``dora_scale``; no other name of a magnitude is read."""
    magnitudes = {key: extra for key, extra in adapter.extra.items() if extra.role.startswith("magnitude")}
    unread = [key for key in magnitudes if not key.endswith(".dora_scale")]
    if unread:
        yield error("dora", f"DoRA magnitudes are ignored: {some(unread, 1)}", "merge it into the base")
    # ComfyUI and LyCORIS agree on magnitudes by input, so "magnitude_in" needs no warning.
    if any(extra.role == "magnitude" for key, extra in magnitudes.items() if key not in unread):
        text = "ComfyUI divides by ‖W‖, not ‖W+ΔW‖, on the output axis: DoRA has another effect than in training"
        yield warning("dora", text, "merge it into the base")


def _comfyui_extra(adapter: Adapter) -> Iterator[Finding]:
    """``load_lora``: ``diff``, ``diff_b``, ``set_weight``, ``w_norm``, ``b_norm``, ``reshape_weight``."""
    applied = {"magnitude", "magnitude_in", "diff", "diff_b", "shape"}
    if adapter.format == "comfyui":
        applied.add("saved")  # set_weight; a head that another dialect trained in full is ignored
    ignored = [
        key for key, extra in adapter.extra.items() if extra.role not in applied and not key.endswith(ALGORITHMS)
    ]
    if ignored:
        text = f"{len(ignored)} tensors that do not belong to a pair are ignored"
        yield warning("extra-ignored", text, "merge them into the base")


def _comfyui_alpha(adapter: Adapter) -> Iterator[Finding]:
    """``LoRAAdapter.calculate_weight``: an α of 0 is a scale of 0, where sd-scripts and LyCORIS take α = r."""
    zero = [name for name, module in adapter.items() if module.scaling.origin.startswith("alpha 0")]
    if zero:
        text = f"ComfyUI takes α = 0 as a scale of 0, others as α = r: {len(zero)} modules do nothing, {some(zero, 1)}"
        yield error("alpha-zero", text, TO_COMFYUI)


def _kohya_names(adapter: Adapter) -> Iterator[Finding]:
    """``LoRANetwork.create_modules`` and ``create_network_from_weights`` of networks/lora.py."""
    if adapter.format != "kohya":
        fix = "train and load it with network_module lycoris.kohya" if adapter.format == "lycoris" else TO_KOHYA
        yield error("dialect", f"is {adapter.format}, and networks.lora reads kohya", fix)
        return
    stored = stored_keys(adapter)
    files = {name: image_names.file_name(keys) or keys[0] for name, keys in stored.items()}
    unknown = {name: file for name, file in files.items() if not image_names.sd_scripts_has(file)}
    # A known model has one name for each layer.
    model = image_model({name: module.shape for name, module in adapter.items()}, (adapter.base_model,))
    if model is not None:
        right = {name: model.kohya(model.find(name, adapter[name].shape)[0]) for name in files}
        unknown |= {name: file for name, file in files.items() if file != right[name]}
    yield from _report_unknown(unknown, len(stored), "sd-scripts", TO_KOHYA if model is None else RENAME_KOHYA)


def _kohya_extra(adapter: Adapter) -> Iterator[Finding]:
    """networks/lora.py has no DoRA: ``dora_scale`` is one of the keys that ``load_state_dict`` passes over."""
    if adapter.format != "kohya":
        return
    if any(extra.role.startswith("magnitude") for extra in adapter.extra.values()):
        text = "networks.lora has no DoRA: magnitudes are ignored"
        yield error("dora", text, "load it with network_module lycoris.kohya, or merge it into the base")
    unread = [key for key, extra in adapter.extra.items() if not extra.role.startswith("magnitude")]
    if unread:
        text = f"{len(unread)} tensors that do not belong to a pair are ignored: {some(unread, 1)}"
        yield warning("extra-ignored", text, "merge them into the base")


Rules = tuple[Callable[[Adapter], Iterator[Finding]], ...]
COMFYUI: Rules = (_comfyui_names, _comfyui_scale, _comfyui_alpha, _comfyui_dora, _comfyui_extra)
SD_SCRIPTS: Rules = (_kohya_names, _kohya_extra)
