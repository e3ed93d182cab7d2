"""The group of commands: imports a command when it is called, and turns errors into exit codes.

The exit code is 0 if the command is done or the answer is yes, 1 if the answer is no, 2 after an error or wrong usage
(with one message and no traceback), 130 if the user has interrupted the command, and 143 if it was terminated. A
traceback is a bug.
"""

import gc
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from time import monotonic
from types import FrameType
from typing import Any, NoReturn

import click
from click.shell_completion import CompletionItem

from loralens.cli.commands import WITHOUT_VERB, command_of
from loralens.cli.derive import DerivedGroup
from loralens.cli.standard_error import messages_on_stderr
from loralens.cli.terminal import colours, harmless_output, occupy_closed_streams, say_message
from loralens.cli.usage_hints import hint, on_unknown
from loralens.errors import LoraLensError, as_typed, visible
from loralens.verbs import COMMANDS, GROUPS
from loralens.version import __version__

# Added to the number of the signal that ended a command, as shells do: 130 for SIGINT, 143 for SIGTERM.
SIGNALLED = 128
GRACE = 3.0  # seconds for the clean-up, in which further signals are ignored


def unwind_once() -> list[int]:
    """Let the first Ctrl-C or SIGTERM stop the command by `KeyboardInterrupt`, so that it cleans up.

    A second signal does not interrupt the clean-up, and after `GRACE` seconds a further signal ends the process. The
    returned list receives the number of the first signal. A signal that is ignored, or that other code handles, is left
    alone.
    """
    first: list[int] = []
    since: list[float] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if not first:
            first.append(number)
            since.append(monotonic())
            signal.default_int_handler(number, frame)  # raises KeyboardInterrupt, whatever the signal
        elif monotonic() - since[0] > GRACE:
            os._exit(SIGNALLED + first[0])

    for number, plain in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(number) is plain:
            signal.signal(number, handle)
    return first


EXAMPLES = (
    ("loralens adapter.safetensors", "what is in this file, or in this folder?"),
    ("loralens doctor adapter/", "is anything wrong with it?"),
    ("loralens compress adapter/ --energy 0.99 -o OUT", "make it smaller"),
)
# The last message of a command that a signal has stopped: Ctrl-C; or kill, a scheduler, a shutdown.
ENDED = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
UNREAD = 128 + 13  # the exit code of a command whose output nobody reads any more, as of one that SIGPIPE ended
FAILED = 2  # the exit code of an error; 1 is the answer no, so that scripts can tell them apart

NO_MEMORY = "there is not enough memory\n  fix: choose fewer modules (--modules), or use a machine with more memory"
# Fragments of the messages of libraries, of the dynamic loader and of threading, in lower case.
SHORT_OF_MEMORY = ("allocate memory", "failed to map segment", "can't start new thread", "not enough memory")


