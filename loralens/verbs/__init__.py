"""The verbs: everything that the tool can do, one function per file, for Python and for the command line.

A verb takes paths or objects, reads, calls the rooms below, writes to the given path, and returns a result. `VERBS`
is the table of them: the command of the same name has the same options.
"""

VERBS = {
    "inspect": "Show what is in an adapter file, and how it was understood.",
    "convert": "Write an adapter in another dialect, with its names and scales.",
    "equal": "Test whether two adapters are the same update.",
    "spectrum": "Show the singular values of ΔW, and the ranks and norms that follow from them.",
    "similarity": "Compare the directions of adapters: φ(i, j), cosines and angles, with their chance levels.",
    "trajectory": "Follow one run through its checkpoints.",
    "survey": "List the adapters under a folder, and name duplicates.",
    "amplify": "Show how strongly ΔW amplifies W, compared with random and top directions.",
    "intruders": "Find singular vectors of W + ΔW that W does not have.",
    "doctor": "Examine adapters for faults, and say how to mend them.",
    "compress": "Make an adapter smaller, and measure the error of that.",
    "curve": "Show the file size and the error at every rank, before anything is written.",
    "calibrate": "Measure the second moments of real inputs, for compress --activations.",
    "combine": "Combine several adapters into one: exact sums, and the methods of the literature.",
    "negate": "Change the sign of an adapter, everywhere or in some modules.",
    "scale": "Change the strength of an adapter, everywhere or in some modules.",
    "subtract": "Subtract one adapter from another, exactly.",
    "interpolate": "Write a point on the line between two adapters, exactly.",
    "drop": "Leave out modules of an adapter.",
    "merge": "Merge adapters into a base model, with a certificate and an undo patch.",
    "unmerge": "Restore the base from a merged model, bit for bit.",
    "verify": "Test whether a merged model holds an adapter, and how faithfully.",
    "extract": "Make an adapter from two models: of a full fine-tune, or of a merge.",
    "report": "Write one page about adapters, to read and to send.",
    "train": "Train LoRA layers on texts: adapters to study, and to use.",
    "evaluate": "Measure a model on held-out texts, with each of several adapters.",
    "behave": "Show what adapters do to a model's outputs on real inputs.",
}

# The module of each verb, and that of `plot`.
MODULES = {
    "inspect": "spectra.inspect",
    "convert": "files.convert",
    "equal": "comparisons.equal",
    "spectrum": "spectra.spectrum",
    "similarity": "comparisons.similarity",
    "trajectory": "comparisons.trajectory",
    "survey": "pages.survey",
    "amplify": "spectra.amplify",
    "intruders": "spectra.intruders",
    "doctor": "spectra.doctor",
    "compress": "sizes.compress",
    "curve": "sizes.curve",
    "calibrate": "sizes.calibrate",
    "combine": "combinations.combine",
    "negate": "combinations.linear",
    "scale": "combinations.linear",
    "subtract": "combinations.linear",
    "interpolate": "combinations.linear",
    "drop": "combinations.drop",
    "merge": "merges.merge",
    "unmerge": "merges.unmerge",
    "verify": "merges.verify",
    "extract": "merges.extract",
    "report": "pages.report",
    "train": "runs.train",
    "evaluate": "runs.evaluate",
    "behave": "runs.behave",
    "plot": "pages.plot",
}


def __dir__() -> list[str]:
    """The table of the verbs, and their modules."""
    return sorted(["VERBS", "plot", *VERBS])
