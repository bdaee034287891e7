"""Run a command line: help by panel; errors become one sentence, a hint and an exit code."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from mixlm.errors import MixlmError, UsageError, close_matches, did_you_mean
from mixlm.terminal import styled, visible

_INTERRUPTED = 130  # what a shell shows for SIGINT
_PIPE_CLOSED = 141  # what a shell shows for SIGPIPE
_OUT_OF_MEMORY = "use a smaller model, or --dtype bfloat16"
_SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def run_app(app: typer.Typer, name: str, arguments: Sequence[str] | None = None) -> int:
    """Run a Typer application and return its exit code.

    name: the program's in messages. arguments: the command line without the program; `sys.argv` by default.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if (reconfigure := getattr(stream, "reconfigure", None)) is not None:
            # Characters that the terminal cannot show are replaced; they do not stop a completion.
            reconfigure(errors="replace" if stream is sys.stdout else "backslashreplace")
    try:
        if sys.stdout is None:
            raise UsageError("standard output is closed", "leave it open, or send it to /dev/null")
        command = typer.main.get_command(app)
        variable = f"_{name}_COMPLETE".upper()
        if (instruction := os.environ.get(variable)) and name.isidentifier():
            # A shell asks for the completions of a command line: see --show-completion.
            from typer._completion_classes import completion_init
            from typer.completion import shell_complete

            completion_init()
            return shell_complete(command, _SETTINGS, name, variable, instruction)
        try:
            with command.make_context(name, list(arguments), **_SETTINGS) as context:
                code = command.invoke(context)
        except typer.Exit as ended:
            code = ended.exit_code
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except BrokenPipeError:
        return _without_reader()
    except (Exception, KeyboardInterrupt) as error:
        try:
            return _failed(error, arguments)
        except BrokenPipeError:  # nobody reads the message
            return _without_reader()


def _failed(error: BaseException, arguments: Sequence[str]) -> int:
    """Report an error on stderr, and return its exit code."""
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    if "--debug" in options:
        traceback.print_exception(error)
    if isinstance(error, KeyboardInterrupt):
        say("mixlm: interrupted")
        return _INTERRUPTED
    message, hint, code = _explained(error, arguments)
    say(f"mixlm: error: {message}")
    if hint:
        say(f"hint: {hint}")
    return code


def say(line: str) -> None:
    """Write one line to stderr."""
    if sys.stderr is not None:
        print(visible(line), file=sys.stderr, flush=True)


def _explained(error: BaseException, arguments: Sequence[str]) -> tuple[str, str | None, int]:
    if isinstance(error, MixlmError):
        hint = error.hint
        if hint is None and isinstance(error, UsageError):
            hint = _see_help(arguments)
        return error.message, hint, error.exit_code
    if isinstance(error, typer.TyperException):
        return _usage(error, arguments)
    if isinstance(error, MemoryError):
        return "there is not enough memory", _OUT_OF_MEMORY, 1
    if isinstance(error, OSError) and error.strerror:
        where = f" ({error.filename})" if error.filename else ""
        return f"the system refused: {error.strerror}{where}", "--debug shows the traceback", 1
    lines = str(error).strip().splitlines()
    detail = f": {lines[0]}" if lines else ""
    return f"unexpected {type(error).__name__}{detail}", "run again with --debug for the traceback", 1


def _usage(error: typer.TyperException, arguments: Sequence[str]) -> tuple[str, str | None, int]:
    """Explain a command line that the parser rejects."""
    context: Any = getattr(error, "ctx", None)
    see_help = f"see {context.command_path} --help" if context is not None else _see_help(arguments)
    if hasattr(error, "possibilities") and (option := getattr(error, "option_name", None)):
        known = (
            [name for parameter in context.command.get_params(context) for name in parameter.opts] if context else []
        )
        # Compared without dashes, which would make all options similar.
        close = close_matches(option.lstrip("-"), [name[2:] for name in known if name.startswith("--")])
        hint = f"did you mean {' or '.join(f'--{name}' for name in close)}?" if close else see_help
        return f"{context.command_path if context else 'mixlm'} has no option {option}", hint, error.exit_code
    message = error.format_message().rstrip(".")
    if "extra argument" in message:
        return message[:1].lower() + message[1:], "put text with spaces in quotes", error.exit_code
    # The parser joins its sentence and the validator's by a colon.
    message = ": ".join(part[:1].lower() + part[1:] for part in message.split(": "))
    return message, see_help, error.exit_code


def _see_help(arguments: Sequence[str]) -> str:
    command = arguments[0] if arguments and arguments[0].isalpha() else ""
    return f"see {' '.join(['mixlm', command, '--help'] if command else ['mixlm', '--help'])}"


def _without_reader() -> int:
    """End quietly after the reader has closed the pipe: buffered output must not be flushed at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            os.dup2(nowhere, stream.fileno())
    return _PIPE_CLOSED


class Command(TyperCommand):
    """A command whose help shows its options by panel."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the parts of the usage line after the command's name."""
        arguments = [parameter for parameter in self.get_params(ctx) if parameter.param_type_name == "argument"]
        return ["[OPTIONS]", *(_argument_usage(argument) for argument in arguments)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments and options."""
        _write_parameters(self, ctx, formatter)


class CommandGroup(TyperGroup):
    """A group of commands that suggests the closest name for an unknown one."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command that the first argument names."""
        name = args[0]
        if self.get_command(ctx, name) is None:
            known = self.list_commands(ctx)
            hint = did_you_mean(name, known) or f"commands: {', '.join(known)}"
            raise UsageError(f"{ctx.command_path} has no command {name!r}", hint)
        return super().resolve_command(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options, then the commands."""
        _write_parameters(self, ctx, formatter)
        with formatter.section(_heading("Commands")):
            formatter.write_dl(list(self.summaries(ctx).items()))

    def summaries(self, ctx: Any) -> Mapping[str, str]:
        """Return the first sentence of each command's help, by the command's name."""
        return {
            name: " ".join((command.help or "").partition("\n\n")[0].split()) for name, command in self.commands.items()
        }


def _argument_usage(argument: Any) -> str:
    name = argument.metavar or argument.name.upper()
    name += "..." if argument.nargs == -1 else ""
    return name if argument.required else f"[{name}]"


def _write_parameters(command: Any, context: Any, formatter: Any) -> None:
    """Write a section for the arguments and one for each panel of options; options without a panel come first."""
    sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is None:
            continue
        name, text = record
        section = getattr(parameter, "rich_help_panel", None) or "Options"
        if parameter.param_type_name == "argument":
            name, section = parameter.metavar or parameter.name.upper(), "Arguments"
        sections.setdefault(section, []).append((name, text))
    for section, records in sections.items():
        if records:
            with formatter.section(_heading(section)):
                formatter.write_dl(records)


def _heading(text: str) -> str:
    return styled(text, "1", sys.stdout)
