"""LoRA beside the alternatives, on a tiny encoder made offline: what is trained, what it costs, what is kept."""

import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests import models

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from rivals import costs, methods, training  # noqa: E402

from loralens.training import Course, Examples, fit  # noqa: E402

pytestmark = pytest.mark.slow

NAMES = [method.name for method in methods.METHODS]
OTHERS = [method.name for method in methods.METHODS if not method.targets]  # than LoRA
CLASSES = ("a", "b", "c")
D, M, BLOCKS = 16, 24, 2  # of `tests.models.bert`
HEAD = 3 * D + 3
# What is trained besides the head, by the sizes of the model.
COUNTS = {
    "full": None,
    "bitfit": BLOCKS * (4 * D + M + D + 2 * D) + D + D,
    "bottleneck": BLOCKS * 2 * (8 * D + 8 + D * 8 + D),
    "prefix": 16 * BLOCKS * 2 * D,
    "lora": BLOCKS * 2 * 8 * (D + D),
    "lora-all": BLOCKS * (4 * 8 * (D + D) + 2 * 8 * (D + M)) + 8 * (D + D),
}
# ... and by names.
PATTERNS = {
    "full": r"bert\..*",
    "bitfit": r"bert\..*\.bias",
    "bottleneck": r"bert\.encoder\.layer\.\d\.(attention\.)?output\.dense\.(down|up)\.(weight|bias)",
    "prefix": r"prompt_encoder\.default\.embedding\.weight",
    "lora": r"bert\.encoder\.layer\.\d\.attention\.self\.(query|value)\.[AB]",
    "lora-all": r"bert\..*\.(query|key|value|dense)\.[AB]",
}
HEADS = r"(base_model\.)?classifier\.(modules_to_save\.default\.)?(weight|bias)"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    with torch.random.fork_rng():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    made = models.bert("BertForSequenceClassification", num_labels=2)
    return str(models.folder(made, tmp_path_factory.mktemp("alternatives") / "encoder"))


@pytest.fixture
def base(folder: str) -> Any:
    return training.classifier(folder, CLASSES, seed=0, threads=1)


def examples(count: int = 24) -> Examples:
    """Texts of 3 to 8 words whose first says the label."""
    generator = torch.Generator().manual_seed(0)
    labels = [i % 3 for i in range(count)]
    words = [torch.randint(6, 17, (2 + i % 6,), generator=generator).tolist() for i in range(count)]
    return Examples([[3 + label, *own] for label, own in zip(labels, words, strict=True)], 0, labels)


def batches(size: int = 6) -> Any:
    return training.TASK.batches(examples(), lambda number: [(number * size + i) % 24 for i in range(size)])


def state(model: Any) -> dict[str, Any]:
    return {name: tensor.detach().clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


@pytest.mark.parametrize("name", NAMES)
def test_a_method_trains_what_it_says_and_nothing_else(name: str, base: Any) -> None:
    made = methods.method_named(name).prepare(base, 0)
    before = state(made)
    training.learn(made, batches(), Course(3, lr=1e-2))
    after = state(made)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    said = {key for key in before if re.fullmatch(f"{PATTERNS[name]}|{HEADS}", key)} & set(methods.trained(made))
    assert set(methods.trained(made)) == said
    assert changed <= said
    unmoved = {key for key in said - changed if not key.endswith("key.bias")}  # softmax does not see that one
    assert not unmoved
    assert any(re.fullmatch(HEADS, key) for key in changed)


@pytest.mark.parametrize("name", NAMES)
def test_trained_numbers_are_those_of_the_formula(name: str, base: Any) -> None:
    everything = sum(p.numel() for p in base.parameters())
    made = methods.method_named(name).prepare(base, 0)
    found = sum(p.numel() for p in methods.trained(made).values())
    body = COUNTS[name]
    assert found == (everything if body is None else body + HEAD)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "prefix"])
def test_a_model_begins_as_it_was(name: str, base: Any) -> None:
    inputs = training.TASK.draw(examples(), range(6))
    with torch.no_grad():
        before = training.TASK.predict(base, inputs)[0]
        after = training.TASK.predict(methods.method_named(name).prepare(base, 0).eval(), inputs)[0]
    assert float((before - after).abs().max()) <= (1e-4 if name == "bottleneck" else 1e-6)
    assert (name == "bottleneck") != torch.equal(before, after)  # the bottleneck's first numbers are small, but not 0


def test_the_plain_loop_is_the_course_of_fit(folder: str) -> None:
    row, course = methods.method_named("lora"), Course(6, lr=3e-3, schedule="linear", warmup=0.3, clip=0.05)
    ours = training.classifier(folder, CLASSES, seed=0, threads=1)
    fitted = fit(ours, batches(), course=course, loss=training.TASK.loss, **row.pair(0))
    by_hand = row.prepare(training.classifier(folder, CLASSES, seed=0, threads=1), 0)
    losses = training.learn(by_hand, batches(), course)
    assert losses == pytest.approx(list(fitted.losses), rel=1e-5)
    found, expected = methods.trained(by_hand), methods.trained(ours)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-4)  # of steps of 3e-3


@pytest.mark.parametrize("name", ["lora", "lora-all"])
def test_a_merged_adapter_computes_what_the_unmerged_does_by_the_graph_of_the_base(name: str, folder: str) -> None:
    row = methods.method_named(name)
    forms, plain = costs.forms_of(row, model=folder, threads=1), costs.fresh(folder, 1)
    texts = costs.random_texts(plain, 3, 7)
    with torch.no_grad():
        merged, unmerged, before = (model(**texts).logits for model in (forms["merged"], forms["unmerged"], plain))
    torch.testing.assert_close(merged, unmerged, rtol=1e-5, atol=1e-6)
    assert float((merged - before).abs().max()) > 1e-5  # the adapter does something
    assert costs.operations(forms["merged"], texts) == costs.operations(plain, texts)
    assert len(costs.operations(forms["unmerged"], texts)) > len(costs.operations(plain, texts))
    assert [type(m) for m in forms["merged"].modules()] == [type(m) for m in plain.modules()]


@pytest.fixture
def tiny_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "texts", lambda corpus, part, length, model: examples(24 if part == "train" else 12))


@pytest.mark.parametrize("name", OTHERS)
def test_a_run_says_what_was_trained_and_is_the_same_twice(name: str, folder: str, tiny_texts: None) -> None:
    told: dict[str, Any] = {"method": name, "corpus": "tweet-sentiment", "seed": 1, "steps": 3, "batch": 6, "length": 8}
    first, again = (training.train_one(**told, limit=9, model=folder) for _ in range(2))
    assert first | {"seconds": 0} == again | {"seconds": 0}
    assert {key: first[key] for key in told} == told
    check_run(first, name)


def check_run(found: dict[str, Any], name: str) -> None:
    """Of three steps, judged on nine texts, with a head of three classes."""
    assert found["head"] == HEAD
    assert len(found["losses"]) == 3
    assert found["losses"][0] != found["losses"][-1]
    assert found["accuracy"] * 9 == pytest.approx(round(found["accuracy"] * 9))  # of the nine texts
    assert 4 * found["trained"] < found["bytes"] < 4 * found["trained"] + 8192  # float32, and a header
    if COUNTS[name] is not None:
        assert found["trained"] - HEAD == COUNTS[name]
