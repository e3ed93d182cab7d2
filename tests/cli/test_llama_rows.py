"""Adapters of llama.cpp's converter beside a base: every verb reads q and k as the PEFT adapter that they came from."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest

import loralens
from loralens.formats import open_checkpoint
from loralens.verbs import COMMANDS
from tests import ggufs, models
from tests.bases import contents
from tests.cli.command import Command, main, near

gguf = pytest.importorskip("gguf")
torch = pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("quiet_torch")

HEADS = {"q_proj": 4, "k_proj": 2}  # of models.llama
NAMES = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v"}
ALPHA, RANK = 6.0, 3
call = Command()


def converted(adapter: loralens.Adapter, file: Path) -> Path:
    """What convert_lora_to_gguf.py writes: its own key-values alone."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, ALPHA)
    for name, module in adapter.items():
        parts = name.split(".")
        B, kind = module.B, parts[-1]
        tensor = f"blk.{parts[2]}.{NAMES[kind]}.weight"
        writer.add_tensor(f"{tensor}.lora_a", module.A)
        writer.add_tensor(f"{tensor}.lora_b", ggufs.permute(B, HEADS[kind]) if kind in HEADS else B)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, quiet_torch: None) -> Path:
    home = tmp_path_factory.mktemp("rows")
    llama = models.llama()
    models.folder(llama, home / "base")
    made = models.adapter(llama, tuple(NAMES), rank=RANK, scale=ALPHA / RANK)
    models.saved(made, home / "peft")
    models.saved(models.adapter(llama, tuple(NAMES), seed=5, rank=RANK), home / "other")
    (home / "gguf").mkdir()
    converted(made, home / "gguf" / "adapter.gguf")
    models.jsonl(home / "texts.jsonl")
    call.good("merge", home / "peft", "--base", home / "base", "-o", home / "merged")
    shutil.copytree(home / "base", home / "headless")  # nothing says its heads
    (home / "headless" / "config.json").unlink()
    return home


# Words of a command with {adapter}, {base}, {out} and {home}; of the verbs that write, what they write is compared.
VERBS = {
    "amplify": "amplify {adapter} --base {base} --json",
    "behave": "behave --threads 1 --model {base} {adapter} --data {home}/texts.jsonl --json",
    "calibrate": "calibrate --adapter {adapter} --model {base} --data {home}/texts.jsonl -o {out}.safetensors",
    "combine": "combine {adapter} {home}/other --base {base} --to peft -o {out}",
    "compress": "compress {adapter} --base {base} --rank 2 --to peft --force -o {out}",
    "convert": "convert {adapter} --base {base} --to peft -o {out}",
    "curve": "curve {adapter} --base {base} --to peft --json",
    "doctor": "doctor {adapter} --base {base} --dtype bf16 --json",
    "drop": "drop {adapter} -m v_proj --base {base} --to peft -o {out}",
    "equal": "equal {adapter} {home}/peft --base {base} --json",
    "evaluate": "evaluate {adapter} --threads 1 --model {base} --task causal-lm --data {home}/texts.jsonl --json",
    "inspect": "inspect {adapter} --base {base} --json",
    "interpolate": "interpolate {adapter} {home}/other --at 0.25 --base {base} --to peft -o {out}",
    "intruders": "intruders {adapter} --base {base} --no-cache --json",
    "merge": "merge {adapter} --base {base} -o {out}",
    "negate": "negate {adapter} --base {base} --to peft -o {out}",
    "report": "report {adapter} --base {base} --no-intruders --json",
    "scale": "scale {adapter} --by 0.5 --base {base} --to peft -o {out}",
    "spectrum": "spectrum {adapter} --base {base} --json",
    "subtract": "subtract {adapter} {home}/other --base {base} --to peft -o {out}",
    "unmerge": "unmerge {home}/merged --adapter {adapter} -o {out}",
    "verify": "verify {home}/merged --base {base} --adapter {adapter} --json",
}
READ_NO_ADAPTER = {"extract", "train"}  # they make one
RUN_A_MODEL = {"explain", "prove"}  # as `behave` does, by the same functions
GOES_ON = {"inspect", "doctor", "report", "curve", "unmerge"}  # they say it, or ΔW meets no W, or it is tried below


def test_every_verb_with_a_base_or_a_model_is_among_them() -> None:
    """A verb that is added has to be tried here too."""

    def options(name: str) -> set[str]:
        command: click.Command = main.get_command(click.Context(main), name)
        return {str(parameter.name) for parameter in command.params}

    with_one = {name for name in COMMANDS if options(name) & {"base", "model"}}
    assert with_one - READ_NO_ADAPTER - RUN_A_MODEL == set(VERBS) - {"unmerge"}


def words(verb: str, home: Path, adapter: Path, out: Path, base: str = "base") -> list[str]:
    return VERBS[verb].format(adapter=adapter, base=home / base, out=out, home=home).split()


