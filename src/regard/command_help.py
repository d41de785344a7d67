"""What `regard COMMAND --help` prints: the command's whole description, wrapped as prose."""

import inspect
import re
from typing import TYPE_CHECKING

from cyclopts.help import HelpPanel
from cyclopts.help.formatters import DefaultFormatter
from rich.console import Console, ConsoleOptions
from rich.text import Text

if TYPE_CHECKING:
    from cyclopts import App


def describe(command: "App") -> None:
    """Completes the help of a command, of which the list of commands has one line."""
    description = inspect.getdoc(command.default_command) or ""
    command.help = _flowing(description.partition("\n\nParameters\n---")[0])
    command.usage = f"Usage: {' '.join(['regard', command.name[0], '[OPTIONS]', *_words(command)])}"
    command.help_formatter = _Panels()


def _words(command: "App") -> list[str]:
    """The command's arguments as its usage line names them: DATA, [DATA], RUN... or [IMAGES...]."""
    words = []
    for argument in command.assemble_argument_collection():
        if argument.field_info.is_positional:
            word = argument.name.removeprefix("--").upper()
            word += "..." if argument.token_count()[1] and "..." not in word else ""
            words.append(word if argument.required or "[" in word else f"[{word}]")
    return words


def _flowing(text: str) -> str:
    """The text without the line breaks of its source; empty lines part paragraphs."""
    return re.sub(r"(?<!\n)\n(?!\n)", " ", text)


class _Panels(DefaultFormatter):
    """Cyclopts' own, but for the line breaks of the docstrings."""

    def __call__(self, console: Console, options: ConsoleOptions, panel: HelpPanel) -> None:
        for entry in panel.entries:
            text = getattr(entry.description, "primary_renderable", None)
            if isinstance(text, Text):
                entry.description.primary_renderable = Text(_flowing(text.plain))
        super().__call__(console, options, panel)
