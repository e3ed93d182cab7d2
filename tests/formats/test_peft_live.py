"""PEFT itself as the judge: what we read of its files is what it adds to a model, and it reads what we write.

Models are made here, tiny and random. Every adapter is filled with random numbers, so that no update is zero.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loralens
from loralens import Adapter, LowRank
from tests import models
from tests.marks import when_used
from tests.tolerances import MOVED, PEFT_UPDATE, TWO_SVDS

torch = pytest.importorskip("torch")
peft = when_used("peft")
transformers = pytest.importorskip("transformers")
nn = torch.nn

pytestmark = [
    pytest.mark.usefixtures("quiet_torch"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. 3 LoRA tensor.s. have invalid shape"),  # biases on B
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match any targeted module"),
]

# ---------------------------------------------------------------- models


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=24, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    return transformers.GPT2LMHeadModel(config)


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(
        vocab_size=24, hidden_size=16, intermediate_size=12, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2, experts_implementation="eager",
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(4, 6, 3, padding=1)
        self.two = nn.Conv2d(6, 8, (3, 2), padding=1)
        self.point = nn.Conv2d(8, 8, 1)
        self.three = nn.Conv3d(8, 10, (1, 2, 3), padding=1)

    def forward(self, x: Any) -> Any:
        x = self.one(x)
        x = self.point(self.two(x[..., None]))
        return self.three(x[..., None])


class Plain(nn.Module):
    """Names that end in one another, with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 7)
        self.block = nn.ModuleDict({"fc": nn.Linear(7, 8), "head": nn.Linear(8, 5)})

    def forward(self, x: Any) -> Any:
        return self.block["head"](torch.tanh(self.block["fc"](torch.tanh(self.fc(x)))))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(24, 6)
        self.out = nn.Linear(6, 5)

    def forward(self, ids: Any) -> Any:
        return self.out(self.words(ids))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 5)

    def forward(self, x: Any) -> Any:
        return self.out(self.attn(x, x, x)[0])


class Experts(nn.Module):
    """``count`` experts, their weights as (E, out, in), or (E, in, out) if transposed."""

    def __init__(self, count: int, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        up, down = ((6, 10), (5, 6)) if transposed else ((10, 6), (6, 5))
        self.gate_up_proj = nn.Parameter(torch.randn(count, *up) / 3)
        self.down_proj = nn.Parameter(torch.randn(count, *down) / 3)

    def forward(self, x: Any) -> Any:
        x = x.unsqueeze(0).expand(len(self.gate_up_proj), *x.shape)
        turn = (lambda W: W) if self.is_transposed else (lambda W: W.mT)
        gate, up = (x @ turn(self.gate_up_proj)).chunk(2, -1)
        return (torch.tanh(gate) * up @ turn(self.down_proj)).sum(0)


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Any) -> Any:
        return x @ self.weight.T


class Mixture(nn.Module):
    def __init__(self, *, count: int = 3, transposed: bool = False) -> None:
        super().__init__()
        self.gate = Router()
        self.layers = nn.ModuleList([nn.ModuleDict({"experts": Experts(count, transposed)}) for _ in range(2)])
        self.flat = nn.ParameterDict()  # something without a weight
        self.out = nn.Linear(4, 5)

    def forward(self, x: Any) -> Any:
        for layer in self.layers:
            x = x + layer["experts"](x)
        return self.out(self.gate(x))


def ids() -> Any:
    return torch.arange(22).reshape(2, 11) % 24


def floats(*shape: int) -> Callable[[], Any]:
    return lambda: torch.linspace(-1, 1, int(np.prod(shape)), dtype=torch.float64).reshape(shape).sin()


# ---------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """A model, its input, the LoRA configuration, and what the reader should find."""

    name: str
    model: Callable[[], nn.Module]
    input: Callable[[], Any]
    config: dict[str, Any]
    shapes: dict[str, tuple[int, int, int]]  # some modules: out, in, rank
    scales: dict[str, float] = field(default_factory=dict)
    roles: dict[str, int] = field(default_factory=dict)  # how many extra tensors of each role
    findings: tuple[str, ...] = ()
    transposed: bool = False  # whether the base holds experts as (E, in, out)

    def __str__(self) -> str:
        return self.name


L0 = "model.layers.0."
LAYER = {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 12}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]

