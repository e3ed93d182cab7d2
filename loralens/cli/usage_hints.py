"""What is said about wrong words: the command, the option or the value that was probably meant."""

import os
import re
from collections.abc import Sequence

import click

from loralens.verbs import COMMANDS

# The words of other tools that are unlike ours: for commands, options, and values of --to and --for.
COMMAND_OF = {
    word: command
    for command, words in {
        "inspect": "info show view cat header metadata",
        "doctor": "check lint validate test",
        "spectrum": "svd rank analyze",
        "report": "plot html",
        "survey": "list ls find scan",
        "similarity": "compare cosine",
        "equal": "diff same",
        "compress": "shrink resize prune quantize",
        "combine": "merge-adapters merge-loras add average ties dare",
        "scale": "strength",
        "merge": "fuse bake apply merge-and-unload",
        "extract": "extract-lora svd-extract",
        "convert": "export save",
        "train": "finetune fine-tune",
        "evaluate": "eval perplexity",
    }.items()
    for word in words.split()
}
OPTION_OF = {
    word: options.split()
    for options, words in {
        "--block": "--layers --layer --blocks",
        "--modules": "--include --filter --only --target-modules",
        "--figure-dpi": "--dpi",
        "--figure-size": "--figsize --size",
        "--output --plot": "--out --save -o",
        "--base": "--model --base-model",
        "--quiet": "--silent",
        "--verbose": "--all",
        "--top": "--limit --head",
    }.items()
    for word in words.split()
}
VALUE_OF = {
    "to": {"a1111": "kohya", "webui": "kohya", "comfy": "comfyui", "hf": "peft", "llama.cpp": "gguf", "ollama": "gguf"},
    "consumer": {"a1111": "sd-scripts", "kohya": "sd-scripts", "comfy": "comfyui", "ollama": "llama.cpp", "hf": "peft"},
}
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".npz", ".ckpt", ".json")
_COMMA = re.compile(r"[+-]?\d+,\d+")
_PERCENT = re.compile(r"[+-]?\d+(?:[.,]\d+)? ?%")


def on_unknown(word: str, following: str = "") -> str:
    """One sentence about a first word that is neither a command nor an existing path; it names what was meant.

    ``following`` is the second word: ``help spectrum`` asks for the help of a command.
    """
    # `Merge-Adapters`, `merge_adapters` and `merge-adapters` are one word to people.
    plain = word.lower().strip("-").replace("_", "-")
    if plain in ("help", "version"):
        command = _nearest(following) if plain == "help" and following else None
        return f"{word!r} is not a command: type loralens {f'{command} ' if command else ''}--{plain}"
    if "/" in word or os.sep in word or word.lower().endswith(SUFFIXES):
        # A Hub id and a path look alike, and only the readers know how to find the first.
        hub = f"; of a Hub id, type loralens inspect {word}" if word.count("/") == 1 and word[0] not in "./~" else ""
        return f"{word!r} is not an existing file or folder{hub}"
    if command := _nearest(plain):
        return f"{word!r} is not a command; for that there is loralens {command} ({COMMANDS[command].rstrip('.')})"
    return f"{word!r} is neither a command nor an existing file: loralens --help lists the commands"


def _nearest(word: str) -> str | None:
    """The command that a word stands for, or the one that it misspells."""
    # Imported here because difflib takes long to import, and only this answer needs it.
    from difflib import get_close_matches

    # 0.75 accepts one wrong or missing letter of a word of five, and no other word of the table.
    near = get_close_matches(word, [*COMMANDS, *COMMAND_OF], n=1, cutoff=0.75)
    return COMMAND_OF.get(near[0], near[0]) if near else None


def check_dashes(command: click.Command, words: Sequence[str], ctx: click.Context) -> None:
    """Refuse a long option after one dash, which click would take for a short one, and a short one with ``=``.

    Raises
    ------
    UsageError
        A word is such an option; the message says how it is written.
    """
    names = {name for param in command.params for name in (*param.opts, *param.secondary_opts)}
    for word in words:
        # Words after this one are not options.
        if word == "--":
            return
        option, equals, value = word.partition("=")
        if not option.startswith("-") or option.startswith("--"):
            continue
        # Two letters are a short option, and perhaps its value.
        if len(option) > 2 and f"-{option}" in names:
            raise click.UsageError(f"{option} has two dashes: -{word}", ctx=ctx)
        if equals and option in names:
            raise click.UsageError(f"{word} has no =: write {option} {value}", ctx=ctx)


def hint(error: click.UsageError) -> str:
    """A sentence on what was probably meant; empty if nothing is known."""
    if isinstance(error, click.NoSuchOption) and error.ctx:
        named = {name for param in error.ctx.command.params for name in param.opts}
        meant = next((option for option in OPTION_OF.get(error.option_name, ()) if option in named), None)
        if meant:
            # click would suggest options that look like the word, but mean something else.
            vars(error)["possibilities"] = None  # click declares it as final for type checkers
        return f"for that there is {meant}" if meant else ""
    param = getattr(error, "param", None)
    if (
        isinstance(error, click.MissingParameter)
        and error.ctx
        and (error.ctx.command.name, param and param.name)
        == (
            "merge",
            "base",
        )
    ):
        # Most tools call it merging when adapters are added to each other.
        return "to make one adapter of several there is loralens combine; merge writes them into a base model"
    quoted = re.search(r"'([^']*)'", error.message)
    if not isinstance(error, click.BadParameter) or not param or not quoted:
        return ""
    word = quoted[1]
    if isinstance(param.type, click.types.FloatParamType):
        if _COMMA.fullmatch(word):
            return f"numbers have a point: {word.replace(',', '.')}"
        if _PERCENT.fullmatch(word):
            return f"give the share as a number: {float(word.rstrip(' %').replace(',', '.')) / 100:g}"
    choices, lower = getattr(param.type, "choices", ()), word.lower()
    value = lower if lower in choices else VALUE_OF.get(str(param.name), {}).get(lower)
    return f"for {word} there is {'--to' if param.name == 'to' else '--for'} {value}" if value and choices else ""
