"""Models and texts that a verb is given as objects: read as their files are, and left as they were."""

from pathlib import Path
from typing import Any

import pytest

from loralens import FormatError, MismatchError, OptionError
from loralens.verbs.models.texts import InputText, read_data, read_texts
from tests import models


def test_a_list_of_texts_is_read_as_its_file_is(tmp_path: Path) -> None:
    file = models.jsonl(tmp_path / "d.jsonl", label=["x", "y", 7, "x"])
    pairs = list(zip(models.TEXTS, ("x", "y", 7, "x"), strict=True))
    mappings = [{"text": text, "label": label} for text, label in pairs]
    expected = read_texts(file, labelled=True)
    for source in (pairs, mappings, iter(pairs), expected):
        assert read_texts(source, labelled=True) == expected
    assert read_texts(list(models.TEXTS)) == [InputText(text, None, i) for i, text in enumerate(models.TEXTS, start=1)]
    assert len(read_texts(pairs, limit=2)) == 2
    from_list, from_file = (read_data(source, labelled=True)[0] for source in (pairs, file))
    assert (from_list.digest, from_list.labels) == (from_file.digest, from_file.labels)
    assert (from_list.name, from_file.name) == ("texts", "d.jsonl")


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        ([], FormatError, "texts: holds no texts"),
        ([("a", "x"), (" ", "x")], FormatError, 'texts: text 2: "text" is empty'),
        ([("a", "x"), (3, "x")], FormatError, 'texts: text 2: "text" is not a string'),
        ([("a", "x"), "b"], FormatError, 'texts: text 2: has no "label"'),
        ([("a", "x"), ("b", 1.5)], FormatError, 'texts: text 2: "label" is 1.5'),
        ([{"label": "x"}], FormatError, 'texts: text 1: has no "text"'),
        ([("a", "x"), ("b", "x")], OptionError, "texts: all texts have the label 'x'"),
    ],
)
def test_what_is_wrong_with_a_list_is_said_with_its_place(texts: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        read_data(texts, labelled=True)
    assert str(raised.value).startswith(message)


@pytest.fixture(scope="module")
def llama(quiet_torch: None) -> tuple[Any, Any]:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    return models.llama(), models.tokenizer()


def test_a_model_and_its_tokenizer_are_left_as_they_were(llama: tuple[Any, Any]) -> None:
    import torch
    import transformers

    from loralens.verbs.models.models import load_model, restore_settings

    model, tokenizer = llama
    tokenizer.padding_side = "left"
    model.train()
    model.model.layers[0].eval()
    before = {name: layer.training for name, layer in model.named_modules()}
    transformers.logging.set_verbosity_warning()
    threads = torch.get_num_threads()
    try:
        with restore_settings(llama):
            loaded = load_model(llama, device="auto", dtype="f32", threads=threads + 1)
            loaded.model.config.output_hidden_states = True
            assert loaded.model is model
            assert (loaded.head, loaded.tokenizer.padding_side, model.training) == ("causal", "right", False)
            assert loaded.model.config.use_cache is False
        assert {name: layer.training for name, layer in model.named_modules()} == before
        assert (tokenizer.padding_side, torch.get_num_threads()) == ("left", threads)
        assert transformers.logging.get_verbosity() == transformers.logging.WARNING
        assert (model.config.use_cache, bool(model.config.output_hidden_states)) == (True, False)
    finally:
        model.eval()
        transformers.logging.set_verbosity_error()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"device": "cpu"},
            "device='cpu' cannot be applied to a model that has been loaded\n  fix: convert it before: model.to",
        ),
        ({"dtype": "bf16"}, "dtype='bf16' cannot be applied to a model that has been loaded"),
        ({"dtype": "float32"}, "dtype 'float32' is not possible\n  fix: choose one of f32, bf16, f16"),
    ],
)
def test_a_loaded_model_is_neither_moved_nor_cast(
    llama: tuple[Any, Any], options: dict[str, str], message: str
) -> None:
    from loralens.verbs.models.models import load_model

    with pytest.raises(OptionError) as raised:
        load_model(llama, threads=None, **{"device": "auto", "dtype": "f32", **options})
    assert message in str(raised.value)


def test_what_is_no_model_or_has_another_head_is_refused(llama: tuple[Any, Any]) -> None:
    from loralens.verbs.models.models import load_headed, load_model

    how: dict[str, Any] = {"device": "auto", "dtype": "f32", "threads": None}
    model, tokenizer = llama
    for pair in ((model,), (tokenizer, model), (model, "tokenizer"), (object(), tokenizer)):
        with pytest.raises(OptionError, match=r"give model=\(model, tokenizer\)"):
            load_model(pair, **how)  # type: ignore[arg-type]
    with pytest.raises(MismatchError, match="not have the head for this task"):
        load_headed(llama, "AutoModelForMaskedLM", **how)
    classifier = models.bert("BertForSequenceClassification", num_labels=2, id2label={0: "y", 1: "x"}), tokenizer
    assert load_headed(classifier, "AutoModelForSequenceClassification", labels=["y", "x"], **how).head == "classifier"
    with pytest.raises(MismatchError, match=r"its labels are y, x, but those of the texts are x, y"):
        load_headed(classifier, "AutoModelForSequenceClassification", labels=["x", "y"], **how)
