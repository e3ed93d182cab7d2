"""Batches are drawn under the generators of the caller, whatever the training draws and wherever it goes on from."""

# ruff: noqa: NPY002 - the generator of NumPy that callers seed is the global one

import copy
import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from loralens import OptionError
from loralens.core import State
from loralens.training import Course, Fitted, Watch, fit
from loralens.training.feed import Feed
from tests.marks import slow_except

torch = pytest.importorskip("torch")
nn = torch.nn

ROWS = 10


class Texts(torch.utils.data.Dataset):  # type: ignore[misc]
    """Row n says n, and draws one more number as an augmentation would."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"row": row, "noise": torch.rand(())}


def loader(**more: Any) -> Any:
    return torch.utils.data.DataLoader(Texts(), **{"batch_size": 2, "shuffle": True, **more})


class PythonRounds:
    """An iterable that shuffles its rounds with the generators of Python and of NumPy."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rows = list(range(ROWS))
        random.shuffle(rows)
        for row in rows:
            yield {"row": torch.tensor([row]), "noise": torch.from_numpy(np.random.rand(1))}


def own_generator() -> Any:
    return loader(generator=torch.Generator().manual_seed(3))


FEEDS: dict[str, Callable[[], Any]] = {
    "loader": loader,
    "own generator": own_generator,
    "python": PythonRounds,
}


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():  # a model that is made draws its weights
            self.body = nn.Linear(1, 1, bias=False)
        with torch.no_grad():
            self.body.weight.fill_(0.3)

    def forward(self, x: Any) -> Any:
        return self.body(x.float()[:, None])


Seen = list[tuple[list[int], list[float]]]


def run(batches: Any, *, steps: int = 12, state: State | None = None, **more: Any) -> tuple[Seen, Fitted, list[State]]:
    """What a run saw, in order; its result, and its states."""
    seen: Seen = []
    states: list[State] = []

    def loss(model: Any, batch: Any) -> Any:
        seen.append((batch["row"].tolist(), batch["noise"].tolist()))
        torch.rand(3)  # what training draws changes no batch
        return model(batch["row"] + batch["noise"]).square().mean()

    course = Course(steps, lr=1e-2, **more.pop("course", {}))
    watch = Watch(save=lambda one: states.append(copy.deepcopy(one)), save_every=1)
    made = fit(Body(), batches, course=course, loss=loss, rank=1, watch=watch, state=state, **more)
    return seen, made, states


@pytest.fixture(autouse=True)
def undisturbed() -> Iterator[None]:
    """The generators of the other tests."""
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(kept[0]), np.random.set_state(kept[1]), torch.set_rng_state(kept[2])


@pytest.mark.parametrize("name", ["loader", "own generator", "python"])
@pytest.mark.parametrize("more", [{}, {"dropout": 0.5}, {"course": {"accumulate": 2}}], ids=str)
def test_batches_are_those_of_a_plain_loop_under_the_same_seed(name: str, more: Any) -> None:
    seed_all(5)
    plain = [(b["row"].tolist(), b["noise"].tolist()) for rounds in [FEEDS[name]()] for _ in range(5) for b in rounds]
    seed_all(5)
    seen, _, _ = run(FEEDS[name](), **more)
    assert seen == plain[: len(seen)]
    assert len({str(rows) for rows, _ in seen}) > 6  # rounds differ


@pytest.mark.some(2)
@pytest.mark.parametrize("name", FEEDS)
@pytest.mark.parametrize("accumulate", slow_except([1, 3], 3))
def test_a_run_that_goes_on_sees_what_the_whole_run_saw(name: str, accumulate: int) -> None:
    course = {"accumulate": accumulate}
    seed_all(5)
    seen, whole, states = run(FEEDS[name](), course=course)
    for state in states[::3]:
        seed_all(5)
        later, rest, _ = run(FEEDS[name](), state=state, course=course)
        assert later == seen[state.step * accumulate :]
        assert rest.losses == whole.losses[state.step :]
        for part in "BA":
            ours, theirs = (getattr(one.adapter["body"], part) for one in (rest, whole))
            assert ours.tobytes() == theirs.tobytes()


def test_a_sampler_that_divides_the_data_is_refused() -> None:
    sampler = torch.utils.data.DistributedSampler(Texts(), num_replicas=2, rank=1)
    with pytest.raises(OptionError, match="divides the data among processes"):
        run(loader(sampler=sampler, shuffle=False))
    prepared: Any = PythonRounds()
    prepared.batch_sampler = SimpleNamespace(num_processes=2, process_index=1)
    with pytest.raises(OptionError, match="divides the data among processes"):
        Feed(prepared)