def written(out: Path) -> dict[str, np.ndarray]:
    """Dense updates of an adapter, or the tensors of a model."""
    if (out / "adapter_config.json").exists():
        return {name: module.dense() for name, module in loralens.load(out).items()}
    return {key: tensor.read() for key, tensor in open_checkpoint(out).tensors.items()}


def numbers(record: Any) -> Any:
    """What a command measured: per module, or whatever its JSON has but names, sizes and findings of the reader."""
    dropped = {"format", "scale_source", "bytes"}
    if isinstance(record, dict):
        return {key: numbers(value) for key, value in record.items() if key not in dropped}
    return [numbers(value) for value in record] if isinstance(record, list) else record


MEASURED: dict[str, Callable[[Any], Any]] = {
    "amplify": lambda r: r["modules"],
    "behave": lambda r: [{k: v for k, v in one.items() if k != "second"} for one in r["contrasts"]],
    "curve": lambda r: [(p["rank"], p["uniform"]["relative_error"]) for p in r["points"]],
    "doctor": lambda r: [(f["code"], f["module"], f["evidence"]) for f in r["findings"]],
    "evaluate": lambda r: [{k: v for k, v in one.items() if k != "path"} for one in r["adapters"]],
    "equal": lambda r: {k: v for k, v in r.items() if k not in ("first", "second")},
    "inspect": lambda r: [(f["code"], f["text"]) for f in r["adapters"][0]["findings"]],
    "intruders": lambda r: r["modules"],
    "report": lambda r: [(m["amplification"], m["merge"]) for m in r["adapters"][0]["modules"]],
    "spectrum": lambda r: [numbers(m) for m in r["adapters"][0]["modules"]],
    "verify": lambda r: (r["modules"], r["verdict"]),
}


@pytest.mark.some(4)
@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_sees_the_rows_of_the_base(verb: str, home: Path, tmp_path: Path) -> None:
    of = {}
    for kind in ("peft", "gguf"):
        out = tmp_path / kind
        result = call.good(*words(verb, home, home / kind, out))
        assert "order" not in result.stderr, result.stderr
        if verb in MEASURED:
            of[kind] = MEASURED[verb](json.loads(result.stdout))
        elif verb == "calibrate":
            of[kind] = loralens.load_moments(out.with_suffix(".safetensors")).fingerprint
        else:
            of[kind] = {key: array.tolist() for key, array in written(out).items()}
    assert of["gguf"], verb
    near(json.loads(json.dumps(of["gguf"])), json.loads(json.dumps(of["peft"])), verb)


def test_what_is_merged_is_bit_for_bit_what_the_peft_adapter_gives(home: Path, tmp_path: Path) -> None:
    call.good("merge", home / "gguf", "--base", home / "base", "-o", tmp_path / "merged")
    one, other = contents(tmp_path / "merged"), contents(home / "merged")
    assert one["model.safetensors"] == other["model.safetensors"]
    wrong = loralens.load(home / "gguf")["model.layers.0.self_attn.q_proj"].dense()
    right = loralens.load(home / "peft")["model.layers.0.self_attn.q_proj"].dense()
    assert np.linalg.norm(wrong - right) > 0.9 * np.linalg.norm(
        right
    )  # what a merge without the base would have written


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in GOES_ON and "--model" not in VERBS[verb]])
def test_rows_that_cannot_be_put_in_order_are_an_error(verb: str, home: Path, tmp_path: Path) -> None:
    said = call.refused(*words(verb, home, home / "gguf", tmp_path / "out", "headless"))
    assert re.search(r"llama\.cpp's order|the order of llama\.cpp", said.splitlines()[-2]), said
    assert not (tmp_path / "out").exists()


def test_doctor_and_report_say_so_and_go_on(home: Path, tmp_path: Path) -> None:
    given = ("--base", home / "headless", "--json")
    findings = json.loads(call.run("doctor", home / "gguf", *given).stdout)["findings"]
    assert [(f["level"], f["code"]) for f in findings if f["level"] == "error"] == [("error", "rows-permuted")]
    assert call.run("doctor", home / "gguf", "--base", home / "headless", "--fail-on", "error").exit_code == 1
    report = tmp_path / "page.html"
    call.good("report", home / "gguf", "--base", home / "headless", "--no-intruders", "-o", report)
    assert "4 modules have their rows in another order than the base and are left out here" in report.read_text()


@pytest.mark.parametrize("others", [("peft",), ("peft", "other")])
def test_rows_in_two_orders_are_not_compared(others: tuple[str, ...], home: Path) -> None:
    files = [home / name for name in others] + [home / "gguf" / "adapter.gguf"]
    assert "its rows are in the order of" in call.refused("similarity", *files)
    # The projections without heads have one order, and so have adapters of one order.
    call.good("similarity", *files, "-m", "v_proj")
    call.good("similarity", files[-1], files[-1])