CASES = [
    Case("llama", models.llama, ids, LAYER, {L0 + "self_attn.q_proj": (16, 16, 4), L0 + "self_attn.v_proj": (8, 16, 4)},
         {L0 + "self_attn.q_proj": 3.0}),
    Case("rslora", models.llama, ids, {**LAYER, "use_rslora": True}, {}, {L0 + "self_attn.q_proj": 12 / 4**0.5}),
    Case("patterns", models.llama, ids,
         {"target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"], "r": 4, "lora_alpha": 8,
          "rank_pattern": {r"^model.layers.1.self_attn.q_proj": 2, "q_proj": 3, r"layers\.\d+\.mlp\..*": 5, "j": 9},
          "alpha_pattern": {r"(q|k)_proj": 6, "q_proj": 100, "^k_proj": 50, "layers.1.self_attn.v_proj": 1}},
         {"model.layers.0.self_attn.q_proj": (16, 16, 3), "model.layers.1.self_attn.q_proj": (16, 16, 2),
          "model.layers.1.mlp.down_proj": (16, 24, 5), "model.layers.0.self_attn.k_proj": (8, 16, 4)},
         {"model.layers.0.self_attn.q_proj": 2.0, "model.layers.1.self_attn.q_proj": 3.0,
          "model.layers.0.self_attn.k_proj": 1.5, "model.layers.0.self_attn.v_proj": 2.0,
          "model.layers.1.self_attn.v_proj": 0.25}),
    Case("dora", models.llama, ids, {**LAYER, "use_dora": True}, {}, roles={"magnitude": 4}, findings=("use-dora",)),
    Case("saved", models.llama, ids, {**LAYER, "modules_to_save": ["lm_head", "norm"]}, {}, roles={"saved": 6}),
    Case("classifier", lambda: models.bert("BertForSequenceClassification", num_labels=3), ids,
         {"target_modules": ["query"], "r": 2, "task_type": "SEQ_CLS", "bias": "all"},
         {"bert.encoder.layer.1.attention.self.query": (16, 16, 2)}, roles={"saved": 2, "bias": 18, "copy": 2}),
    Case("embedding", models.llama, ids, {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "r": 3},
         {"model.embed_tokens": (16, 24, 3), "lm_head": (24, 16, 3)}, roles={"embedding": 2}),
    Case("words", Words, ids, {"target_modules": ["words"], "r": 3, "lora_alpha": 5}, {"words": (6, 24, 3)}),
    Case("tokens", models.llama, ids, {**LAYER, "trainable_token_indices": [1, 3]}, {}, roles={"tokens": 1}),
    Case("gpt2", gpt2, ids, {"target_modules": ["c_attn", "c_proj"], "r": 4, "lora_alpha": 6},
         {"transformer.h.1.attn.c_attn": (48, 16, 4), "transformer.h.0.mlp.c_proj": (16, 64, 4)}),
    Case("conv", Convolutions, floats(2, 4, 5), {"target_modules": ["one", "two", "point", "three"], "r": 3},
         {"one": (6, 12, 3), "two": (8, 36, 3), "point": (8, 8, 3), "three": (10, 48, 3)}),
    Case("attention", Attention, floats(2, 3, 8),
         {"target_modules": ["attn", "out"], "r": 2, "rank_pattern": {"attn": 3}, "alpha_pattern": {"^attn": 5}},
         {"attn.in_proj_weight": (24, 8, 3), "attn.out_proj": (8, 8, 3), "out": (5, 8, 2)},
         {"attn.in_proj_weight": 5 / 3, "attn.out_proj": 10 / 3, "out": 4.0}, findings=("out-proj-twice",)),
    Case("lora-bias", Plain, floats(2, 6), {"target_modules": ["fc", "head"], "r": 3, "lora_bias": True},
         {}, roles={"lora_bias": 3}),
    Case("suffixes", Plain, floats(2, 6),
         {"target_modules": ["fc", "head"], "r": 5, "rank_pattern": {"^fc": 2, "fc": 3}},
         {"fc": (7, 6, 2), "block.fc": (8, 7, 3), "block.head": (5, 8, 5)}),
    Case("experts", Mixture, floats(2, 6), {"target_modules": [], "target_parameters": EXPERTS, "r": 2},
         {"layers.0.experts.gate_up_proj[2]": (10, 6, 2), "layers.1.experts.down_proj[0]": (6, 5, 2)}),
    Case("experts-reversed", Mixture, floats(2, 6),
         {"target_modules": ["out"], "target_parameters": [*EXPERTS[::-1], "gate.weight"], "r": 2,
          "rank_pattern": {"down_proj": 3, "gate.weight": 4}, "alpha_pattern": {"gate.weight": 3}},
         {"layers.0.experts.gate_up_proj[2]": (10, 6, 2), "layers.1.experts.down_proj[0]": (6, 5, 3),
          "gate": (4, 6, 4), "out": (5, 4, 2)}, {"gate": 0.75}),
    Case("experts-transposed", lambda: Mixture(count=4, transposed=True), floats(2, 6),
         {"target_modules": ["out"], "target_parameters": EXPERTS, "r": 3, "lora_alpha": 4},
         {"layers.0.experts.gate_up_proj[3]": (10, 6, 3)}, {"layers.0.experts.gate_up_proj[3]": 4 / 3},
         transposed=True),
    Case("mixtral", mixtral, ids, {"target_modules": ["q_proj"], "target_parameters": EXPERTS, "r": 2},
         {L0 + "mlp.experts.gate_up_proj[2]": (24, 16, 2), L0 + "mlp.experts.down_proj[0]": (16, 12, 2)}),
    Case("mixtral-v4", mixtral, ids, {"target_modules": ["q_proj", "gate", "w1", "w2", "w3"], "r": 2},
         {L0 + "mlp.experts.gate_up_proj[2]": (24, 16, 4), L0 + "mlp.experts.down_proj[0]": (16, 12, 2),
          L0 + "mlp.gate": (3, 16, 2)}),
]  # fmt: skip


