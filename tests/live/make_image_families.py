"""Makes ``loralens/core/image_families.json``: the layers of image and video models, and the names that clients map.

Nothing in the table is typed: the layers are those of the model classes of diffusers and ComfyUI, the two names of a
layer are matched by running the converters of diffusers and the maps of ComfyUI, and a client is said to map a naming
scheme after its own loader has mapped a file with all layers in that scheme. Run it in an environment with diffusers,
with the sources of ComfyUI beside it::

    python -m tests.live.make_image_families COMFYUI

The models are made without numbers (``meta``), except for the tensors whose rows are followed through a converter.
"""

import json
import logging
import re
import sys
from collections import defaultdict
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from pathlib import Path
from unittest.mock import MagicMock

import diffusers
import torch
from diffusers.loaders import lora_pipeline, single_file_model

TARGET = Path(__file__).parents[2] / "loralens" / "core" / "image_families.json"
# Packages that ComfyUI imports for audio, video and sampling. Nothing here runs them.
ABSENT = (
    "torchvision", "torchvision.ops", "torchvision.transforms", "torchvision.transforms.functional", "torchaudio",
    "torchaudio.functional", "torchaudio.transforms", "torchsde", "av", "kornia", "spandrel", "comfy_kitchen",
    "comfy_kitchen.tensor", "comfy_aimdo", "comfy_aimdo.host_buffer", "comfy_aimdo.model_mmap",
    "comfy_aimdo.model_vbar", "comfy_aimdo.torch", "comfy_aimdo.vram_buffer",
)  # fmt: skip
# A naming scheme: a prefix, and the name of the layer in the native checkpoint (N) or in diffusers (D), with dots or
# with underscores (_).
SCHEMES = (
    "diffusion_model.N", "N", "lora_unet_N_", "transformer.D", "D", "diffusion_model.D", "base_model.model.D",
    "lora_unet_D_", "lora_transformer_D_", "lycoris_D_", "transformer.N", "base_model.model.N",
)  # fmt: skip


def comfyui(path):
    """Import ComfyUI's modules from its sources."""
    sys.path.insert(0, path)
    for name in ABSENT:
        stand_in = MagicMock(name=name)
        stand_in.__path__, stand_in.__spec__ = [], ModuleSpec(name, None)
        sys.modules.setdefault(name, stand_in)
    import comfy.options

    sys.argv = [sys.argv[0], "--cpu"]
    comfy.options.enable_args_parsing()
    import comfy.lora
    import comfy.lora_convert
    import comfy.supported_models

    logging.disable()
    return comfy


WAN = {"image_model": "wan2.1", "patch_size": (1, 2, 2), "freq_dim": 256, "window_size": (-1, -1), "qk_norm": True,
       "cross_attn_norm": True, "eps": 1e-6}  # fmt: skip


def wan(heads, ffn, layers, *, channels=16, inputs=16, image=False):
    dim = heads * 128
    return (
        {"num_attention_heads": heads, "ffn_dim": ffn, "num_layers": layers, "in_channels": inputs,
         "out_channels": channels, **({"image_dim": 1280, "added_kv_proj_dim": dim} if image else {})},
        {**WAN, "dim": dim, "out_dim": channels, "in_dim": inputs, "num_heads": heads, "ffn_dim": ffn,
         "num_layers": layers, "model_type": "i2v" if image else "t2v"},
    )  # fmt: skip


def sd3(layers, dual=0, norm=None):
    width = 64 * layers
    return (
        {"num_layers": layers, "num_attention_heads": layers, "caption_projection_dim": width,
         "pos_embed_max_size": 192,
         "qk_norm": norm and "rms_norm", "dual_attention_layers": tuple(range(dual))},
        {"in_channels": 16, "patch_size": 2, "depth": layers, "input_size": None, "adm_in_channels": 2048,
         "context_embedder_config": {"target": "torch.nn.Linear",
                                     "params": {"in_features": 4096, "out_features": width}},
         "num_patches": 192 * 192, "pos_embed_max_size": 192, "pos_embed_scaling_factor": None, "qk_norm": norm,
         "x_block_self_attn_layers": list(range(dual))},
    )  # fmt: skip


def flux2(double, single, heads, context, *, guidance=True):
    return (
        {"num_layers": double, "num_single_layers": single, "num_attention_heads": heads,
         "joint_attention_dim": context,
         "guidance_embeds": guidance},
        {"image_model": "flux2", "axes_dim": [32] * 4, "num_heads": heads, "mlp_ratio": 3.0, "theta": 2000,
         "out_channels": 128, "global_modulation": True, "mlp_silu_act": True, "qkv_bias": False, "ops_bias": False,
         "txt_ids_dims": [3], "in_channels": 128, "hidden_size": heads * 128, "context_in_dim": context,
         "patch_size": 1, "vec_in_dim": None, "depth": double, "depth_single_blocks": single,
         "guidance_embed": guidance},
    )  # fmt: skip


