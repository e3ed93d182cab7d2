"""Arguments: how the command line spells what a `Call` means. When verbs or options are renamed, this file follows."""

from tests.golden.call import OUT, Call
from tests.golden.sources import CORPUS

# What the table calls a verb: the words on the command line, where they are others.
VERBS: dict[str, list[str]] = {"": []}  # no verb: a path alone, or nothing

# What the table calls an option: the option, where it is not two dashes and the name with dashes.
OPTIONS = {"output": "-o", "modules": "-m", "consumer": "--for"}

# The same for single verbs: (verb, name in the table): option.
OPTIONS_OF: dict[tuple[str, str], str] = {}

# Verbs whose inputs are the values of an option, which is repeated before every value.
INPUTS = {"calibrate": "--adapter"}


def argument_list(call: Call, folder: str) -> list[str]:
    """The words behind ``loralens``; ``OUT`` at the beginning of a path becomes ``folder``."""
    words = [*VERBS.get(call.verb, [call.verb])]
    inputs = [_placed(value, folder) for value in call.inputs]
    option = INPUTS.get(call.verb)
    words += inputs if option is None else [word for value in inputs for word in (option, value)]
    options = dict(call.options)
    if options.get("data") == CORPUS:  # the files that `sources.copy_to` has written
        part = {"train": "train"}.get(call.verb, "test")
        options |= {"data": f"{CORPUS}/{CORPUS}.{part}.jsonl"}
        options |= {"eval": f"{CORPUS}/{CORPUS}.test.jsonl"} if part == "train" else {}
    for name, value in options.items():
        option = OPTIONS_OF.get((call.verb, name)) or OPTIONS.get(name) or f"--{name.replace('_', '-')}"
        if value is True:
            words.append(option)
            continue
        for part in value if isinstance(value, list | tuple) else [value]:
            words += [option, _placed(str(part), folder)]
    return words


def _placed(word: str, folder: str) -> str:
    return folder + word.removeprefix(OUT) if word == OUT or word.startswith(f"{OUT}/") else word