def base(case: Case) -> nn.Module:
    torch.manual_seed(0)
    return case.model().eval()


def fill(model: nn.Module) -> None:
    """Random numbers in everything that the adapter holds."""
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator).to(p.dtype) * 0.3
        if "magnitude" in name:
            p.data *= 1 + noise
        elif "lora_" in name or "trainable_tokens_delta" in name or p.requires_grad:
            p.data += noise


def adapt(case: Case) -> nn.Module:
    model = peft.get_peft_model(base(case), peft.LoraConfig(**case.config)).eval()
    fill(model)
    return model


def answer(model: nn.Module, case: Case) -> Any:
    model = copy.deepcopy(model).double()
    with torch.no_grad():
        found = model(case.input())
    return found.logits if hasattr(found, "logits") else found


def load_in_peft(case: Case, folder: Path) -> nn.Module:
    return peft.PeftModel.from_pretrained(base(case), folder).eval()


def merged_minus_base(model: nn.Module, case: Case) -> dict[str, np.ndarray]:
    """What PEFT's own merge adds to every parameter of the base, in float64."""
    before = base(case).double().state_dict()
    after = copy.deepcopy(model).double().merge_and_unload().state_dict()
    return {key: (after[key] - W).numpy() for key, W in before.items()}


def peft_update(name: str, module: LowRank, model: nn.Module, added: dict[str, np.ndarray], case: Case) -> np.ndarray:
    """ΔW of a module as PEFT has it, laid out as (out, in)."""
    if case.config.get("use_dora"):  # a merge scales W too
        layer = model.base_model.model.get_submodule(name)
        D = layer.double().get_delta_weight("default").detach().numpy()
    else:
        stack, _, expert = name.partition("[")
        D = added[stack] if stack in added else added[f"{stack}.weight"]
        D = D[int(expert[:-1])] if expert else D.reshape(D.shape[-2:]) if D.shape[0] == 1 else D
    if module.layout.kind == "conv":
        return D.reshape(len(D), -1)
    turned = module.layout.kind == "embedding" or module.layout.transposed
    return D.T if turned or (module.layout.kind == "experts" and case.transposed) else D


def assert_same_updates(adapter: Adapter, model: nn.Module, case: Case) -> None:
    added = {} if case.config.get("use_dora") else merged_minus_base(model, case)
    for name, module in adapter.items():
        expected = peft_update(name, module, model, added, case)
        np.testing.assert_allclose(module.dense(), expected, **PEFT_UPDATE, err_msg=name)


