"""What is said about wrong words: the command, the option or the value that was probably meant."""

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click

from loralens.tables.numbers import join_words
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


NEAR = 4  # words that are offered for a wrong one


def _meant(word: str, ours: Sequence[str]) -> str | None:
    """The one of our words that other tools call by this word."""
    return next((each for each in WORDS if each in ours and word in WORDS[each].split()), None)


def near_words(word: str, ours: Sequence[str]) -> list[str]:
    """Those of our words that a wrong one may stand for: what other tools call so, longer words, and similar ones."""
    called = [each for each in WORDS if each in ours and word in WORDS[each].split()]
    # Two letters begin too many words. 0.75 accepts one wrong or missing letter of a word of five.
    begun = [each for each in ours if len(word) > 2 and each.startswith(word)]
    return list(dict.fromkeys([*called, *begun, *get_close_matches(word, ours, NEAR, 0.75)]))[:NEAR]


def on_unknown(word: str, following: str = "") -> tuple[str, str]:
    """What is wrong with a first word that is neither a command nor an existing path, and advice, which may be empty.

    ``following`` is the second word: ``help spectrum`` asks for the help of a command.
    """
    # `Merge-Adapters`, `merge_adapters` and `merge-adapters` are one word to people.
    plain = word.lower().strip("-").replace("_", "-")
    if plain in ("help", "version"):
        command = f"{following} " if plain == "help" and following in COMMANDS else ""
        return f"{word!r} is not a command: type loralens {command}--{plain}", ""
    if "/" in word or os.sep in word or word.lower().endswith(SUFFIXES):
        from loralens.formats.files.location import nearest_names  # only when something is wrong

        # A Hub id and a path look alike, and only the readers know how to find the first.
        hub = f"; of a Hub id, type loralens inspect {word}" if word.count("/") == 1 and word[0] not in "./~" else ""
        return f"{word!r} is not an existing file or folder{hub}", nearest_names(Path(word))
    if near := near_words(plain, [*COMMANDS]):
        listed = ", or ".join(f"loralens {name} ({COMMANDS[name].rstrip('.')})" for name in near)
        return f"{word!r} is not a command; for that there is {listed}", ""
    return f"{word!r} is neither a command nor an existing file: loralens --help lists the commands", ""


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
    """A sentence on what was probably meant; for wrong options without one, where they are explained."""
    if fix := getattr(error, "fix", ""):
        return str(fix)
    words = [name for param in error.ctx.command.params for name in param.opts] if error.ctx else []
    usage = f"`{error.ctx.command_path} --help` explains the options" if error.ctx else ""
    if isinstance(error, click.NoSuchOption):
        if meant := _meant(error.option_name, words):
            return f"for that there is {meant}"
        near = error.possibilities or []
        return f"the nearest option{'s are' if len(near) > 1 else ' is'} {', '.join(near)}" if near else usage
    if error.message.startswith("Got unexpected extra argument"):
        return "the index, or the folder that holds it, is given as --fleet DIR" if "--fleet" in words else usage
    if error.ctx and isinstance(error.ctx.command, click.Group) and error.message.startswith("No such command"):
        near = near_words(error.message.split("'")[1], error.ctx.command.list_commands(error.ctx))
        return f"the nearest command{'s are' if len(near) > 1 else ' is'} {', '.join(near)}" if near else usage
    quoted, param = re.search(r"'([^']*)'", error.message), getattr(error, "param", None)
    if isinstance(error, click.BadParameter) and param and quoted:
        word, choices = quoted[1].lower(), getattr(param.type, "choices", ())
        if isinstance(param.type, click.types.FloatParamType) and re.fullmatch(r"[+-]?\d+,\d+", word):
            return f"numbers have a point: {word.replace(',', '.')}"
        if meant := word if word in choices else _meant(word, choices):
            return f"for {quoted[1]} there is {param.opts[-1]} {meant}"
    return ""


def missing_parameters(
    missing: Sequence[click.Parameter], given: Mapping[str, Any], ctx: click.Context
) -> click.UsageError:
    """The message about everything that a command lacks; of a base it says which one the adapter was trained on."""
    names = {
        "argument": [param.make_metavar(ctx) for param in missing if isinstance(param, click.Argument)],
        "option": [
            param.opts[0] if param.name == "output" else param.opts[-1]
            for param in missing
            if isinstance(param, click.Option)
        ],
    }
    parts = [
        f"{word}{'s' * (len(each) > 1)} {join_words([repr(name) for name in each])}"
        for word, each in names.items()
        if each
    ]
    fixes = []
    for param in missing:
        if param.name == "output":
            fixes.append("say where to write with -o, or give --dry-run")
        elif param.name == "base" and (base := _base_of(given)):
            fixes.append(f"give --base, the folder or Hub id of the model: the adapter was trained on {base}")
    error = click.UsageError(f"missing {' and '.join(parts)}", ctx=ctx)
    vars(error)["fix"] = "; ".join(fixes) or f"`{ctx.command_path} --help` shows how it is called"
    return error


def _base_of(given: Mapping[str, Any]) -> str:
    """The base that the first adapter names among the values of a command; empty if none does."""
    value = next((value for name in ("adapters", "adapter") if (value := given.get(name))), None)
    path = value[0] if isinstance(value, tuple | list) else value
    # Whatever is wrong with the adapter, the message is about the option.
    with suppress(Exception):
        from loralens import load

        return (
            load(str(path).rpartition(":")[0] if not Path(str(path)).exists() else str(path), strict=False).base_model
            or ""
        )
    return ""
