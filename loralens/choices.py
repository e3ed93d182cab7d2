"""The values that options accept. Each option has one type, which Python's signatures and the command line share.

A command declares its options before it imports anything that computes, so this module imports only ``typing``. The
help of a command therefore does not load NumPy.
"""

from typing import Literal, get_args

FloatType = Literal["f32", "bf16", "f16"]
FLOAT_TYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}  # option → the name in NumPy and torch
BaseDtype = Literal["f32", "bf16", "f16", "nf4", "int8"]  # of the frozen weights of a model that is trained
CODES = ("nf4", "int8")  # those that bitsandbytes makes of the weights
ModelDtype = Literal["keep", "f32", "bf16", "f16"]
MergeBits = Literal["keep", "nf4", "q4_1", "q8_0"]  # the codes in which a merged model is stored
MergeDType = Literal["bf16", "f16", "f32", "fp8"]  # for which the doctor can predict a merge

TargetFormat = Literal["peft", "kohya", "diffusers", "comfyui", "mlx", "loralib", "gguf"]
# The dialects that have a writer. They are written out, as the table of dialects takes long to import; a test compares.
TARGET_FORMATS: tuple[str, ...] = get_args(TargetFormat)

# The programs whose rules are known (analysis/clients.py); a test compares.
Consumer = Literal[
    "vllm",
    "sglang",
    "llama.cpp",
    "ollama",
    "tensorrt-llm",
    "lorax",
    "mlx",
    "comfyui",
    "sd-scripts",
    "diffusers",
    "peft",
]
# What ``convert`` writes: a dialect, or what a server takes.
Server = Literal["vllm", "sglang", "ollama", "tensorrt-llm", "lorax"]

Level = Literal["error", "warning", "note"]  # of findings, most serious first

# ``name``, and those properties of `Spectrum` that somebody wants to sort by; a sort looks them up by name.
Sort = Literal[
    "name",
    "rank",
    "frobenius",
    "spectral",
    "nuclear",
    "numerical_rank",
    "stable_rank",
    "effective_rank",
    "effective_rank_energy",
    "participation_ratio",
]
Of = Literal["update", "A", "B"]  # what is compared
Side = Literal["in", "out"]
Space = Literal["full", "knots", "core"]  # where an elementwise method of combining works

RoundingMode = Literal["nearest", "stochastic", "feedback"]
# Error feedback cannot be predicted, since its effect on one weight depends on the weights before it.
PredictedRounding = Literal["nearest", "stochastic"]
Noise = Literal["rounding", "median"]

Backend = Literal["core", "trl"]  # what computes the steps of a training run
TaskName = Literal["classification", "causal-lm"]
TrainingTask = Literal["classification", "causal-lm", "dpo"]
# The names of combinations of the axes below (training/course.py); a test compares.
MethodName = Literal["lora", "rslora", "lora+", "dora", "pissa", "olora", "lora-ga", "frozen-a"]
ScaleRule = Literal["lora", "rslora"]
StartName = Literal["kaiming", "gaussian", "pissa", "olora", "lora-ga"]
Schedule = Literal["constant", "linear", "cosine"]
Optimiser = Literal["adamw", "sgd", "muon"]


# The names that PEFT and TRL have for options of ``train``.
TRAINING_NAMES = {
    "adam_beta1": "beta1",
    "adam_beta2": "beta2",
    "adam_epsilon": "epsilon",
    "eval_steps": "evaluate_every",
    "exclude_modules": "exclude",
    "gradient_checkpointing": "checkpointing",
    "init_lora_weights": "start",
    "learning_rate": "lr",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lr_scheduler_type": "schedule",
    "max_grad_norm": "clip",
    "max_length": "length",
    "max_steps": "steps",
    "model_name_or_path": "model",
    "modules_to_save": "heads",
    "num_train_epochs": "epochs",
    "optim": "optimiser",
    "output_dir": "output",
    "packing": "pack",
    "r": "rank",
    "save_steps": "save_every",
    "target_modules": "targets",
    "use_dora": "magnitude",
    "warmup_ratio": "warmup",
}