def kandinsky(width, ffn, blocks, text, time, axes):
    return (
        {"in_visual_dim": 16, "out_visual_dim": 16, "time_dim": time, "model_dim": width, "ff_dim": ffn,
         "num_text_blocks": text, "num_visual_blocks": blocks, "axes_dims": axes, "visual_cond": True},
        {"image_model": "kandinsky5", "model_dim": width, "axes_dims": axes, "time_dim": time, "ff_dim": ffn,
         "visual_embed_dim": 132, "num_text_blocks": text, "num_visual_blocks": blocks},
    )  # fmt: skip


def lumina(width, **config):
    return {"image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": width, "qk_norm": True, **config}


# family: words that name it, diffusers' model and loader, ComfyUI's class, and its sizes as (diffusers, ComfyUI)
FAMILIES = {
    "Qwen-Image": (("qwen-image", "qwen_image", "qwenimage"), "QwenImageTransformer2DModel", "QwenImage", "QwenImage", {
        "": ({}, {"image_model": "qwen_image", "in_channels": 64, "num_layers": 60}),
    }),
    "SD3": (("sd3", "stable-diffusion-3", "stable_diffusion_3"), "SD3Transformer2DModel", "SD3", "SD3", {
        "medium": sd3(24), "3.5 medium": sd3(24, 13, "rms"), "3.5 large": sd3(38, norm="rms"),
    }),
    "Wan": (("wan2", "wan-2", "wan_2", "wan-ai", "wan21", "wan22"), "WanTransformer3DModel", "Wan", "WAN21_T2V", {
        "14B": wan(40, 13824, 40), "14B I2V": wan(40, 13824, 40, inputs=36, image=True),
        "14B 2.2 I2V": wan(40, 13824, 40, inputs=36), "1.3B": wan(12, 8960, 30),
        "5B": wan(24, 14336, 30, channels=48, inputs=48),
    }),
    "HunyuanVideo": (("hunyuanvideo", "hunyuan-video", "hunyuan_video"), "HunyuanVideoTransformer3DModel",
                     "HunyuanVideo", "HunyuanVideo", {
        "": ({}, {"image_model": "hunyuan_video", "in_channels": 16, "patch_size": [1, 2, 2], "out_channels": 16,
                  "vec_in_dim": 768, "axes_dim": [16, 56, 56], "context_in_dim": 4096, "hidden_size": 3072,
                  "mlp_ratio": 4.0, "num_heads": 24, "depth": 20, "depth_single_blocks": 40, "theta": 256,
                  "qkv_bias": True, "guidance_embed": True, "byt5": False, "meanflow": False, "meanflow_sum": False,
                  "use_cond_type_embedding": False, "vision_in_dim": None}),
    }),
    "LTX-Video": (("ltx-video", "ltxv", "ltx_video"), "LTXVideoTransformer3DModel", "LTXVideo", "LTXV", {
        "2B": ({}, {"image_model": "ltxv", "num_layers": 28, "attention_head_dim": 64, "cross_attention_dim": 2048}),
        "13B": ({"num_layers": 48, "attention_head_dim": 128, "cross_attention_dim": 4096},
                {"image_model": "ltxv", "num_layers": 48, "attention_head_dim": 128, "cross_attention_dim": 4096}),
    }),
    "LTX-2": (("ltx-2", "ltx2", "ltx_2"), "LTX2VideoTransformer3DModel", "LTX2", "LTXAV", {
        "": ({}, {"image_model": "ltxav", "num_layers": 48, "attention_head_dim": 128, "cross_attention_dim": 4096}),
    }),
    "Z-Image": (("z-image", "z_image", "zimage"), "ZImageTransformer2DModel", "ZImage", "ZImage", {
        "": ({}, lumina(3840, cap_feat_dim=2560, n_layers=30, n_heads=30, n_kv_heads=30, axes_dims=[32, 48, 48],
                        axes_lens=[1536, 512, 512], rope_theta=256.0, ffn_dim_multiplier=8.0 / 3.0,
                        z_image_modulation=True, time_scale=1000.0, pad_tokens_multiple=32)),
    }),
    "Lumina2": (("lumina-image-2", "lumina2", "lumina-2"), "Lumina2Transformer2DModel", "Lumina2", "Lumina2", {
        "": ({"cap_feat_dim": 2304}, lumina(2304, cap_feat_dim=2304, n_layers=26, n_heads=24, n_kv_heads=8,
                                            axes_dims=[32] * 3, axes_lens=[300, 512, 512], rope_theta=10000.0,
                                            ffn_dim_multiplier=4.0)),
    }),
    "FLUX.2": (("flux.2", "flux2", "flux-2"), "Flux2Transformer2DModel", "Flux2", "Flux2", {
        "dev": flux2(8, 48, 48, 15360), "klein 4B": flux2(5, 20, 24, 7680, guidance=False),
        "klein 9B": flux2(8, 24, 32, 12288, guidance=False),
    }),
    "Kandinsky 5": (("kandinsky-5", "kandinsky5", "kandinsky 5"), "Kandinsky5Transformer3DModel", "Kandinsky",
                    "Kandinsky5", {
        "Lite video": kandinsky(1792, 7168, 32, 2, 512, (16, 24, 24)),
        "Lite image": kandinsky(2560, 10240, 50, 2, 512, (32, 48, 48)),
        "Pro video": kandinsky(4096, 16384, 60, 4, 1024, (32, 48, 48)),
    }),
    "Chroma": (("chroma",), "ChromaTransformer2DModel", "Flux", "Chroma", {
        "": ({}, {"image_model": "chroma", "axes_dim": [16, 56, 56], "num_heads": 24, "mlp_ratio": 4.0, "theta": 10000,
                  "out_channels": 64, "qkv_bias": True, "in_channels": 64, "hidden_size": 3072, "context_in_dim": 4096,
                  "patch_size": 2, "depth": 19, "depth_single_blocks": 38, "out_dim": 3072, "hidden_dim": 5120,
                  "n_layers": 5, "vec_in_dim": None, "in_dim": 64, "txt_ids_dims": []}),
    }),
}  # fmt: skip


