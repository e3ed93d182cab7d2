"""The table of other tools: a row for each task and tool, with ratios, and a word for what was not measured."""

from benchmarks.others.table import TASKS, markdown
from benchmarks.others.together import PARTS

COST = {"least": 1.0, "most": 1.0, "runs": 3}


def figure(seconds: float, **quality: float) -> dict[str, float]:
    return COST | {"seconds": seconds, "cpu_seconds": 2 * seconds, "peak_mib": 70.4} | quality


RESULT = {
    "merge": {
        "tools": {"bare": figure(2.5, error=0.1634), "peft": figure(20.0, error=0.25), "axolotl": "not measured: x"}
    },
    "gguf": {
        "F16": {"tools": {"bare": figure(3.0, error=0.02), "llama-export-lora": "not measured: y"}},
        "Q4_K": {
            "tools": {"bare": figure(3.0, error=0.02, file_bytes=16e8), "keep": figure(9.0, error=4.0, file_bytes=4e8)}
        },
    },
    "extract": {"tools": {"loralens": figure(1.0, error=0.4656), "mergekit": figure(10.0, error=0.4656)}},
    "compress": {"tools": {"loralens": figure(0.3, energy_kept=0.912345), "sd-scripts": figure(30.0, energy_kept=0.9)}},
    "sum": {"tools": {"loralens": figure(0.4, error=0.3867), "peft": figure(12.0, error=0.3867)}},
    "spectrum": {
        "tools": {"loralens": figure(0.4), "loralens_doctor": figure(0.8), "adaptersentry": "not measured: z"},
        "largest_relative_error": {name: {"loralens": {"of_any": 1e-14}} for name in ("r16", "r16-kappa1000")},
    },
}


def test_every_task_has_rows() -> None:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in markdown(RESULT).splitlines()]
    assert {len(row) for row in rows} == {6}
    assert rows[2][:3] == ["merge into a model of 1.6 GB in bf16", "loralens", "2.50 s"]
    assert rows[2][3:] == ["5.00 s", "70 MiB", "error 16.34 %"]
    assert rows[3] == ["…", "PEFT, `merge_and_unload`", "20 s (8 ×)", "40 s (8 ×)", "70 MiB", "error 25 %"]
    assert rows[4] == ["…", "axolotl, memory-efficient merge", "not measured: x", "", "", ""]
    assert [row[0] for row in rows[2:] if row[0] != "…"] == [task.title for task in TASKS]
    assert rows[-3][-1] == "error of a singular value 1e-14; κ = 1000: 1e-14"
    assert rows[-2][1:3] == ["loralens `doctor`", "0.80 s (2 ×)"]
    assert "error 400 %, 0.40 GB" in {row[-1] for row in rows}


def test_tasks_are_parts() -> None:
    assert {task.path[0] for task in TASKS} <= PARTS.keys()