class LensGroup(DerivedGroup):
    """The group of all commands. A path in place of a command is inspected."""

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """The names from the table, without an import of the commands, and the options of the group."""
        names = [CompletionItem(name, help=text) for name, text in COMMANDS.items() if name.startswith(incomplete)]
        # A word that does not begin the name of a command may begin the path of an adapter.
        paths = [] if names or incomplete.startswith("-") else [CompletionItem(incomplete, type="file")]
        return names + paths + click.Command.shell_complete(self, ctx, incomplete)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command of the first word; if that is an existing path and not a command, `inspect`, or `survey`.

        `survey` takes the only path, if that is a folder of several adapters.

        A word that is neither is answered with the command that it probably means.
        """
        word = args[0]
        # Shell completion parses words that are not complete yet, and needs no answer about them.
        if word in COMMANDS or ctx.resilient_parsing or word.startswith("-"):
            return super().resolve_command(ctx, args)
        # A Path would raise for a word that is longer than a name of a file may be.
        if os.path.exists(word):  # noqa: PTH110
            ctx.meta[WITHOUT_VERB] = True
            name = "survey" if _is_collection(*args) else "inspect"
            return name, self.get_command(ctx, name), args
        # Without the context, whose usage would hide the one sentence that answers.
        what, fix = on_unknown(*args[:2])
        error = click.UsageError(what)
        vars(error)["fix"] = fix
        raise error

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write both forms of a call: with a command, and with a file alone."""
        formatter.write_usage(ctx.command_path, "COMMAND [ARGS]...")
        formatter.write_usage(ctx.command_path, "ADAPTER...", prefix="       ")

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write what the tool is for, and the examples."""
        super().format_help_text(ctx, formatter)
        with formatter.section("Examples"):
            formatter.write_dl(list(EXAMPLES), col_max=60)

    def overview(self, ctx: click.Context) -> str:
        """On a terminal the names of the commands, which fit on its screen; in a pipe the whole help."""
        if not sys.stdout.isatty():
            return ctx.get_help()
        formatter = ctx.make_formatter()
        self.format_usage(ctx, formatter)
        with formatter.section("Examples"):
            formatter.write_dl(list(EXAMPLES), col_max=60)
        formatter.write_paragraph()
        for group, names in GROUPS.items():
            formatter.write_text(f"{group}: {', '.join(names)}")
        formatter.write_paragraph()
        formatter.write_text("loralens --help | less  says what each command does, and loralens COMMAND --help how.")
        return formatter.getvalue().rstrip()

    def main(self, *arguments: Any, **options: Any) -> Any:
        """Run the group with output that cannot act on a terminal."""
        with harmless_output(), messages_on_stderr(), as_typed():
            return super().main(*arguments, **options)

    def make_context(self, *arguments: Any, **options: Any) -> click.Context:
        """Parse the words before the command."""
        with _usage_in_one_line():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: click.Context) -> object:
        """Run the command; a LoraLensError becomes one message and exit code 2."""
        try:
            with _usage_in_one_line():
                return super().invoke(ctx)
        except LoraLensError as error:
            say_message(f"error: {error}")
            ctx.exit(FAILED)
        # These have their own messages and exit codes, and their texts may contain any word.
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        # Lack of memory appears as errors of many classes, such as OSError, ImportError and RuntimeError of torch.
        except Exception as error:
            known = any(sign in str(error).lower() for sign in SHORT_OF_MEMORY)
            if not (known or isinstance(error, MemoryError)):
                raise
        # Outside the handler, where the memory that the command held has been released.
        say_message(f"error: {NO_MEMORY}")
        return ctx.exit(FAILED)


def _is_collection(word: str, following: str = "-", *_: str) -> bool:
    """Whether a path is a folder of several adapters, and no other path follows."""
    if not os.path.isdir(word) or not following.startswith("-"):  # noqa: PTH112
        return False
    from loralens.verbs.batches.batch import is_several  # imported here, since it brings NumPy

    return is_several(word)


@contextmanager
def _usage_in_one_line() -> Iterator[None]:
    """Make the messages of click about wrong options one line, even if the words that they quote have line ends.

    A second line says what was probably meant.
    """
    try:
        yield
    except click.ClickException as error:
        meant = hint(error) if isinstance(error, click.UsageError) else ""
        # Without the suggestions of click, which are in the hint.
        what = error.message if isinstance(error, click.NoSuchOption) else error.format_message()
        what = visible(" ".join(what.split())).rstrip(".")
        # click declares the message as final for type checkers.
        message = vars(error)["message"] = f"{what[:1].lower()}{what[1:]}" + (
            f"\n  fix: {visible(meant)}" if meant else ""
        )
        vars(error)["show"] = partial(say_message, f"error: {message}")
        raise


def _find(name: str) -> click.Command:
    if name == "fleet":
        from loralens.cli.fleet import fleet

        return fleet
    return command_of(name)


# click's own limit of 80 columns would break formulas and paths in the help texts.
@click.group(
    cls=LensGroup,
    find=_find,
    groups=GROUPS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="loralens")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Understand, shrink, combine, merge and trust LoRA adapters."""
    ctx.color = colours(sys.stdout)


def _report_os_error(error: OSError) -> NoReturn:
    """Report the file that the system refuses; an error without a file is about standard output, full or closed.

    The process then ends without a flush, which would fail in the same way. If nobody reads the output any more, as
    with ``| head``, it ends without a message.
    """
    if isinstance(error, BrokenPipeError):
        os._exit(UNREAD)
    if error.filename is None:
        what, fix = "the output cannot be written", "check where it goes to"
    else:
        what, fix = f"{error.filename}: cannot be used", "check the path and its permissions"
    # Standard error may be closed too.
    with suppress(OSError):
        say_message(f"error: {visible(what)}: {error.strerror}\n  fix: {fix}")
        sys.stderr.flush()
    os._exit(FAILED)


def run() -> None:
    """The entry point of the ``loralens`` command."""
    # BLAS uses one thread, unless the user sets a number: modules are computed in threads of our own. It reads these
    # variables when NumPy is imported, so they must be set before.
    for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    signals = unwind_once()
    # A command ends before unreachable cycles matter, and the search for them takes 3 % of the time of a short one.
    gc.disable()
    occupy_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A terminal whose encoding has no σ shows a question mark, and there is no traceback.
            stream.reconfigure(errors="replace")
    try:
        # In standalone mode click would turn a signal into exit code 1, which here is the answer no.
        code = main(prog_name="loralens", standalone_mode=False)
    except click.exceptions.Abort:
        number = signals[0] if signals else signal.SIGINT
        click.echo(ENDED[signal.Signals(number)], err=True)
        code = SIGNALLED + number
    except click.ClickException as error:
        with harmless_output():
            error.show()
        code = error.exit_code
    except OSError as error:
        _report_os_error(error)
    except SystemExit as ended:  # of click: 1 if standard output is a closed pipe, 0 after a script for completion
        code = UNREAD if ended.code else 0
    try:
        sys.stdout.flush()
    except OSError as error:
        _report_os_error(error)
    with suppress(OSError):
        sys.stderr.flush()
    # Nothing is left to do. An ordinary exit would unload NumPy, which takes 7 % of the time of a short command. If a
    # signal came while `exec` made a dataclass, `python -m` would besides end by SIGINT, whatever the exit code is.
    os._exit(code if isinstance(code, int) else 0)
