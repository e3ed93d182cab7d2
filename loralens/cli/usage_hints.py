"""What is said about wrong words: the command, the option or the value that was probably meant."""

import os
import re
from collections.abc import Sequence
from difflib import get_close_matches

import click

from loralens.verbs import COMMANDS

# Our commands, options and values, and the words by which other tools call them.
WORDS = {
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
    "--block": "--layers --layer --blocks",
    "--modules": "--include --filter --only --target-modules",
    "--figure-dpi": "--dpi",
    "--figure-size": "--figsize",
    "--output": "--out --save",
    "--plot": "--out --save -o --png --pdf",
    "--base": "--model --base-model",
    "--top": "--limit --head",
    "kohya": "a1111 webui forge",
    "sd-scripts": "a1111 webui forge kohya",
    "comfyui": "comfy",
    "peft": "hf huggingface transformers",
    "gguf": "llama.cpp ollama",
    "llama.cpp": "ollama gguf",
}
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".npz", ".ckpt", ".json")


def _meant(word: str, ours: Sequence[str]) -> str | None:
    """The one of our words that other tools call by this word."""
    return next((each for each in WORDS if each in ours and word in WORDS[each].split()), None)


def on_unknown(word: str, following: str = "") -> str:
    """One sentence about a first word that is neither a command nor an existing path; it names what was meant.

    ``following`` is the second word: ``help spectrum`` asks for the help of a command.
    """
    # `Merge-Adapters`, `merge_adapters` and `merge-adapters` are one word to people.
    plain = word.lower().strip("-").replace("_", "-")
    if plain in ("help", "version"):
        command = f"{following} " if plain == "help" and following in COMMANDS else ""
        return f"{word!r} is not a command: type loralens {command}--{plain}"
    if "/" in word or os.sep in word or word.lower().endswith(SUFFIXES):
        # A Hub id and a path look alike, and only the readers know how to find the first.
        hub = f"; of a Hub id, type loralens inspect {word}" if word.count("/") == 1 and word[0] not in "./~" else ""
        return f"{word!r} is not an existing file or folder{hub}"
    # 0.75 accepts one wrong or missing letter of a word of five.
    near = _meant(plain, [*COMMANDS]) or next(iter(get_close_matches(plain, COMMANDS, 1, 0.75)), None)
    if near:
        return f"{word!r} is not a command; for that there is loralens {near} ({COMMANDS[near].rstrip('.')})"
    return f"{word!r} is neither a command nor an existing file: loralens --help lists the commands"


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
        meant = _meant(error.option_name, [name for param in error.ctx.command.params for name in param.opts])
        if meant:
            # click would suggest options that look like the word, but mean something else.
            vars(error)["possibilities"] = None  # click declares it as final for type checkers
        return f"for that there is {meant}" if meant else ""
    words = [name for param in error.ctx.command.params for name in param.opts] if error.ctx else []
    if error.message.startswith("Got unexpected extra argument") and "--fleet" in words:
        return "the index, or the folder that holds it, is given as --fleet DIR"
    if error.ctx and isinstance(error.ctx.command, click.Group) and error.message.startswith("No such command"):
        near = get_close_matches(error.message.split("'")[1], error.ctx.command.list_commands(error.ctx), 1)
        return f"the nearest command is {near[0]}" if near else ""
    quoted, param = re.search(r"'([^']*)'", error.message), getattr(error, "param", None)
    if isinstance(error, click.BadParameter) and param and quoted:
        word, choices = quoted[1].lower(), getattr(param.type, "choices", ())
        if isinstance(param.type, click.types.FloatParamType) and re.fullmatch(r"[+-]?\d+,\d+", word):
            return f"numbers have a point: {word.replace(',', '.')}"
        if meant := word if word in choices else _meant(word, choices):
            return f"for {quoted[1]} there is {param.opts[-1]} {meant}"
    return ""
