"""The result of every method of the table in PEFT: written, loaded into a model, and at work there as ΔW says."""

import warnings

import numpy as np
import pytest

import loralens
from loralens import Adapter, LowRank
from loralens.arithmetic import METHODS, combine_adapters
from loralens.core import Layout, Scaling
from tests.draws import draw_factors
from tests.tolerances import LIVE_OUTPUT

torch = pytest.importorskip("torch")

SHAPES = {"q": (12, 9), "v": (8, 14), "conv": (6, 36), "table": (7, 11), "dead": (5, 4)}
LAYOUTS = {"conv": Layout("conv", (3, 3)), "table": Layout("embedding")}
RANKS = {"q": (3, 2), "v": (1, 4), "conv": (2, 3), "table": (2, 1), "dead": (1, 2)}
OPTIONS = {"cart": {"rank": 2}, "ctm": {"rank": 2}}
CASES = [(name, space) for name, row in METHODS.items() for space in row.spaces or (None,)]


class Net(torch.nn.Module):
    """A layer of every kind that PEFT adapts."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.v = torch.nn.Linear(9, 12), torch.nn.Linear(14, 8)
        self.conv = torch.nn.Conv2d(4, 6, 3, padding=1)
        self.table = torch.nn.Embedding(11, 7)
        self.dead = torch.nn.Linear(4, 5)
        self.requires_grad_(False)


def adapter(which):
    rng = np.random.default_rng(which)
    modules = {}
    for name, (out, in_) in SHAPES.items():
        rank = RANKS[name][which]
        B, A = draw_factors(rng, out, in_, rank, "f4")
        scaling = Scaling("alpha/r", (3.0, -8.0)[which], rank)
        B *= name != "dead"
        modules[name] = LowRank(B, A, scaling.value, scaling=scaling, layout=LAYOUTS.get(name, Layout()))
    return Adapter(modules=modules)


def outputs(net, inputs):
    return {name: getattr(net, name)(x).detach().numpy() for name, x in inputs.items()}


@pytest.mark.some(8)
@pytest.mark.parametrize(("method", "space"), CASES, ids=[f"{name}-{space or 'exact'}" for name, space in CASES])
def test_the_result_of_every_method_works_in_peft(method, space, tmp_path):
    from peft import PeftModel

    terms = [(adapter(0), 0.7), (adapter(1), 0.4)]
    result = combine_adapters(terms, method=method, space=space, **OPTIONS.get(method, {})).adapter
    loralens.save(result, tmp_path / "out")
    found = loralens.load(tmp_path / "out")
    assert set(found) == set(SHAPES)  # ranks differ from module to module, and one module came to 0
    assert (found["dead"].rank, found["dead"].dense().any()) == (1, False)
    torch.manual_seed(1)
    inputs = {
        "q": torch.randn(3, 9),
        "v": torch.randn(3, 14),
        "conv": torch.randn(2, 4, 5, 5),
        "table": torch.arange(11),
        "dead": torch.randn(3, 4),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        live = outputs(PeftModel.from_pretrained(Net(), tmp_path / "out").base_model.model, inputs)
    by_hand = Net()
    for name, module in found.items():
        weight = getattr(by_hand, name).weight
        D = torch.from_numpy(module.dense().astype(np.float32))
        weight += D.T if name == "table" else D.reshape(weight.shape)
    for name, expected in outputs(by_hand, inputs).items():
        np.testing.assert_allclose(live[name], expected, **LIVE_OUTPUT, err_msg=name)
    plain = outputs(Net(), inputs)
    assert method == "model-stock" or any(np.abs(plain[n] - live[n]).max() > 0.01 for n in ("q", "v", "conv", "table"))
