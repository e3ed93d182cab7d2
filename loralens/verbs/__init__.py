"""The verbs: everything that the tool can do, for Python and for the command line.

A verb takes paths or objects, reads, calls the rooms below, writes to the given path, and returns a result. Its command
is derived from its signature and its text.
"""

__all__ = ["COMMANDS", "VERBS"]

# Group → command → its line in ``loralens --help``, in the order in which a newcomer needs them. Every command is a
# verb, except `demo`, which runs the others as a shell does, and `fleet`, whose sub-commands are methods of `Fleet`.
GROUPS = {
    "Look": {
        "demo": "Run the main commands once, on real weights: a first command for newcomers.",
        "inspect": "Show what is in an adapter file, and how it was understood.",
        "doctor": "Examine adapters for faults, and say how to fix them.",
        "spectrum": "Show the singular values of ΔW, and the ranks and norms that follow from them.",
        "report": "Write one page about adapters, to read and to send.",
        "survey": "List the adapters under a folder, each with a verdict; write a gallery of them.",
        "fleet": "Index thousands of adapters, and search and group them.",
        "schema": "Print the JSON Schema of what a command prints with --json.",
    },
    "Compare": {
        "similarity": "Compare the directions of adapters: φ(i, j), cosines and angles, with their chance levels.",
        "equal": "Test whether two adapters are the same update.",
        "trajectory": "Follow one run through its checkpoints.",
    },
    "Against the base": {
        "amplify": "Show how strongly ΔW amplifies W, compared with random and top directions.",
        "intruders": "Find singular vectors of W + ΔW that W does not have.",
    },
    "Make smaller": {
        "compress": "Make an adapter smaller, and measure the error of that.",
        "curve": "Show the file size and the error at every rank, before anything is written.",
        "calibrate": "Measure the second moments of real inputs, for compress --activations.",
    },
    "Combine": {
        "combine": "Combine several adapters into one: exact sums, and the methods of the literature.",
        "scale": "Change the strength of an adapter, everywhere or in some modules.",
        "negate": "Change the sign of an adapter, everywhere or in some modules.",
        "subtract": "Subtract one adapter from another, exactly.",
        "interpolate": "Write a point on the line between two adapters, exactly.",
        "drop": "Leave out modules of an adapter.",
    },
    "Into a model, and into other programs": {
        "merge": "Merge adapters into a base model, with a certificate and an undo patch.",
        "unmerge": "Restore the base from a merged model, bit for bit.",
        "verify": "Test whether a merged model holds an adapter, and how faithfully.",
        "extract": "Make an adapter from two models: of a full fine-tune, or of a merge.",
        "convert": "Write an adapter in another dialect, with its names and scales.",
    },
    "On servers": {
        "prove": "Prove that a server applies an adapter: at its strength, and in all of its modules.",
        "served": "List what a server has: bases, adapters with their scales, and its largest rank.",
    },
    "Train": {
        "train": "Train LoRA layers on texts: adapters to study, and to use.",
        "evaluate": "Measure a model on held-out texts, with each of several adapters.",
        "behave": "Show what adapters do to a model's outputs on real inputs.",
        "explain": "Show what an adapter learned: words that it makes more likely in any text.",
    },
}
COMMANDS = {name: line for group in GROUPS.values() for name, line in group.items()}
VERBS = [name for name in COMMANDS if name not in ("demo", "fleet")]
