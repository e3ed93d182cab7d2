"""The verbs: everything that the tool can do, one function a file, for Python and for the command line alike.

A verb takes paths or objects, reads, calls the rooms below, writes where it is told to, and returns a result. `VERBS`
is the table of them: the command of the same name has the same options.
"""

VERBS = {
    "inspect": "Say what is in an adapter file, and how it was understood.",
    "convert": "Write an adapter in another dialect, names and scale kept.",
    "equal": "Say whether two adapters are the same update.",
    "spectrum": "Show the singular values of ΔW, and the ranks and norms they imply.",
    "similarity": "Compare the directions of adapters: φ(i, j), cosines, angles, beside chance.",
    "trajectory": "Follow one run through its checkpoints.",
    "survey": "One line for each adapter under a folder, duplicates named.",
    "amplify": "Show what ΔW amplifies of W, beside random and top directions.",
    "intruders": "Find singular vectors of W + ΔW that W does not have.",
    "doctor": "Say what is wrong with an adapter, and how to mend it.",
    "compress": "Make an adapter smaller, and say what that cost.",
    "curve": "Show rank against size against error, before anything is written.",
    "calibrate": "Measure what real inputs excite, for compress --activations.",
    "combine": "Several adapters as one: exact sums, and the methods of the literature.",
    "negate": "Change the sign of an adapter, everywhere or in some modules.",
    "scale": "Change the strength of an adapter, everywhere or in some modules.",
    "subtract": "One adapter less another, exact.",
    "interpolate": "A point on the line between two adapters.",
    "drop": "Leave out modules of an adapter.",
    "merge": "Merge adapters into a base model, with proof of what arrived and a way back.",
    "unmerge": "Restore the base from a merged model, bit for bit.",
    "verify": "Say whether a merged model holds an adapter, and how faithfully.",
    "extract": "Make an adapter from two checkpoints: a full fine-tune, or a merge.",
    "report": "Put what can be said about adapters on one page, to read and to send.",
    "train": "Train LoRA layers on texts: adapters to study, and to use.",
    "evaluate": "Measure a model on held-out texts, with each of several adapters.",
    "behave": "Show what adapters do to a model's outputs on real inputs.",
}
