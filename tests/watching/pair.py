"""Two processes with one model of PEFT, by DDP and by FSDP2: ``python -m tests.watching.pair FOLDER`` forks them."""

import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import loralens
from loralens.watching import Watcher
from tests import models
from tests.processes import in_children


def adapted() -> Any:
    import peft

    torch.manual_seed(1)
    model = peft.get_peft_model(models.llama(), peft.LoraConfig(r=4, target_modules="all-linear"))
    return models.shake(model, 0.1)


def shard(model: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    for block in model.base_model.model.model.layers:
        fully_shard(block)
    fully_shard(model)
    return model


def check(model: Any, folder: Path, name: str) -> None:
    """The view is that of the whole model; both processes measure, and the first one writes."""
    view, whole = loralens.live(model), loralens.live(adapted())
    for module in whole:
        assert np.array_equal(view[module].A, whole[module].A), module
        assert np.array_equal(view[module].B, whole[module].B), module
    watcher = Watcher(model, log=folder / f"{name}.jsonl", gradients=True)
    ids = torch.tensor([[3, 4, 5, 6]])
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
        snapshot = watcher.step()
        optimiser.zero_grad()
    assert snapshot is not None
    assert snapshot.total["gradient_B_norm"] > 0


def as_one_of_two(rank: int, folder: Path, work: Callable[[], None]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=120))
    work()
    dist.destroy_process_group()


def in_two(folder: Path, work: Callable[[], None]) -> None:
    """Do the work in two processes that know each other."""
    in_children(*(partial(as_one_of_two, rank, folder, work) for rank in (0, 1)))


def work(folder: Path) -> None:
    check(torch.nn.parallel.DistributedDataParallel(adapted()), folder, "ddp")
    check(shard(adapted()), folder, "fsdp")


if __name__ == "__main__":
    home = Path(sys.argv[1])
    in_two(home, partial(work, home))