def shrunk(adapter: Adapter) -> Adapter:
    """Every module at another rank; those that PEFT gives one rank keep one."""
    stacks = {name: name.partition("[")[0] for name in adapter}
    groups = {name: stack.removesuffix(".in_proj_weight").removesuffix(".out_proj") for name, stack in stacks.items()}
    ranks = {group: 1 + i % 3 for i, group in enumerate(dict.fromkeys(groups.values()))}

    def shrink(name: str, m: LowRank) -> LowRank:
        r = min(ranks[groups[name]], m.rank)
        return LowRank(m.B[:, :r], m.A[:r], m.scale, layout=m.layout, scaling=m.scaling)

    modules = {name: shrink(name, module) for name, module in adapter.items()}
    return Adapter(
        modules=modules, extra=adapter.extra, config=adapter.config, metadata=adapter.metadata, format=adapter.format
    )


# ---------------------------------------------------------------- tests


@pytest.mark.some(6)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_reads_what_peft_adds_and_peft_reads_what_is_written(case: Case, tmp_path: Path) -> None:
    model = adapt(case)
    model.save_pretrained(tmp_path / "peft")
    adapter = loralens.load(tmp_path / "peft")

    assert {name: (*adapter[name].shape, adapter[name].rank) for name in case.shapes} == case.shapes
    assert {name: adapter[name].scale for name in case.scales} == case.scales
    roles = [extra.role for extra in adapter.extra.values()]
    assert {role: roles.count(role) for role in roles} == case.roles
    assert tuple(finding.code for finding in adapter.findings) == case.findings
    assert_same_updates(adapter, model, case)

    loralens.save(adapter, tmp_path / "same")
    expected = answer(model, case)
    assert torch.equal(answer(load_in_peft(case, tmp_path / "same"), case), expected)
    assert (answer(base(case), case) - expected).abs().max() > MOVED

    less = shrunk(adapter)
    loralens.save(less, tmp_path / "less")
    reloaded = load_in_peft(case, tmp_path / "less")
    assert_same_updates(less, reloaded, case)
    again = loralens.load(tmp_path / "less")
    assert {name: (m.rank, m.shape) for name, m in again.items()} == {n: (m.rank, m.shape) for n, m in less.items()}
    assert (answer(reloaded, case) - expected).abs().max() > MOVED


def test_a_grouped_convolution_reads_all_channels(tmp_path: Path) -> None:
    """PEFT does not merge one: its update has another shape than the weight. It is what the layer computes, though."""

    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 6, 3, padding=1, groups=2)

        def forward(self, x: Any) -> Any:
            return self.conv(x)

    case = Case("grouped", Grouped, floats(2, 4, 5, 5), {"target_modules": ["conv"], "r": 4, "lora_alpha": 6}, {})
    with pytest.warns(UserWarning, match="groups"):
        model = adapt(case)
    model.save_pretrained(tmp_path / "peft")
    module = loralens.load(tmp_path / "peft")["conv"]
    assert (module.shape, module.rank, module.layout.groups) == ((6, 36), 4, 2)
    W = torch.from_numpy(module.dense()).reshape(6, 4, 3, 3)
    expected = answer(model, case) - answer(base(case), case)
    np.testing.assert_allclose(nn.functional.conv2d(case.input(), W, padding=1), expected, **PEFT_UPDATE)
    assert expected.abs().max() > MOVED


@pytest.mark.parametrize("name", ["pissa", "kasa"])
def test_a_changed_base_is_said_and_keeps_rank_and_scale(name: str, tmp_path: Path) -> None:
    config, code = {"init_lora_weights": "pissa"}, "mutated-base"
    if name == "kasa":
        from peft.tuners.lora import config as configs

        if not hasattr(configs, "KasaConfig"):
            pytest.skip("this PEFT has no KaSA")
        config, code = {"kasa_config": configs.KasaConfig()}, "kasa-config"
    case = Case("llama", models.llama, ids, {**LAYER, **config}, {})
    model = adapt(case)
    model.save_pretrained(tmp_path / "peft")
    adapter = loralens.load(tmp_path / "peft")
    assert [finding.code for finding in adapter.findings] == [code]
    merged = copy.deepcopy(model).double().merge_and_unload().state_dict()
    for module_name, module in adapter.items():
        residue = model.base_model.model.get_submodule(module_name).base_layer.weight.double()
        expected = merged[f"{module_name}.weight"] - residue
        np.testing.assert_allclose(module.dense(), expected.detach(), **PEFT_UPDATE)

    loralens.save(adapter, tmp_path / "same")
    torch.manual_seed(3)
    reloaded = load_in_peft(case, tmp_path / "same")
    assert (answer(reloaded, case) - answer(model, case)).abs().max() < TWO_SVDS
    assert (answer(base(case), case) - answer(model, case)).abs().max() > MOVED
