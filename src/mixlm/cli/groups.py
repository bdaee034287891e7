"""Groups of commands: help with one section per panel of options, hints for misspelled names."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from typer.core import TyperCommand, TyperGroup

from mixlm.errors import UsageError, did_you_mean
from mixlm.terminal import styled


class Command(TyperCommand):
    """A command whose help shows its options by panel."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the parts of the usage line behind the command's name."""
        arguments = [parameter for parameter in self.get_params(ctx) if parameter.param_type_name == "argument"]
        return ["[OPTIONS]", *(_usage(argument) for argument in arguments)]

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


def _usage(argument: Any) -> str:
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