# ComfyUI renames the checkpoint of HunyuanVideo when it reads it, and the converter of diffusers takes its old names.
BEFORE = {
    "_mod.lin.": "_mod.linear.", "_attn.qkv.": "_attn_qkv.", "_attn.proj.": "_attn_proj.", "mlp.0.": "mlp.fc1.",
    "mlp.2.": "mlp.fc2.", ".modulation.lin.": ".modulation.linear.", "time_in.in_layer": "time_in.mlp.0",
    "time_in.out_layer": "time_in.mlp.2", "guidance_in.in_layer": "guidance_in.mlp.0",
    "guidance_in.out_layer": "guidance_in.mlp.2", "t_embedder.in_layer": "t_embedder.mlp.0",
    "t_embedder.out_layer": "t_embedder.mlp.2", "c_embedder.in_layer": "c_embedder.linear_1",
    "c_embedder.out_layer": "c_embedder.linear_2",
}  # fmt: skip


def weights(model):
    """Name → shape of every linear layer, convolution and embedding of a model."""
    return {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if getattr(module, "weight", None) is not None and module.weight.ndim > 1
    }


def in_checkpoint(key, config):
    """The key of the published checkpoint that ComfyUI reads as ``key``."""
    old = key
    for now, before in BEFORE.items():
        old = old.replace(now, before)
    # Published checkpoints call the weight of a norm its scale.
    old = re.sub(r"(norms?(\.\d+)?)\.weight$", r"\1.scale", old)
    return old if next(iter(config.process_unet_state_dict({old: 0}))) == key else key


