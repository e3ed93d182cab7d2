"""Tiny models of many architectures, as transformers saves them, with adapters for them, as PEFT saves them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TEXT = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
PLAIN = {name: value for name, value in TEXT.items() if name != "num_key_value_heads"}
HEADS = {**TEXT, "head_dim": 4}
VISION = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
EXPERTS = ("gate_up_proj", "down_proj")


@dataclass(frozen=True)
class Architecture:
    """A model to make, and what of it to adapt.

    Attributes
    ----------
    name : str
    model, config : str
        Classes of transformers.
    fields : dict
        Of the configuration.
    experts : tuple of str
        ``target_parameters``.
    moved : bool
        Whether some adapted module is stored under another name, or in other pieces, than it has in memory.
    """

    name: str
    model: str
    config: str
    fields: dict[str, Any] = field(default_factory=dict)
    experts: tuple[str, ...] = ()
    moved: bool = False

    def __str__(self) -> str:
        return self.name

    def save(self, folder: Path, **changes: Any) -> Any:
        """``base``, ``adapter`` and what PEFT merges, ``merged``, in ``folder``; gives the merged model back."""
        import peft
        import torch

        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = self.made()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.copy_(torch.randn_like(parameter) * 0.3)
            model.save_pretrained(folder / "base")
            said = {"target_modules": "all-linear", "target_parameters": list(self.experts) or None}
            adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=3, **{**said, **changes}))
            with torch.no_grad():
                for name, parameter in adapted.named_parameters():
                    if ".lora_" in name or parameter.requires_grad:
                        parameter.add_(torch.randn_like(parameter) * 0.3)
        adapted.create_or_update_model_card = lambda folder: None  # which takes longer than to save the factors
        adapted.save_pretrained(folder / "adapter")
        merged = adapted.merge_and_unload()
        merged.save_pretrained(folder / "merged")
        return merged

    def made(self) -> Any:
        """The model, as its class begins."""
        import transformers

        fields = {name: self._nested(value) for name, value in self.fields.items()}
        return getattr(transformers, self.model)(getattr(transformers, self.config)(**fields)).eval()

    def _nested(self, value: Any) -> Any:
        import transformers

        if isinstance(value, tuple):
            config, fields = value
            return getattr(transformers, config)(**fields)
        return value


def _moe(name: str, stem: str, *, moved: bool = True, **fields: Any) -> Architecture:
    return Architecture(name, f"{stem}ForCausalLM", f"{stem}Config", fields, EXPERTS, moved)


MIXTURES = (
    _moe("mixtral", "Mixtral", **TEXT, num_local_experts=4),
    _moe("qwen2-moe", "Qwen2Moe", **TEXT, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12,
         shared_expert_intermediate_size=20),
    _moe("qwen3-moe", "Qwen3Moe", **HEADS, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12),
    _moe("gpt-oss", "GptOss", moved=False, **HEADS, num_local_experts=4, num_experts_per_tok=2),
    _moe("gpt-oss-square", "GptOss", moved=False, **{**HEADS, "intermediate_size": 16}, num_local_experts=4,
         num_experts_per_tok=2),
    _moe("deepseek-v3", "DeepseekV3", **{**TEXT, "num_key_value_heads": 4}, n_routed_experts=4, n_group=2,
         topk_group=1, num_experts_per_tok=2, moe_intermediate_size=12, first_k_dense_replace=1, q_lora_rank=8,
         kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4),
    _moe("olmoe", "Olmoe", **TEXT, num_experts=4, num_experts_per_tok=2),
    _moe("olmoe-square", "Olmoe", **{**TEXT, "intermediate_size": 8}, num_experts=4, num_experts_per_tok=2),
    _moe("jamba", "Jamba", **TEXT, num_experts=4, num_experts_per_tok=2, attn_layer_period=2, attn_layer_offset=1,
         mamba_dt_rank=4),
    _moe("phimoe", "Phimoe", **TEXT, num_local_experts=4, num_experts_per_tok=2),
    _moe("granitemoe", "GraniteMoe", **TEXT, num_local_experts=4, num_experts_per_tok=2),
    Architecture("llama4", "Llama4ForCausalLM", "Llama4TextConfig",
                 {**HEADS, "intermediate_size_mlp": 24, "num_local_experts": 4, "num_experts_per_tok": 1,
                  "interleave_moe_layer_step": 1}, EXPERTS),
)  # fmt: skip
DENSE = (
    Architecture("llama", "LlamaForCausalLM", "LlamaConfig", TEXT),
    Architecture("qwen2", "Qwen2ForCausalLM", "Qwen2Config", TEXT),
    Architecture("qwen3", "Qwen3ForCausalLM", "Qwen3Config", HEADS),
    Architecture("gemma2", "Gemma2ForCausalLM", "Gemma2Config", HEADS),
    Architecture("gemma3", "Gemma3ForCausalLM", "Gemma3TextConfig", HEADS),
    Architecture("phi3", "Phi3ForCausalLM", "Phi3Config", TEXT),
    Architecture("gpt2", "GPT2LMHeadModel", "GPT2Config",
                 {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32, "bos_token_id": 1,
                  "eos_token_id": 2}),
    Architecture("gpt-neox", "GPTNeoXForCausalLM", "GPTNeoXConfig", PLAIN),
    Architecture("falcon", "FalconForCausalLM", "FalconConfig", PLAIN),
    Architecture("bloom", "BloomForCausalLM", "BloomConfig",
                 {"vocab_size": 40, "hidden_size": 16, "n_layer": 2, "n_head": 4}),
    Architecture("t5", "T5ForConditionalGeneration", "T5Config",
                 {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4,
                  "decoder_start_token_id": 0}),
    Architecture("bert", "BertForSequenceClassification", "BertConfig", PLAIN),
    Architecture("roberta", "RobertaForSequenceClassification", "RobertaConfig", PLAIN),
    Architecture("distilbert", "DistilBertForSequenceClassification", "DistilBertConfig",
                 {"vocab_size": 40, "dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24}),
    Architecture("whisper", "WhisperForConditionalGeneration", "WhisperConfig",
                 {"vocab_size": 40, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2,
                  "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 24,
                  "decoder_ffn_dim": 24, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16,
                  "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}),
)  # fmt: skip
IMAGES = (
    Architecture("vit", "ViTForImageClassification", "ViTConfig", VISION, moved=True),
    Architecture("vit-bare", "ViTModel", "ViTConfig", VISION, moved=True),
    Architecture("dinov2-swiglu", "Dinov2Model", "Dinov2Config", {**VISION, "use_swiglu_ffn": True}, moved=True),
    Architecture("clip", "CLIPModel", "CLIPConfig",
                 {"text_config": {**PLAIN}, "vision_config": VISION, "projection_dim": 8}),
    Architecture("clip-text", "CLIPTextModel", "CLIPTextConfig", PLAIN),
    Architecture("clip-vision", "CLIPVisionModel", "CLIPVisionConfig", VISION),
    Architecture("llava", "LlavaForConditionalGeneration", "LlavaConfig",
                 {"text_config": ("LlamaConfig", TEXT), "vision_config": ("CLIPVisionConfig", VISION)}, moved=True),
    Architecture("gemma3-vision", "Gemma3ForConditionalGeneration", "Gemma3Config",
                 {"text_config": HEADS, "vision_config": VISION, "mm_tokens_per_image": 4}, moved=True),
    Architecture("paligemma", "PaliGemmaForConditionalGeneration", "PaliGemmaConfig",
                 {"text_config": ("GemmaConfig", HEADS), "vision_config": ("SiglipVisionConfig", VISION)}, moved=True),
    Architecture("mistral3", "Mistral3ForConditionalGeneration", "Mistral3Config",
                 {"text_config": ("MistralConfig", HEADS), "vision_config": ("PixtralVisionConfig", VISION)},
                 moved=True),
    Architecture("idefics3", "Idefics3ForConditionalGeneration", "Idefics3Config",
                 {"text_config": ("LlamaConfig", TEXT), "vision_config": VISION}),
    Architecture("internvl", "InternVLForConditionalGeneration", "InternVLConfig",
                 {"text_config": ("Qwen2Config", TEXT), "vision_config": {**VISION, "image_size": [8, 8],
                                                                          "patch_size": [4, 4]}}, moved=True),
    Architecture("qwen2-vl", "Qwen2VLForConditionalGeneration", "Qwen2VLConfig",
                 {"text_config": {**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 0],
                                                              "rope_theta": 1e4}},
                  "vision_config": {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 4, "mlp_ratio": 2,
                                    "patch_size": 4}}, moved=True),
)  # fmt: skip
ARCHITECTURES = (*MIXTURES, *DENSE, *IMAGES)
