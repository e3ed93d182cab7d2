"""Every verb that takes a base: a quantised one gives what its decoded weights give as a folder of floats."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import loralens
from loralens.core import Scaling
from tests.bases import contents, stored
from tests.cli.command import Command
from tests.draws import draw_factors
from tests.formats.low_bit.cases import CASES

NAMES = ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj")
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "torch_dtype": "float16", "vocab_size": 5}
# One of each way in which a weight lies in its file: flat, by columns, by rows, and with float8 scales.
QUICK = ("nf4, nested", "gptq, desc_act", "mlx, 4 bits", "nvfp4")
LAYOUTS = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in CASES
    if not any(word in name for word in ("stack", "gpt-oss", "byte"))
]


class Bases:
    """A base whose second module alone is adapted: as codes in two shards, and as the floats that these stand for."""

    def __init__(self, name, folder):
        case = CASES[name]()
        rename = {key: f"{{}}{key.removeprefix('a')}" for key in case.tensors}
        held = [{rename[key].format(own): array for key, array in case.tensors.items()} for own in NAMES]
        plain = {"model.embed_tokens.weight": np.ones((5, 8), np.float16), "model.norm.weight": np.ones(4, np.float16)}
        self.coded, self.floats, self.adapter = folder / "coded", folder / "floats", folder / "adapter"
        self.coded.mkdir(parents=True)
        self.floats.mkdir()
        shards = {"model-00001-of-00002.safetensors": held[0] | plain, "model-00002-of-00002.safetensors": held[1]}
        for shard, tensors in shards.items():
            save_file(tensors, self.coded / shard)
        where = {key: shard for shard, tensors in shards.items() for key in tensors}
        index = {"metadata": {"total_size": 1}, "weight_map": where}
        (self.coded / "model.safetensors.index.json").write_text(json.dumps(index))
        stated = case.config or {"quantization_config": {"quant_method": "bitsandbytes"}}
        (self.coded / "config.json").write_text(json.dumps(CONFIG | stated))
        (self.coded / "quant_config.json").write_text("{}")
        save_file({f"{own}.weight": case.W for own in NAMES} | plain, self.floats / "model.safetensors")
        (self.floats / "config.json").write_text(json.dumps(CONFIG))
        B, A = (0.1 * factor for factor in draw_factors(0, *case.W.shape, 2, "f4"))
        pair = loralens.LowRank(B, A, 4.0, scaling=Scaling("alpha/r", 8, 2, "adapter_config.json"))
        loralens.save(loralens.Adapter(modules={NAMES[1]: pair}, base_model="tiny/base"), self.adapter)


@pytest.fixture(scope="module", params=LAYOUTS)
def bases(request, tmp_path_factory):
    return Bases(request.param, tmp_path_factory.mktemp("bases"))


def test_a_merge_into_floats_is_that_of_the_decoded_folder_and_comes_back(bases, tmp_path):
    ours, theirs = (
        loralens.merge(bases.adapter, base=base, output=tmp_path / base.name, dtype="bf16")
        for base in (bases.coded, bases.floats)
    )
    assert ours.certificate["total"]["gain"] == theirs.certificate["total"]["gain"]
    assert ours.certificate["result"]["sha256"] == theirs.certificate["result"]["sha256"]
    merged, expected = stored(tmp_path / "coded"), stored(tmp_path / "floats")
    assert merged.keys() == expected.keys()
    for key, array in expected.items():
        assert merged[key].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(merged[key].view(np.uint16), array.view(np.uint16))
    config = json.loads((tmp_path / "coded" / "config.json").read_text())
    assert config == {**CONFIG, "torch_dtype": "bfloat16"}
    # Every weight is in the shard that its codes were in.
    index = json.loads((tmp_path / "coded" / "model.safetensors.index.json").read_text())
    assert [index["weight_map"][f"{own}.weight"][6:11] for own in NAMES] == ["00001", "00002"]
    assert set(index["weight_map"]) == set(merged)
    assert not (tmp_path / "coded" / "quant_config.json").exists()
    for base in (bases.coded, bases.floats):
        result = loralens.verify(tmp_path / "coded", base=base, adapter=bases.adapter)
        # Every bit is as merged; where the weights are large, bfloat16 itself swallows a part of the update.
        assert [verdict.different for verdict in result.modules] == [0]
        assert result.others_changed == []


def test_undo_restores_every_byte_of_the_codes(bases, tmp_path):
    result = loralens.merge(bases.adapter, base=bases.coded, output=tmp_path / "merged", dtype="f32")
    # In float32 the weights that no adapter touches are written too, although their dtype is that of decoding.
    assert stored(tmp_path / "merged").keys() == stored(bases.floats).keys()
    # The undo file keeps the codes and their scales as they are.
    parts = [array.nbytes for key, array in stored(bases.coded).items() if key.startswith("model.layers")]
    assert result.certificate["total"]["undo_bytes"] >= sum(parts)
    loralens.unmerge(tmp_path / "merged", output=tmp_path / "back")
    assert contents(tmp_path / "back") == contents(bases.coded)


COMMANDS = {
    "amplify": ["amplify", "ADAPTER", "--base", "BASE", "--json"],
    "intruders": ["intruders", "ADAPTER", "--base", "BASE", "--json", "--no-cache"],
    "spectrum": ["spectrum", "ADAPTER", "--base", "BASE", "--json"],
    "doctor": ["doctor", "ADAPTER", "--base", "BASE", "--json"],
    "inspect": ["inspect", "ADAPTER", "--base", "BASE", "--json"],
    "extract": ["extract", "--base", "BASE", "--tuned", "TUNED", "--energy", "0.9", "--dry-run", "--json"],
}


@pytest.mark.some(8)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_of_codes_what_it_says_of_floats(command, bases, tmp_path):
    if command == "extract":
        loralens.merge(bases.adapter, base=bases.floats, output=tmp_path / "tuned", dtype="f32")

    def run(base):
        words = {"ADAPTER": bases.adapter, "BASE": base, "TUNED": tmp_path / "tuned"}
        result = Command().run(*(words.get(word, word) for word in COMMANDS[command]))
        assert result.exit_code in (0, 1), result.output
        return result.stdout.replace(str(base), "BASE")

    if command == "doctor":  # which also says what a merge into the codes would do
        findings = [json.loads(run(base))["findings"] for base in (bases.coded, bases.floats)]
        codes = {"codes-merge", "codes-weak"}
        assert {finding["code"] for finding in findings[0]} & codes
        assert [finding for finding in findings[0] if finding["code"] not in codes] == findings[1]
        return
    assert run(bases.coded) == run(bases.floats)
