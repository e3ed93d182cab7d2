"""What is added to click's message about wrong usage where it is known what was meant."""

import re
from collections.abc import Callable

import click

# The words by which people call the dialects of --to.
DIALECT_OF = {
    word: dialect
    for dialect, words in {
        "kohya": "a1111 automatic1111 webui forge sd-scripts sdscripts civitai fooocus invoke invokeai sd",
        "comfyui": "comfy comfy-ui",
        "diffusers": "diffuser huggingface-diffusers",
        "peft": "hf huggingface transformers vllm safetensors",
        "mlx": "mlx-lm apple",
        "gguf": "llama.cpp llamacpp ollama llama-cpp",
    }.items()
    for word in words.split()
}
# The words by which people call the programs of --for.
CONSUMER_OF = {
    **dict.fromkeys(("kohya", "a1111", "automatic1111", "webui", "forge", "sdscripts", "sd", "fooocus"), "sd-scripts"),
    **dict.fromkeys(("comfy", "comfy-ui"), "comfyui"),
    **dict.fromkeys(("ollama", "llamacpp", "llama-cpp", "lm-studio"), "llama.cpp"),
    **dict.fromkeys(("transformers", "hf"), "peft"),
}
# The words by which people call options of ours. The first option after a word that the command has is meant.
OPTIONS_OF = {
    word: options.split()
    for options, words in {
        "--block": "--blocks --layer --layers --depth --block-range",
        "--modules": "--module --include --filter --only --match --target-modules --target-module --pattern --names",
        "--figure-dpi": "--dpi --resolution",
        "--figure-size": "--size --figsize --fig-size --width --height",
        "--figure-title": "--title",
        "--plot": "--figure --fig --image --png --pdf --svg --chart --graph --draw --save-plot --savefig",
        "--output --plot": "--out --output --save --save-to --write --outfile --out-file --file -o",
        "--base": "--model --base-model --base_model",
        "--watch": "--spectra",
        "--quiet": "--silent --brief --short",
        "--verbose": "--all --full --long --explain --legend --describe --columns",
        "--top": "--limit --head --max-rows --first",
    }.items()
    for word in words.split()
}
# Files of torch are read without running code in them, so there is nothing to allow.
NOT_NEEDED = ("--allow-pickle", "--pickle", "--unsafe", "--trust")
# What only the Python function has.
METHODS_OF = {
    **dict.fromkeys(("--latex", "--tex", "--tabular"), "to_latex"),
    **dict.fromkeys(("--pandas", "--dataframe", "--df", "--frame", "--parquet", "--excel"), "to_frame"),
}
_COMMA = re.compile(r"[+-]?\d+,\d+")
_PERCENT = re.compile(r"[+-]?\d+(?:[.,]\d+)? ?%")


def hint(error: click.UsageError) -> str:
    """A sentence on what was probably meant; empty if nothing is known."""
    return next((text for guess in _GUESSES if (text := guess(error))), "")


def _other_number(error: click.UsageError) -> str:
    """A decimal comma, or a percentage."""
    quoted = _first_quoted(error)
    if not isinstance(error, click.BadParameter) or not isinstance(
        getattr(error.param, "type", None), click.types.FloatParamType
    ):
        return ""
    if _COMMA.fullmatch(quoted):
        return f"numbers have a point: {quoted.replace(',', '.')}"
    if _PERCENT.fullmatch(quoted):
        return f"give the share as a number: {float(quoted.rstrip(' %').replace(',', '.')) / 100:g}"
    return ""


def _other_dialect(error: click.UsageError) -> str:
    """The name of a program in place of the dialect that it reads, or of a program that reads the same."""
    if not isinstance(error, click.BadParameter):
        return ""
    word = _first_quoted(error)
    name = getattr(error.param, "name", None)
    option, other_words = {"to": ("--to", DIALECT_OF), "consumer": ("--for", CONSUMER_OF)}.get(str(name), ("", {}))
    choices = getattr(getattr(error.param, "type", None), "choices", ())
    meant = word.lower() if word.lower() in choices else other_words.get(word.lower().replace("_", "-"))
    return f"for {word} there is {option} {meant}" if meant else ""


def _other_option(error: click.UsageError) -> str:
    """The name of an option in another tool, or something that only the function in Python does."""
    if not isinstance(error, click.NoSuchOption) or error.ctx is None:
        return ""
    word, command = error.option_name, error.ctx.command
    named = {name for param in command.params for name in (*param.opts, *param.secondary_opts)}
    meant = next((option for option in OPTIONS_OF.get(word, ()) if option in named), None)
    if not meant and word not in (*METHODS_OF, *NOT_NEEDED):
        return ""
    # click would suggest options that look like the word, but mean something else.
    vars(error)["possibilities"] = None  # click declares it as final for type checkers
    if meant:
        return f"for that there is {meant}"
    if word in NOT_NEEDED:
        return "it is no longer needed: leave it out"
    return f"in Python: loralens.{command.name}(…).{METHODS_OF[word]}()"


def _merge_without_base(error: click.UsageError) -> str:
    """Most tools call it merging when adapters are added to each other."""
    missing = isinstance(error, click.MissingParameter) and getattr(error.param, "name", None) == "base"
    if missing and error.ctx is not None and error.ctx.command.name == "merge":
        return "to make one adapter of several there is loralens combine; merge writes them into a base model"
    return ""


def _first_quoted(error: click.UsageError) -> str:
    quoted = re.search(r"'([^']*)'", error.message)
    return quoted[1] if quoted else ""


_GUESSES: tuple[Callable[[click.UsageError], str], ...] = (
    _other_number,
    _other_dialect,
    _other_option,
    _merge_without_base,
)