def follow(native, keys, convert):
    """diffusers' name → (native name, rows), by following numbered rows through a converter of checkpoints."""
    names, tensors = list(native), {}
    for key, (old, shape) in keys.items():
        rows, name = torch.arange(shape[0] if shape else 1, dtype=torch.float64), key.removesuffix(".weight")
        if name in native and key.endswith(".weight"):
            rows = (rows + names.index(name) * 2.0**20).reshape(-1, *[1] * (len(shape) - 1))
        tensors[old] = rows
    found = {}
    for key, tensor in convert(tensors).items():
        if key.endswith(".weight") and tensor.ndim > 1:
            rows = tensor.reshape(len(tensor), -1)[:, 0]
            name = names[int(rows[0]) // 2**20]
            found[key.removesuffix(".weight")] = name, (rows % 2**20).long()
    return found


def indexed(name):
    """A name with # for the number of its block, and that number."""
    number = re.search(r"(?<=\.)\d+(?=\.)", name)
    return (name[: number.start()] + "#" + name[number.end() :], int(number[0])) if number else (name, 0)


def spelled(scheme, layer):
    """The name of a layer in a naming scheme."""
    flat = scheme.endswith("_")
    prefix, kind = scheme.rstrip("_")[:-1], scheme.rstrip("_")[-1]
    name = layer["N" if kind == "N" else "D"]
    return prefix + (name.replace(".", "_") if flat else name)


def layers_of(transformer, comfy_model):
    """Every layer of diffusers with its native name, its rows there, and whether the halves of the rows are swapped."""
    mine, native = weights(transformer), weights(comfy_model.diffusion_model)
    entry = single_file_model.SINGLE_FILE_LOADABLE_CLASSES.get(type(transformer).__name__)
    if entry:
        state = comfy_model.diffusion_model.state_dict()
        keys = {key: (in_checkpoint(key, comfy_model.model_config), tuple(each.shape)) for key, each in state.items()}
        found = follow(native, keys, entry["checkpoint_mapping_fn"])
    else:
        found = {name: (name, torch.arange(shape[0])) for name, shape in native.items()}
    layers = []
    for name, shape in mine.items():
        if name not in found:
            print("   no native name:", name)
            continue
        original, rows = found[name]
        first = int(rows.min())
        swapped = int(rows[0]) != first
        expected = torch.arange(first, first + shape[0])
        assert torch.equal(rows, expected.roll(shape[0] // 2) if swapped else expected), name
        (mine_pattern, number), (native_pattern, native_number) = indexed(name), indexed(original)
        # A number of a block is in both names.
        if "#" not in mine_pattern or "#" not in native_pattern:
            mine_pattern, native_pattern, number, native_number = name, original, 0, 0
        assert number == native_number, (name, original)
        layer = {
            "patterns": (mine_pattern, native_pattern),
            "number": number,
            "D": name,
            "N": original,
            "shape": shape,
            "first": first,
            "swapped": swapped,
        }
        layers.append(layer | {"whole": shape[0] == native[original][0], "native rows": native[original][0]})
    return sorted(layers, key=lambda layer: layer["first"])


def factors(names, leaf):
    """The tensors of modules with so many rows: A holds the number of the module, and B that of each row."""
    up, down = ("lora_B", "lora_A") if leaf == "lora_A" else ("lora_up", "lora_down")
    tensors = {}
    for number, (name, rows) in enumerate(names.items()):
        tensors[f"{name}.{down}.weight"] = torch.full((1, 1), float(number))
        tensors[f"{name}.{up}.weight"] = torch.arange(rows, dtype=torch.float32).reshape(-1, 1)
        if leaf != "lora_A":
            tensors[f"{name}.alpha"] = torch.tensor(1.0)
    return tensors


def mapped_by_comfyui(layers, key_map, scheme):
    """The layers whose names in a scheme ComfyUI maps to their weights."""
    for layer in layers:
        found = key_map.get(spelled(scheme, layer))
        key, part = (found, None) if isinstance(found, str) or found is None else found[:2]
        split = "D" in scheme[-2:] and not layer["whole"]
        right = tuple(part or ()) == ((0, layer["first"], layer["shape"][0]) if split else ())
        swapped = isinstance(found, tuple) and len(found) == 3
        if (
            key == f"diffusion_model.{layer['N']}.weight"
            and right
            and swapped == (layer["swapped"] and "D" in scheme[-2:])
        ):
            yield layer["D"]


def mapped_by_diffusers(layers, loader, scheme, leaf):
    """The layers whose names in a scheme diffusers maps to its own, with the right rows; none if it refuses."""
    rows = "shape" if "D" in scheme[-2:] else "native rows"
    names = {spelled(scheme, layer): layer[rows][0] if rows == "shape" else layer[rows] for layer in layers}
    numbers = {name: number for number, name in enumerate(names)}
    try:
        state = loader.lora_state_dict(factors(names, leaf))
    except Exception as error:  # noqa: BLE001 - its converters raise errors of every kind
        # Some converters name what they do not know.
        left = [layer for layer in layers if layer["N"] not in str(error) and spelled(scheme, layer) not in str(error)]
        return mapped_by_diffusers(left, loader, scheme, leaf) if 0 < len(left) < len(layers) else []
    state = state[0] if isinstance(state, tuple) else state
    loaded = []
    for layer in layers:
        halves = [state.get(f"transformer.{layer['D']}.lora_{half}.weight") for half in "AB"]
        if any(half is None for half in halves):
            continue
        first = layer["first"] if rows == "native rows" else 0
        expected = torch.arange(first, first + layer["shape"][0], dtype=torch.float32)
        if layer["swapped"] and rows == "native rows":
            expected = expected.roll(len(expected) // 2)
        same = len(halves[1]) == len(expected) and torch.equal(halves[1][:, 0], expected)
        if same and float(halves[0][0, 0]) == numbers[spelled(scheme, layer)]:
            loaded.append(layer["D"])
    return loaded


def compact(sizes):
    """The rows of the table of a family: patterns of names, and for each size their numbers of blocks and shapes."""
    rows = {}
    for size, layers in sizes.items():
        for layer in layers:
            (mine, native), number = layer["patterns"], layer["number"]
            runs = rows.setdefault((mine, native, layer["swapped"]), {}).setdefault(size, [])
            if runs and runs[-1][1] == number and runs[-1][2] == layer["shape"]:
                runs[-1][1] += 1
            else:
                runs.append([number, number + 1, layer["shape"]])
    return rows


def main(path):
    comfy = comfyui(path)
    table = {}
    for family, (words, model, loader, comfy_class, sizes) in FAMILIES.items():
        loader = getattr(lora_pipeline, f"{loader}LoraLoaderMixin")
        layers, mapped = {}, {"comfyui": defaultdict(list), "diffusers": defaultdict(list)}
        for size, (config, comfy_config) in sizes.items():
            with torch.device("meta"):
                transformer = getattr(diffusers, model)(**config)
            comfy_model = getattr(comfy.supported_models, comfy_class)(comfy_config).get_model({}, device="meta")
            layers[size] = layers_of(transformer, comfy_model)
            key_map = comfy.lora.model_lora_keys_unet(comfy_model, {})
            # The converters of diffusers treat all blocks alike, so a file with the first two is enough.
            first = [layer for layer in layers[size] if layer["number"] < 2]
            for scheme in SCHEMES:
                names = mapped_by_comfyui(layers[size], key_map, scheme)
                mapped["comfyui"][scheme].append((layers[size], set(names)))
                for leaf in ("lora_A", "lora_down"):
                    names, together = try_diffusers(first, loader, scheme, leaf)
                    mapped["diffusers"][f"{scheme} {leaf}{' together' * together}"].append((first, set(names)))
        rows = compact(layers)
        clients = {client: missing(schemes, rows) for client, schemes in mapped.items()}
        table[family] = {
            "words": words,
            "layers": [
                [
                    mine,
                    native,
                    int(swapped),
                    {size: [[a, b, *shape] for a, b, shape in runs] for size, runs in of.items()},
                ]
                for (mine, native, swapped), of in rows.items()
            ],
            "clients": clients,
        }
        print(
            family, len(rows), {client: {s: len(m) for s, m in schemes.items()} for client, schemes in clients.items()}
        )
    versions = {
        "diffusers": version("diffusers"),
        "comfyui": Path(path, "comfyui_version.py").read_text().split('"')[-2],
    }
    text = ",\n".join(
        f"{json.dumps(family)}: {json.dumps(entry, separators=(',', ':'))}" for family, entry in table.items()
    )
    TARGET.write_text(f'{{"versions": {json.dumps(versions)},\n"families": {{\n{text}\n}}}}\n')


def missing(schemes, rows):
    """Scheme → the numbers of the rows of which some layer is not mapped, for schemes of which something is mapped."""
    lost = {}
    for scheme, trials in schemes.items():
        bad = {layer["patterns"][0] for layers, names in trials for layer in layers if layer["D"] not in names}
        good = {layer["patterns"][0] for layers, _ in trials for layer in layers} - bad
        if good:
            lost[scheme] = [number for number, row in enumerate(rows) if row[0] not in good]
    return lost


def try_diffusers(layers, loader, scheme, leaf):
    """The layers that diffusers maps, and whether it takes them only together.

    If it refuses a file with all layers, the kinds of layers that it takes alone are tried, and then all of a stack.
    """
    kinds, stacks = defaultdict(list), defaultdict(list)
    for layer in layers:
        kinds[layer["patterns"][1]].append(layer)
        stacks[layer["N"].partition(".")[0]].append(layer)
    good = [kind for kind, members in kinds.items() if mapped_by_diffusers(members, loader, scheme, leaf)]
    loaded = mapped_by_diffusers(layers, loader, scheme, leaf)
    if not loaded and good:
        loaded = mapped_by_diffusers([layer for kind in good for layer in kinds[kind]], loader, scheme, leaf)
    tried = [loaded] if loaded else [mapped_by_diffusers(each, loader, scheme, leaf) for each in stacks.values()]
    return max(tried, key=len), not good


if __name__ == "__main__":
    main(sys.argv[1])
