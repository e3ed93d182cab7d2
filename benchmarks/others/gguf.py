"""``loralens merge`` into GGUF models of four blocks of a 7B Llama, against ``llama-export-lora`` of llama.cpp.

``llama-export-lora`` writes float16, whatever the base has. So a base of float16 gives both the same task. For a base
of Q4_K, loralens does the same with ``--dtype f16``. With ``--bits keep`` it writes a file of 4 bits instead, whose
error is that of rounding to the codes. The adapter for llama.cpp is converted before, without being timed.
"""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.others.merged import errors, of_ggufs
from benchmarks.process import alternate_writers, read_once
from benchmarks.rivals import Program
from benchmarks.synthetic_low_bit import NAMES, make_tiny_gguf

KINDS = ("F16", "Q4_K")
LORALENS = str(Path(sys.executable).with_name("loralens"))


def run(data: Path, rival: Program, *, runs: int) -> dict[str, object]:
    """Times, peaks and errors for both bases and an adapter in ``data`` (made where missing)."""
    subprocess.run([sys.executable, "-m", "benchmarks.synthetic_low_bit", str(data), *KINDS], check=True)
    found: dict[str, object] = {}
    for kind in KINDS:
        with TemporaryDirectory(dir=data) as folder:
            base, adapter = data / f"llama-4-blocks.{kind}.gguf", data / "llama-4-blocks-r16"
            found[kind] = compare(kind, base, adapter, Path(folder), rival, runs=runs)
    return found


def compare(kind: str, base: Path, adapter: Path, folder: Path, rival: Program, *, runs: int) -> dict[str, object]:
    """The same as `run`, for one base, with results in ``folder``."""

    def judge(tool: str) -> Mapping[str, float]:
        out = folder / tool / "out.gguf"
        return {**errors(of_ggufs(base, adapter, {tool: out}, NAMES))[tool], "file_bytes": out.stat().st_size}

    read_once(base, adapter)
    warm = _commands(kind, *make_tiny_gguf(folder / "tiny", kind), folder, rival)
    timed = _commands(kind, base, adapter, folder, rival)
    tools = alternate_writers(timed, runs=runs, warm=warm, folder=folder, judge=judge)
    if rival.missing:
        tools["llama-export-lora"] = rival.missing
    return {"nearest_in_f16": errors(of_ggufs(base, adapter, {}, NAMES))["nearest"], "tools": tools}


def _commands(kind: str, base: Path, adapter: Path, folder: Path, rival: Program) -> dict[str, list[str]]:
    def ours(name: str, *options: str) -> list[str]:
        start = [LORALENS, "merge", str(adapter), "--base", str(base), "--quiet", "--undo", "none"]
        return [*start, *options, "-o", str(folder / name / "out.gguf")]

    bare = ("--certificate", "none")
    if kind == "F16":
        found = {"bare": ours("bare", *bare), "certificate": ours("certificate")}
    else:
        found = {"bare": ours("bare", "--dtype", "f16", *bare), "keep": ours("keep", "--bits", "keep", *bare)}
    if not rival.missing:
        theirs = folder / f"{base.stem}.adapter.gguf"
        convert = [LORALENS, "convert", str(adapter), "--to", "gguf", "--base", str(base), "-o", str(theirs), "--quiet"]
        subprocess.run(convert, check=True, stdout=subprocess.DEVNULL)
        out = str(folder / "llama-export-lora" / "out.gguf")
        command = [rival.path, "-m", str(base), "--lora", str(theirs), "-o", out, "-t", "2"]
        found["llama-export-lora"] = command
    return found
