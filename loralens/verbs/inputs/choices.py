"""Values of options, checked by the verb itself: the command line is not the only caller."""

from collections.abc import Collection

from loralens.errors import OptionError


def check_choice(name: str, value: object, allowed: Collection[str]) -> None:
    """Refuse a value that is none of the allowed ones.

    Raises
    ------
    OptionError
        It names the allowed values.
    """
    if value not in allowed:
        raise OptionError(f"{name} cannot be {value!r}", fix=f"choose {', '.join(allowed)}")
