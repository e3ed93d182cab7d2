"""``loralens combine`` against the methods of PEFT's ``add_weighted_adapter``, on blocks of a small Llama.

Whole processes of loralens are timed where the result is cut to one adapter's rank; `cut_sum` times those of others.
PEFT's methods run once, in one process, and their seconds are those of the call alone. The model is loaded in its own
dtype, bf16. The factors that ``cat`` makes get the same dtype, so its error is that of rounding to bf16 (on a float32
model, it is 3e-8). Sums and DARE are compared with Σ w·ΔW; TIES is compared with TIES of ΔW, with equal weights, for
which both tools define it alike. DARE is right on average only: its error is that of the random numbers.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import judge
from benchmarks.process import alternate, once
from benchmarks.synthetic_pair import RANK

PEFT = """
import json, sys, time, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import torch, transformers
from peft import PeftModel
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
base, out, work = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
for place, (name, folder) in enumerate(work["adapters"].items()):
    if place:
        model.load_adapter(folder, adapter_name=name)
    else:
        model = PeftModel.from_pretrained(model, folder, adapter_name=name)
torch.manual_seed(0)
for name, (adapters, weights, options) in work["jobs"].items():
    start = time.perf_counter()
    model.add_weighted_adapter(adapters, weights, name, **options)
    seconds = time.perf_counter() - start
    model.save_pretrained(out, selected_adapters=[name])
    (out / name / "seconds").write_text(str(seconds))
"""


@dataclass(frozen=True)
class Comparison:
    """One method with its options in loralens and in PEFT, and the exact answer that results are compared with."""

    method: str
    weights: tuple[float, float]
    ours: dict[str, list[str]]
    theirs: dict[str, dict[str, object]]
    adapters: tuple[str, str] = ("one", "two")
    density: float = 1.0

    def exact(self, pair: Path) -> judge.Matrices:
        """The exact result of the method, in dense float64."""
        adapters = [pair / name for name in self.adapters]
        return judge.ties(adapters, self.density) if self.method == "ties" else judge.weighted(adapters, self.weights)

    def commands(self, pair: Path, folder: Path) -> dict[str, list[str]]:
        """The command line of loralens for each entry of ``ours``."""
        pairs = [f"{pair / name}:{weight}" for name, weight in zip(self.adapters, self.weights, strict=True)]
        start = [str(Path(sys.executable).with_name("loralens")), "combine", *pairs, "--method", self.method]
        return {n: [*start, *told, "-o", str(folder / n), "--overwrite", "--json"] for n, told in self.ours.items()}

    def jobs(self) -> dict[str, object]:
        """The arguments of PEFT's call for each entry of ``theirs``."""
        return {name: (self.adapters, self.weights, options) for name, options in self.theirs.items()}


CUT, SVD, KEPT = ["--rank", str(RANK)], {"svd_rank": RANK}, 0.5
UNEQUAL, EQUAL, SOME = (0.7, 0.3), (1.0, 1.0), ["--density", str(KEPT)]
SUM, TIES, DARE, RSLORA = COMPARISONS = (
    Comparison(
        "sum",
        UNEQUAL,
        {"loralens": [], "loralens_cut": CUT},
        {
            "peft_cat": {"combination_type": "cat"},
            "peft_linear": {"combination_type": "linear"},
            "peft_svd": {"combination_type": "svd", **SVD},
            "peft_svd_thin": {"combination_type": "svd", "svd_full_matrices": False, **SVD},
        },
    ),
    Comparison(
        "ties",
        EQUAL,
        {"loralens_ties": [*SOME, "--set", "whole=0"], "loralens_ties_cut": [*SOME, "--set", "whole=0", *CUT]},
        {
            "peft_ties": {"combination_type": "ties", "density": KEPT},
            "peft_ties_svd": {"combination_type": "ties_svd", "density": KEPT, **SVD},
        },
        density=KEPT,
    ),
    Comparison(
        "dare",
        UNEQUAL,
        {"loralens_dare": SOME, "loralens_dare_cut": [*SOME, *CUT]},
        {
            "peft_dare_linear": {"combination_type": "dare_linear", "density": KEPT},
            "peft_dare_linear_svd": {"combination_type": "dare_linear_svd", "density": KEPT, **SVD},
        },
        density=KEPT,
    ),
    Comparison(
        "sum",
        UNEQUAL,
        {"loralens_rslora": []},
        {"peft_rslora_cat": {"combination_type": "cat"}},
        adapters=("one-rslora", "two-rslora"),
    ),
)


def run(data: Path, *, runs: int) -> dict[str, object]:
    """Times, peaks and errors of each method, for the model and adapters of `synthetic_pair` in ``data``."""
    subprocess.run([sys.executable, "-m", "benchmarks.synthetic_pair", str(data / "pair")], check=True)
    with TemporaryDirectory(dir=data) as folder:
        return compare(data / "pair", Path(folder), runs=runs)


def compare(pair: Path, folder: Path, *, runs: int) -> dict[str, object]:
    """The same as `run`, for the files in ``pair``, with results in ``folder``."""
    commands = {name: command for one in COMPARISONS for name, command in one.commands(pair, folder).items()}
    report: dict[str, object] = {"density": KEPT}
    cut = {name: command for name, command in commands.items() if name.endswith("_cut")}
    figures = alternate(cut, runs=runs)
    report["whole_processes"] = {name: figure.record() for name, figure in figures.items()}
    for name in commands.keys() - cut.keys():
        once(commands[name])
    if find_spec("peft"):
        once(peft_process(pair, folder, {name: job for one in COMPARISONS for name, job in one.jobs().items()}))
    else:
        report["peft"] = "not measured: peft is not installed"
    for title, one in zip(("sum", "ties", "dare", "sum_of_rslora"), COMPARISONS, strict=True):
        exact = one.exact(pair)
        found = {name: _record(folder / name, exact) for name in (*one.ours, *one.theirs) if (folder / name).exists()}
        report[title] = {
            "weights": one.weights,
            "least_error_of_rank_16": _short(judge.least_error(exact, RANK)),
            **found,
        }
    return report


def _record(out: Path, exact: judge.Matrices) -> dict[str, object]:
    """Rank, error and strength of one result."""
    took = out / "seconds"
    found, rank = judge.updates(out), next(iter(judge.factors(out).values()))[1].shape[0]
    report: dict[str, object] = {"seconds_of_the_call": round(float(took.read_text()), 3)} if took.exists() else {}
    far, strong = judge.error(found, exact), judge.strength(found, exact)
    return report | {"rank": rank, "error": _short(far), "strength": _short(strong)}


def peft_process(pair: Path, folder: Path, jobs: dict[str, object]) -> list[str]:
    """A command that combines adapters with PEFT, and saves the result of each job under its name in ``folder``."""
    needed = {name for one in COMPARISONS if one.jobs().keys() & jobs.keys() for name in one.adapters}
    work = {"adapters": {name: str(pair / name) for name in sorted(needed)}, "jobs": jobs}
    return [sys.executable, "-c", PEFT, str(pair / "base"), str(folder), json.dumps(work)]


def _short(figure: float) -> float:
    return float(f"{figure:.4g}")
