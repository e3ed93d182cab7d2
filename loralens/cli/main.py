"""The group of commands: imports a command when it is called, and turns errors into exit codes.

Exit codes: 0 done, or the answer is yes; 1 the answer is no; 2 an error or wrong usage (one message, no traceback); 130
interrupted; 143 terminated. A traceback is a bug.
"""

import gc
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from mmap import mmap
from time import monotonic
from types import FrameType
from typing import Any, NoReturn

import click
from click.shell_completion import CompletionItem

from loralens.cli.messages import messages_on_stderr
from loralens.cli.terminal import harmless_output, occupy_closed_streams
from loralens.errors import LoraLensError, visible
from loralens.verbs import VERBS
from loralens.version import __version__

# The words that end a command which a signal stopped.
ENDED = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}  # by Ctrl-C; by kill, a scheduler, a shutdown
FAILED = 2  # the exit code of an error, as of wrong usage; 1 is the answer no
# The convention of shells: 130 for SIGINT, 143 for SIGTERM.
SIGNALLED = 128  # and the number of the signal: the exit code of a command that it ended
TRIAL = 64 << 20  # bytes: where the system does not give these, an error comes of the lack of memory
GRACE = 3.0  # seconds after a signal in which a second one does not disturb the tidying up

NO_MEMORY = "there is not enough memory\n  fix: leave out modules (--modules), or work where there is more memory"
# Fragments of the messages of libraries, of the dynamic loader and of threading, in lower case.
SHORT_OF_MEMORY = ("allocate memory", "failed to map segment", "can't start new thread", "not enough memory")

# Options whose value may be a path although it is kept as a plain string, since a Hub id or ``A:0.7`` is no path.
PLACES = {"adapter", "adapters", "base", "model", "tuned", "activations", "recipe", "data", "eval"}

COMMANDS = {"demo": "Run the main commands once, on real weights: a first command for newcomers.", **VERBS}


class PathType(click.types.StringParamType):
    """A string that may be a path: an adapter (``A:0.7`` and a Hub id too), a model, texts."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Leave it to the shell, which knows where files are."""
        del ctx, param
        return [CompletionItem(incomplete, type="file")]


def _complete_paths(command: click.Command) -> click.Command:
    """The command, for which the shell completes files where a plain string may be one: arguments, and `PLACES`."""
    for param in command.params:
        if param.type is click.STRING and (isinstance(param, click.Argument) or param.name in PLACES):
            param.type = PathType()
    return command


class LensGroup(click.Group):
    """Loads a command when it is called, so that ``loralens --help`` imports no command at all."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the table."""
        del ctx
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import ``loralens.cli.<name>``."""
        del ctx
        if cmd_name not in COMMANDS:
            return None
        command = import_module(f"loralens.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return _complete_paths(command)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Names from the table, without importing the commands; and our own options."""
        names = [CompletionItem(name, help=text) for name, text in COMMANDS.items() if name.startswith(incomplete)]
        return names + click.Command.shell_complete(self, ctx, incomplete)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The table, without importing the commands."""
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def main(self, *arguments: Any, **options: Any) -> Any:
        """Run the group; nothing that it prints does anything to a terminal but show text."""
        with harmless_output(), messages_on_stderr():
            return super().main(*arguments, **options)

    def make_context(self, *arguments: Any, **options: Any) -> click.Context:
        """Read what stands before the command."""
        with _usage_in_one_line():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: click.Context) -> object:
        """Run the command; a LoraLensError becomes one message and exit code 2."""
        try:
            with _usage_in_one_line():
                return super().invoke(ctx)
        except LoraLensError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(FAILED)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            if not _is_out_of_memory(error):
                raise
        click.echo(f"error: {NO_MEMORY}", err=True)  # out here, where what the command held is given back
        return ctx.exit(FAILED)


@contextmanager
def _usage_in_one_line() -> Iterator[None]:
    """Let what click says of wrong options be one line, whatever the words that it quotes hold."""
    try:
        yield
    except click.ClickException as error:
        vars(error)["message"] = visible(error.message)  # click's types call it final
        raise


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is at its end, as Python, the loader of libraries or torch say it.

    A library that is cut short while it is loaded says something else: there a trial tells.
    """
    if isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in SHORT_OF_MEMORY):
        return True
    return not isinstance(error, OSError) and not _can_allocate()


def _can_allocate() -> bool:
    """Whether the system still gives as much memory as any command needs."""
    try:
        mmap(-1, TRIAL).close()
    except (OSError, MemoryError):
        return False
    return True


@click.group(cls=LensGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="loralens")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Understand, shrink, combine, merge and trust LoRA adapters."""
    if os.environ.get("NO_COLOR"):  # click does not look; rich does
        ctx.color = False


def _limit_blas_threads() -> None:
    """Let BLAS use one thread, unless the user says otherwise: modules are worked on in threads of our own.

    Must happen before NumPy is imported, so here.
    """
    for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
        # setdefault: a number that the user has set counts.
        os.environ.setdefault(name, "1")


def _unwind_once() -> list[int]:
    """Let the first Ctrl-C or SIGTERM unwind the command, and no second one its tidying up; after `GRACE` one ends it.

    The list will hold the number of the signal. Where one is ignored, or somebody else's, it stays so.
    """
    first: list[int] = []
    since: list[float] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if not first:
            first.append(number)
            since.append(monotonic())
            signal.default_int_handler(number, frame)  # which raises KeyboardInterrupt, whatever the signal
        if monotonic() - since[0] > GRACE:
            os._exit(SIGNALLED + first[0])

    for number, plain in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(number) is plain:
            signal.signal(number, handle)
    return first


def _report_os_error(error: OSError) -> NoReturn:
    """Say which file the system refuses; where it names none, it is standard output, which is full or gone.

    What was to be flushed there cannot be.
    """
    if error.filename is None:
        what, fix = "the output cannot be written", "check where it goes to"
    else:
        what, fix = f"{error.filename}: cannot be used", "check the path and its permissions"
    with suppress(OSError):  # standard error may be the one that is gone
        sys.stderr.write(f"error: {visible(what)}: {error.strerror}\n  fix: {fix}\n")
        sys.stderr.flush()
    os._exit(FAILED)


def run() -> None:
    """The entry point of the ``loralens`` command."""
    _limit_blas_threads()
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends a command as it ends cat: quietly, by the signal
    signals = _unwind_once()
    gc.disable()  # a command is over before cycles matter, and looking for them costs 3 % of a short one
    occupy_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without σ gets '?', not a traceback
    try:
        code = main(prog_name="loralens", standalone_mode=False)
    except click.exceptions.Abort:
        number = signals[0] if signals else signal.SIGINT
        click.echo(ENDED[signal.Signals(number)], err=True)
        sys.exit(SIGNALLED + number)
    except click.ClickException as error:
        with harmless_output():
            error.show()
        sys.exit(error.exit_code)
    except OSError as error:
        _report_os_error(error)
    try:
        sys.stdout.flush()
    except OSError as error:
        _report_os_error(error)
    with suppress(OSError):
        sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0)  # nothing is left to do; taking NumPy apart would cost 7 %
