"""`qpref chat`"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from qpref.cli.options import base_option, json_option, quantization_option, sampling_options
from qpref.cli.output import echo, make_console
from qpref.errors import DataError, QprefError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from qpref.evaluation.chat import Conversation, Reply, Side

NARROW = 72
"""Columns of a terminal below which the answers stand one under the other."""
MORE = " [...]"
"""After an answer that no stop token ended."""
HELP = """\
/reset             forget the conversation
/system TEXT       start over with this system turn; without TEXT, with the chat template's
/temperature X     sampling temperature; 0 is greedy
/max-new-tokens N  most tokens of an answer
/seed N            seed for sampling
/exit              leave, as ctrl-D does; ctrl-C stops an answer
A turn that begins with / is typed with a space before it."""


@click.command("chat")
@click.argument("model")
@click.option("--system", default="", metavar="TEXT", help="System turn.  [default: the chat template's own]")
@sampling_options(max_new_tokens=512, temperature=0.7)
@json_option
@base_option
@quantization_option
def command(
    model: str, system: str, as_json: bool, base: str | None, quantization: Literal["nf4", "none"], **sampling: Any
) -> None:
    """Talk to the base and to the trained MODEL, side by side.

    MODEL is a run, a checkpoint or an adapter; its base answers with the adapter off, in a conversation of its own. A
    plain model answers alone. Each line is a user turn; /help lists the commands. From a pipe, every line is answered,
    and a failure ends it.
    """
    from qpref.cli import quiet_transformers
    from qpref.evaluation.chat import Conversation
    from qpref.evaluation.generate import Sampling
    from qpref.evaluation.subjects import identify

    quiet_transformers()
    subject = identify(model, base=base, quantization=quantization)
    conversation = Conversation.begin(subject, Sampling(**sampling), system)
    console = make_console()
    is_live = sys.stdin.isatty() and console.is_terminal and not as_json
    names: dict[Side, str] = {"base": "base", "model": Path(model).name or model}
    chat = _Chat(conversation, names, _show_json if as_json else _Printer(console, is_live))
    if is_live:
        with suppress(ImportError):
            import readline  # noqa: F401 - input() then edits lines
        echo("A line is a turn; /help lists the commands, ctrl-C stops an answer, ctrl-D leaves.")
    for line in _lines(is_live):
        if not chat.take(line, is_live):
            break


def _lines(is_live: bool) -> Iterator[str]:
    """Yield what is typed, or piped in, up to its end.

    Raises:
        DataError: what is piped in isn't text.
    """
    while True:
        try:
            line = input("> ") + "\n" if is_live else sys.stdin.readline()
            if not line:
                return
            yield line.encode(errors="replace").decode()  # half a character has no UTF-8, and so no tokens
        except EOFError:
            echo()
            return
        except UnicodeDecodeError:
            raise DataError("standard input: its text isn't UTF-8") from None
        except KeyboardInterrupt:
            if not is_live:
                raise
            echo("\nctrl-D leaves")


@dataclass(slots=True)
class _Chat:
    """A conversation and the way that its answers are shown."""

    conversation: Conversation
    names: Mapping[Side, str]
    show: Callable[[_Chat, str], None]

    def take(self, line: str, is_live: bool) -> bool:
        """Answer a line, or obey it; False to leave.

        Args:
            is_live: print an error, and drop the turn that an interrupt stops, instead of raising.
        """
        try:
            if line.startswith("/"):
                return self._obey(*line.removeprefix("/").strip().partition(" ")[::2])
            if text := line.strip():
                self.show(self, text)
        except KeyboardInterrupt:
            if not is_live:
                raise
            echo("stopped; this turn is forgotten")
        except QprefError as error:
            if not is_live:
                raise
            echo(f"error: {error}", err=True)
        return True

    def _obey(self, name: str, value: str) -> bool:
        conversation, value = self.conversation, value.strip()
        match name:
            case "exit" | "quit" | "bye":
                return False
            case "reset":
                conversation.reset()
                echo("the conversation is forgotten", err=True)
            case "system":
                conversation.system = value
                conversation.reset()
                turn = "this system turn" if value else "the chat template's system turn"
                echo(f"the conversation is forgotten, and starts with {turn}", err=True)
            case "temperature" | "max-new-tokens" | "seed":
                self._set(name.replace("-", "_"), value)
            case "help":
                echo(HELP, err=True)
            case _:
                echo(f"/{name}: no command; /help lists them", err=True)
        return True

    def _set(self, name: str, value: str) -> None:
        """Set a value of sampling by the rules of the option of its name."""
        (option,) = (parameter for parameter in command.params if parameter.name == name)
        try:
            number = option.type.convert(value, option, None)
        except click.BadParameter as error:
            echo(f"/{name.replace('_', '-')} {value}: {error.message}", err=True)
        else:
            self.conversation.sampling = replace(self.conversation.sampling, **{name: number})
            echo(f"{name.replace('_', '-')} is {number}", err=True)


def _show_json(chat: _Chat, question: str) -> None:
    """Print a turn as one line of JSON."""
    replies = chat.conversation.ask(question, lambda side, text: None)
    answers = {side: asdict(reply) for side, reply in replies.items()}
    echo(json.dumps({"prompt": question, **answers}, ensure_ascii=False))


@dataclass(slots=True)
class _Printer:
    """Shows a turn's answers: on a terminal as they come, elsewhere when they are complete."""

    console: Console
    is_live: bool

    def __call__(self, chat: _Chat, question: str) -> None:
        from rich.live import Live

        texts: dict[Side, str] = dict.fromkeys(chat.conversation.turns, "")
        if not self.is_live:
            self.console.print(self._view(chat, _texts(chat.conversation.ask(question, texts.__setitem__))))
            return
        with Live(console=self.console, transient=True, auto_refresh=False) as live:

            def show(side: Side, text: str) -> None:
                texts[side] = text
                live.update(self._view(chat, texts), refresh=True)

            replies = chat.conversation.ask(question, show)
        self.console.print(self._view(chat, _texts(replies)))

    def _view(self, chat: _Chat, texts: Mapping[Side, str]) -> RenderableType:
        """Lay the answers out beside each other, or under each other where the terminal is narrow or none is there."""
        from rich.console import Group
        from rich.table import Table

        if len(texts) > 1 and self.console.is_terminal and self.console.width >= NARROW:
            table = Table(expand=True)
            for side in texts:
                table.add_column(chat.names[side], ratio=1)
            table.add_row(*texts.values())
            return table
        return Group(*(f"{chat.names[side]}: {text}" for side, text in texts.items()))


def _texts(replies: Mapping[Side, Reply]) -> dict[Side, str]:
    return {side: reply.text + ("" if reply.ended else MORE) for side, reply in replies.items()}
