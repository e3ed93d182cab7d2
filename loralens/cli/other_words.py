"""The commands that newcomers mean by the words of other tools, and what is said about a word that is not a command."""

import os
from difflib import get_close_matches

from loralens.cli.overview import COMMANDS

# Command → words by which other tools, and people, call it. A word stands once, since it can be answered with one
# command only; `ALSO` names the second one where a word has two meanings.
SAID_FOR = {
    "inspect": "info show view cat open print read keys header metadata describe summary details dump head load "
    "stat stats file get look peek see what display trigger triggers trigger-words triggerwords trigger-word words "
    "keywords tags tag prompt",
    "doctor": "check lint validate diagnose test health examine audit debug fix repair verify-adapter sanity problems",
    "spectrum": "svd rank ranks singular singular-values spectra eigen effective-rank analyze analyse analysis norm "
    "norms energy",
    "report": "plot html page figure figures graph chart draw visualize visualise export-html dashboard",
    "survey": "scan find folder dir duplicates dedupe batch walk list ls",
    "fleet": "fleets index search near nearest neighbours neighbors registry catalogue catalog database collection "
    "copies families clusters cluster",
    "similarity": "compare comparison sim similar overlap cosine distance subspace phi cka angles correlation between",
    "equal": "diff same eq equals identical cmp equality",
    "trajectory": "checkpoints steps history run progress timeline",
    "amplify": "amplification base-compare table7",
    "intruders": "intruder forgetting",
    "compress": "shrink resize reduce truncate prune small smaller cut lower-rank low-rank svd-compress "
    "quantize quantise quant minify optimize optimise squeeze",
    "curve": "tradeoff trade-off sweep pareto sizes choose-rank",
    "calibrate": "calibration activations moments",
    "combine": "merge-adapters merge-loras merge-lora add sum average mix blend ties dare soup concat join "
    "add-adapters lora-merge weighted mean arithmetic stack svd-merge",
    "scale": "strength multiply weight mul alpha set-alpha set-scale",
    "negate": "invert unlearn negative minus flip",
    "subtract": "sub difference remove-adapter",
    "interpolate": "lerp slerp between-two line",
    "drop": "remove delete exclude filter select only rm keep del block-weight lbw",
    "merge": "fuse apply bake fold merge-and-unload into-base merge-base integrate",
    "unmerge": "unfuse restore undo revert unload",
    "verify": "proof certify certificate confirm check-merge",
    "extract": "diff-models from-models lora-extract extract-lora decompose svd-extract mergekit-extract-lora",
    "convert": "export format transform translate to-peft to-kohya to-gguf gguf peft kohya diffusers comfyui mlx "
    "rename save write",
    "train": "finetune fine-tune fit tune learn sft training",
    "evaluate": "eval score accuracy benchmark bench perplexity ppl",
    "behave": "behaviour behavior outputs kl logits generate infer inference predict chat",
    "demo": "example tutorial quickstart start tour try hello init",
}
VERB_OF = {word: verb for verb, words in SAID_FOR.items() for word in words.split()}
# Words for which one command is not the whole answer.
ALSO = {
    "plot": "; spectrum, similarity, amplify, curve and trajectory draw one figure with --plot FILE",
    "merge-adapters": "; to fold adapters into a base model, loralens merge",
    "diff": "; how much they share: loralens similarity",
    "list": "; what is in one of them: loralens inspect",
    "ls": "; what is in one of them: loralens inspect",
    "save": "; loralens combine and compress write what they make with -o",
}
# Words that ask for an option of the group.
OPTION_OF = {"help": "--help", "usage": "--help", "commands": "--help", "version": "--version"}
# Questions that no command answers.
ANSWER_OF = {
    **dict.fromkeys(("cite", "citation", "bibtex"), "CITATION.cff in the repository says how to cite loralens"),
    **dict.fromkeys(
        ("glossary", "explain", "legend", "columns", "meaning"),
        "--verbose says below a table what its columns mean; GLOSSARY.md has every word",
    ),
    **dict.fromkeys(
        ("latex", "tex", "pandas", "dataframe", "frame"),
        "in Python every result has to_latex() and to_frame(): print(loralens.spectrum(…).to_latex())",
    ),
    "csv": "spectrum, similarity and most commands print CSV with --csv",
}
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".npz", ".ckpt", ".json")


def on_unknown(word: str, following: str = "") -> str:
    """One sentence about a first word that is neither a command nor an existing path; it names what was meant.

    ``following`` is the second word: ``help spectrum`` asks for the help of a command.
    """
    # `Merge-Adapters`, `merge_adapters` and `merge-adapters` are one word to people.
    plain = word.lower().strip("-").replace("_", "-")
    if option := OPTION_OF.get(plain):
        verb = _verb_for(following) if option == "--help" and following else None
        return f"{word!r} is not a command: type loralens {f'{verb} ' if verb else ''}{option}"
    if answer := ANSWER_OF.get(plain):
        return f"{word!r} is not a command: {answer}"
    if "/" in word or os.sep in word or word.lower().endswith(SUFFIXES):
        # A Hub id and a path look alike, and only the readers know how to find the first.
        hub = f"; of a Hub id, type loralens inspect {word}" if word.count("/") == 1 and word[0] not in "./~" else ""
        return f"{word!r} is not an existing file or folder{hub}"
    if verb := _verb_for(plain):
        answer = f"{word!r} is not a command; for that there is loralens {verb} ({COMMANDS[verb].rstrip('.')})"
        return answer + ALSO.get(plain, "")
    return f"{word!r} is neither a command nor an existing file: loralens --help lists the commands"


def _verb_for(word: str) -> str | None:
    """The command that a word stands for, or the one that it misspells."""
    if word in COMMANDS:
        return word
    if word in VERB_OF:
        return VERB_OF[word]
    # 0.75 accepts one wrong or missing letter of a word of five, and no other word of the table.
    near = get_close_matches(word, [*COMMANDS, *VERB_OF], n=1, cutoff=0.75)
    return VERB_OF.get(near[0], near[0]) if near else None
