"""What console commands share: parse, call, exit; a user's mistake is one line and exit code 2. No torch."""

import contextlib
import io
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from dit_dp.errors import UsageError

T = TypeVar("T")

WORLD_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
"""What torchrun tells each process."""


def started_by_torchrun() -> bool:
    """Return whether this process is one of several."""
    return all(name in os.environ for name in WORLD_VARIABLES)


def speaks_here() -> bool:
    """Return whether this process says what is wrong with words or devices that all of this machine have."""
    return not started_by_torchrun() or os.environ["LOCAL_RANK"] == "0"


def guarded(
    kind: type[T],
    argv: Sequence[str] | None,
    prog: str | None,
    command: Callable[[T], int],
    *,
    name: str,
    prepare: Callable[[Sequence[str]], Sequence[str]] | None = None,
    interrupted: str = "interrupted",
    speaks: bool = True,
) -> int:
    """Parse, run and turn a user's mistake into one line and exit code 2.

    Args:
        kind: A dataclass of arguments.
        argv: Words after the command; default: the process's.
        prog: What the help calls the command.
        command: Takes the arguments, returns the exit code.
        name: Of the program, before an error.
        prepare: Changes the words before they are parsed, such as a recipe into its options.
        interrupted: What to say at `KeyboardInterrupt`.
        speaks: Whether this process says what is wrong with its words: of several with the same words, one does.

    Returns:
        The exit code; of a `KeyboardInterrupt` a shell's for the signal that it holds, or for Ctrl-C.
    """
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    words = sys.argv[1:] if argv is None else argv
    try:
        try:
            arguments = parse(kind, words if prepare is None else prepare(words), prog)
        except UsageError:
            if speaks:
                raise
            return 2
        return command(arguments)
    except UsageError as error:
        return complain(error, name)
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        return complain(UsageError(f"system: {error}"), name)
    except KeyboardInterrupt as error:
        note(interrupted)
        return 128 + int(error.args[0] if error.args else signal.SIGINT)


def parse(kind: type[T], argv: Sequence[str] | None, prog: str | None = None) -> T:
    """Build a dataclass from the command line.

    Raises:
        UsageError: In one line, what tyro says in a box.
        SystemExit: After ``--help``.
    """
    import tyro

    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            return tyro.cli(kind, args=argv, prog=prog or Path(sys.argv[0]).name, config=(tyro.conf.OmitArgPrefixes,))
    except SystemExit as error:
        if error.code in (0, None):
            raise
        raise UsageError(_flatten(captured.getvalue())) from None


def _flatten(box: str) -> str:
    """Return the text of a tyro error box as one line: field, value, what is accepted."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = (re.sub(r"[╭╮╰╯│─]+|(?<!\S)(-{5,}|\|)(?!\S)", " ", line).strip() for line in text.splitlines())
    joined = re.sub(r"\s+", " ", " ".join(line for line in lines if line)).strip()
    joined = joined.split(" For full helptext")[0]
    joined = re.sub(r"^(Value error )?(Error parsing (config|[A-Z]\w+): )?", "", joined)
    joined = re.sub(r"^(Parsing error |Invalid choice (?=invalid)|Missing argument (?=Missing))", "", joined)
    joined = re.sub(r"^Unrecognized options (?=Unrecognized options:)", "", joined)
    joined = re.sub(r"^Required options Missing from \S+( \S+)?:", "missing:", joined)
    return re.sub(r" Argument helptext: --\S+ (\S+) .*", r"; accepted: \1", joined)


def usage(name: str, purpose: str, commands: Mapping[str, str]) -> str:
    """Return a program's help: its commands, a line each."""
    width = max(map(len, commands))
    lines = [f"  {command:<{width}}  {text}" for command, text in commands.items()]
    return "\n".join(
        [
            f"usage: {name} COMMAND [OPTIONS]",
            "",
            purpose,
            "",
            *lines,
            "",
            f"{name} COMMAND --help lists a command's options.",
        ]
    )


def say(text: str) -> None:
    """Write a line of the summary."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def note(text: str) -> None:
    """Write a line about what is going on."""
    sys.stderr.write(text + "\n")


def complain(error: UsageError, name: str) -> int:
    """Say what a user got wrong; return the exit code."""
    note(f"{name}: error: {error}")
    return 2
