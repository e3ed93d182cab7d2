"""Instruction data: what of a dialogue is learned, beside literal renderings and beside TRL."""

import json
from pathlib import Path
from typing import Any

import pytest

from loralens import FormatError, OptionError
from loralens.training import task_named
from loralens.training.tasks import IGNORED
from loralens.verbs.models.encoding import encode_text, encode_texts
from tests import models

torch = pytest.importorskip("torch")

# As SmolLM2 and Qwen write dialogues, with words that the tokenizer of the tests knows.
PLAIN = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} [END] {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
TAGGED = (
    "{% for m in messages %}{{ m['role'] }} : {% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }} [END] {% endgeneration %}"
    "{% else %}{{ m['content'] }} [END] {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
# As templates of models that think: the answers after the last question have a thought, and the others have not.
LAST = (
    "{% set last = namespace(user=0) %}{% for m in messages if m['role'] == 'user' %}"
    "{% set last.user = messages.index(m) %}{% endfor %}"
)
THINKING = LAST + (
    "{% for m in messages %}{{ m['role'] }} : "
    "{% if m['role'] == 'assistant' and loop.index0 > last.user %}under the tree {% endif %}"
    "{{ m['content'] }} [END] {% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
)
ENDING = PLAIN.replace("[END] ", "{{ '[END]' if loop.last and m['role'] == 'assistant' else '[PAD]' }} ")
TURNS = [
    {"role": "system", "content": "the mat"},
    {"role": "user", "content": "the cat sat"},
    {"role": "assistant", "content": "it ran under the tree"},
    {"role": "user", "content": "and then"},
    {"role": "assistant", "content": "it slept"},
]
PAIR = {"prompt": "the cat sat", "completion": " on the mat"}
CASES: dict[str, dict[str, Any]] = {
    "messages": {"messages": TURNS},
    "one answer": {"messages": TURNS[1:3]},
    "begins with an answer": {"messages": TURNS[2:]},
    "completion": PAIR,
    "completion with an end": {"prompt": "a dog", "completion": " ran [END]"},
    "completion of messages": {"prompt": TURNS[:2], "completion": TURNS[2:3]},
}


def tokenizer(template: str | None = PLAIN) -> Any:
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    words = ("[PAD]", "[END]", "[UNK]", *models.WORDS, "system", "user", "assistant", ":")
    made = Tokenizer(kinds.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    found = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", eos_token="[END]", unk_token="[UNK]")
    found.chat_template = template
    return found


def words(found: Any, tokens: list[int], learned: list[bool]) -> str:
    """What is learned in brackets."""
    pieces = found.convert_ids_to_tokens(tokens)
    return " ".join(f"<{word}>" if mine else word for word, mine in zip(pieces, learned, strict=True))


@pytest.mark.parametrize("template", [PLAIN, TAGGED])
def test_every_answer_is_learned_with_its_end(template: str) -> None:
    made = tokenizer(template)
    assert words(made, *encode_text(made, {"messages": TURNS})) == (
        "system : the mat [END] user : the cat sat [END] assistant : <it> <ran> <under> <the> <tree> <[END]> "
        "user : and then [END] assistant : <it> <slept> <[END]>"
    )


@pytest.mark.parametrize("template", [THINKING, ENDING])
def test_answers_that_look_otherwise_where_more_follows_are_refused(template: str) -> None:
    made = tokenizer(template)
    with pytest.raises(FormatError, match="so that the answer is not found"):
        encode_text(made, {"messages": TURNS[1:]})
    assert all(encode_text(made, {"messages": TURNS[1:]}, mask_prompt=False)[1])


@pytest.mark.parametrize("template", [PLAIN, TAGGED])
def test_a_message_with_the_weight_0_is_not_learned(template: str) -> None:
    turns = [TURNS[1], {**TURNS[2], "weight": 0}, TURNS[3], {**TURNS[4], "weight": 1}]
    made = tokenizer(template)
    assert words(made, *encode_text(made, {"messages": turns})) == (
        "user : the cat sat [END] assistant : it ran under the tree [END] user : and then [END] assistant : "
        "<it> <slept> <[END]>"
    )
    turns[1]["weight"] = 0.5
    with pytest.raises(FormatError, match="weights of its messages"):
        encode_text(made, {"messages": turns})


def test_tools_reach_the_template() -> None:
    made = tokenizer("{% if tools %}{{ tools[0]['name'] }} {% endif %}" + PLAIN)
    tokens, learned = encode_text(made, {"messages": TURNS[1:3], "tools": [{"name": "mat"}]})
    assert words(made, tokens, learned).startswith("mat user : the cat sat")


def test_a_completion_is_learned_and_ends() -> None:
    made = tokenizer(None)
    found = encode_text(made, {"prompt": "the cat sat ", "completion": "on the mat [END]"})
    assert words(made, *found) == "the cat sat <on> <the> <mat> <[END]>"
    assert all(encode_text(made, PAIR, mask_prompt=False)[1])


def test_examples_hold_labels_and_texts_are_learned_whole() -> None:
    made = tokenizer()
    some = encode_texts(made, [{"messages": TURNS[1:3]}, "the cat ran"], length=9)
    batch = task_named("causal-lm").draw(some, [0, 1])
    assert batch["input_ids"].shape == (2, 9)  # cut
    assert (batch["labels"] != IGNORED).sum(1).tolist() == [1, 2]  # the first token of a text has none before it
    assert encode_texts(made, ["the cat ran"], length=8).learned is None


@pytest.mark.parametrize(
    ("template", "dialogue", "error", "message"),
    [
        (None, {"messages": TURNS}, OptionError, "the tokenizer has no chat template"),
        ("{{ raise_exception('roles must alternate') }}", {"messages": TURNS}, FormatError, "roles must alternate"),
    ],
)
def test_what_a_template_cannot_render_is_said(template: Any, dialogue: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message) as refused:
        encode_texts(tokenizer(template), ["the cat", dialogue], length=9)
    assert "text 2" in str(refused.value)


@pytest.mark.live
@pytest.mark.filterwarnings("ignore")  # TRL and transformers warn of each other
@pytest.mark.parametrize("name", CASES)
def test_the_masks_are_those_of_trl(name: str, tmp_path: Path) -> None:
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    dialogue = CASES[name]
    config = trl.SFTConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, max_length=64, packing=False,
                           assistant_only_loss="messages" in dialogue,
                           completion_only_loss="prompt" in dialogue or None)  # fmt: skip
    model = models.llama()
    model.resize_token_embeddings(32)
    trainer = trl.SFTTrainer(model=model, args=config, train_dataset=datasets.Dataset.from_list([dialogue] * 2),
                             processing_class=tokenizer(TAGGED))  # fmt: skip
    theirs = next(iter(trainer.get_train_dataloader()))
    found = encode_text(tokenizer(PLAIN), json.loads(json.dumps(dialogue)))
    size = len(found[0])
    assert theirs["input_ids"][0][:size].tolist() == found[0]
    wanted = [token if learned else IGNORED for token, learned in zip(*found, strict=True)]
    assert theirs["labels"][0][:size].tolist() == wanted
