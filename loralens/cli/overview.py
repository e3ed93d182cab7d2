"""What ``loralens --help`` shows: the commands in groups by what a user wants, and three examples."""

from loralens.verbs import VERBS

# Neither is a verb. The demo runs the other commands as a shell does, so there is nothing to call from Python. The
# sub-commands of fleet are methods of `loralens.Fleet`.
COMMANDS = {
    "demo": "Run the main commands once, on real weights: a first command for newcomers.",
    **VERBS,
    "fleet": "Index thousands of adapters, and search and group them.",
}

# In the order in which a newcomer needs them; a test compares with `COMMANDS`, so that no command is forgotten.
GROUPS = {
    "Look": ("demo", "inspect", "doctor", "spectrum", "report", "survey", "fleet"),
    "Compare": ("similarity", "equal", "trajectory"),
    "Against the base": ("amplify", "intruders"),
    "Make smaller": ("compress", "curve", "calibrate"),
    "Combine": ("combine", "scale", "negate", "subtract", "interpolate", "drop"),
    "Into a model, and into other programs": ("merge", "unmerge", "verify", "extract", "convert"),
    "Train": ("train", "evaluate", "behave"),
}

EXAMPLES = (
    ("loralens adapter.safetensors", "what is in this file?"),
    ("loralens doctor adapter/", "is anything wrong with it?"),
    ("loralens compress adapter/ --energy 0.99 -o OUT", "make it smaller"),
)


# Under this key the context of a command says that the user named none, and that `inspect` was chosen for a path.
WITHOUT_VERB = "loralens.without_verb"


def next_steps(adapter: str) -> str:
    """The line below the answer to ``loralens FILE``: what comes next; ``adapter`` is quoted for a shell."""
    return (
        f"next: loralens doctor {adapter} (is anything wrong?), spectrum (which rank does it need?), "
        "similarity (to another adapter), compress (make it smaller); loralens --help has them all"
    )
