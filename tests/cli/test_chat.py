"""`qpref chat`: turns, commands, interrupts, pipes and terminals."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from qpref.cli import main
from qpref.evaluation.chat import Conversation
from qpref.evaluation.generate import Sampling, as_turns, generate
from qpref.evaluation.subjects import identify
from qpref.records import Message

QPREF = Path(sys.executable).with_name("qpref")
GREEDY = ("--temperature", "0", "--max-new-tokens", "6")
SHORT = Sampling(max_new_tokens=6)


def chat(*arguments, lines, code=0):
    typed = "".join(f"{line}\n" for line in lines)
    done = CliRunner().invoke(main, ["chat", *map(str, arguments)], input=typed, catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done


def turns_of(*arguments, lines):
    return [json.loads(line) for line in chat(*arguments, *GREEDY, "--json", lines=lines).stdout.splitlines()]


def says(role, content):
    return Message(role=role, content=content)


@pytest.fixture
def run(trained_run):
    return trained_run()


def test_a_turn_is_answered_as_generate_answers_it_and_the_next_one_sees_the_sides_own_answers(run):
    first, second = turns_of(run, lines=["What comes after 3?", "", "And then?"])
    (alone,) = generate(identify(str(run)), [as_turns((says("user", "What comes after 3?"),))], SHORT)
    assert (first["base"]["text"], first["model"]["text"]) == (alone.base, alone.model)
    assert first["base"] != first["model"]
    for side in ("base", "model"):
        before = (
            says("user", "What comes after 3?"),
            says("assistant", first[side]["text"]),
            says("user", "And then?"),
        )
        (both,) = generate(identify(str(run)), [as_turns(before)], SHORT)
        assert second[side]["text"] == getattr(both, side)


def test_reset_forgets_and_a_system_turn_stays(run):
    question = "What comes after 3?"
    lines = [question, "/reset", question, "/system Count aloud.", question, "/reset", question]
    plain, again, with_system, still = turns_of(run, lines=lines)
    assert plain == again
    assert with_system == still
    (expected,) = generate(
        identify(str(run)), [as_turns((says("system", "Count aloud."), says("user", question)))], SHORT
    )
    assert with_system["model"]["text"] == expected.model != plain["model"]["text"]


def test_the_settings_of_sampling_can_be_changed_between_turns(run):
    lines = ["Hi", "/reset", "/max-new-tokens 2", "Hi", "/reset", "/max-new-tokens 6", "/temperature 5", "Hi",
             "/reset", "Hi", "/reset", "/seed 7", "Hi"]  # fmt: skip
    greedy, short, drawn, same, other = (turn["model"]["text"] for turn in turns_of(run, lines=lines))
    assert greedy.startswith(short)
    assert len(short) < len(greedy)
    assert drawn == same
    assert len({greedy, drawn, other}) == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/reset", "the conversation is forgotten"),
        ("/system Be brief.", "the conversation is forgotten, and starts with this system turn"),
        ("/system", "the conversation is forgotten, and starts with the chat template's system turn"),
        ("/temperature 0.5", "temperature is 0.5"),
        ("/max-new-tokens 3", "max-new-tokens is 3"),
    ],
)
def test_a_command_confirms_what_it_did_beside_the_answers(run, line, message):
    done = chat(run, *GREEDY, "--json", lines=[line, "Hi"])
    assert message in done.stderr.splitlines()
    assert json.loads(done.stdout)["prompt"] == "Hi"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/temperature hot", "/temperature hot: 'hot' is not a valid float range."),
        ("/seed -1", "/seed -1: -1 is not in the range x>=0."),
        ("/restart", "/restart: no command; /help lists them"),
    ],
)
def test_a_command_that_is_none_says_so_and_the_chat_goes_on(run, line, message):
    done = chat(run, *GREEDY, "--json", lines=[line, "Hi"])
    assert message in done.stderr
    assert json.loads(done.stdout)["prompt"] == "Hi"


def test_a_turn_may_begin_with_a_slash_behind_a_space(run):
    (turn,) = turns_of(run, lines=[" /reset"])
    assert turn["prompt"] == "/reset"


def test_input_that_is_no_text_is_said(run):
    done = CliRunner().invoke(main, ["chat", str(run), *GREEDY], input=b"\xff\xfe\n")
    assert (done.exit_code, done.stderr.splitlines()[-1]) == (3, "error: standard input: its text isn't UTF-8")


def test_nothing_is_answered_after_exit(run):
    assert chat(run, *GREEDY, "--json", lines=["/exit", "Hi"]).stdout == ""


def test_a_plain_model_answers_alone(make_base):
    (turn,) = turns_of(make_base(), lines=["Hi"])
    assert set(turn) == {"prompt", "model"}


def test_from_a_pipe_a_turn_that_cannot_be_answered_ends_it(run):
    done = chat(run, *GREEDY, lines=["Hi", "x" * 600, "Hi"], code=3)
    assert "tokens, and the model's context 512" in done.stderr
    assert done.stdout.count("base: ") == 1


def test_an_answer_that_is_interrupted_leaves_no_trace(run):
    conversation = Conversation.begin(identify(str(run)), SHORT)
    expected = conversation.ask("Hi", lambda side, text: None)
    conversation.reset()
    for interrupted in ("base", "model"):

        def interrupt(side, text, at=interrupted):
            if side == at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            conversation.ask("Never mind", interrupt)
    assert conversation.ask("Hi", lambda side, text: None) == expected


class Terminal:
    """`qpref chat` on a terminal of so many columns."""

    def __init__(self, columns: int, *arguments: object) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.process = subprocess.Popen(
            [QPREF, "chat", *map(str, arguments)], stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            preexec_fn=_at_a_terminal, env=os.environ | {"TERM": "xterm"},
        )  # fmt: skip
        os.close(slave)
        self.screen = ""

    def until(self, pattern: str, seconds: float = 120, again: str = "") -> str:
        """What is printed up to the pattern; what comes before it is forgotten.

        Args:
            again: typed every five seconds until then. Python's readline misses a ctrl-C between its prompt and its
                wait for keys, until the next key.
        """
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.screen, re.DOTALL)):
            left = deadline - time.monotonic()
            if not select.select([self.master], [], [], max(0, min(left, 5) if again else left))[0]:
                assert again, self.screen
                assert left > 0, self.screen
                self.type(again)
                continue
            try:
                self.screen += os.read(self.master, 4096).decode(errors="replace")
            except OSError:  # the process has ended
                raise AssertionError(self.screen) from None
        shown, self.screen = self.screen[: found.end()], self.screen[found.end() :]
        return shown

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())


def _at_a_terminal() -> None:
    """Start as a terminal's shell starts a command: tests in the background have passed on that ctrl-C is ignored."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def terminal(run):
    terminal = Terminal(100, run, "--temperature", 0, "--max-new-tokens", 400)
    yield terminal
    terminal.process.kill()
    terminal.process.wait()
    os.close(terminal.master)


def test_on_a_terminal_answers_stand_side_by_side_ctrl_c_stops_them_and_ctrl_d_leaves(terminal):
    terminal.until("ctrl-D leaves.*> ")
    terminal.type("Hi\n")
    terminal.until("base.*run")  # the table is there before the answers are complete
    terminal.type("\x03")
    terminal.until("stopped; this turn is forgotten.*> ")
    terminal.type("/max-new-tokens 3\n")
    terminal.until("> ")
    terminal.type("Hi\n")
    shown = terminal.until(r"\[\.\.\.\].*> ")
    assert re.search(r"┃ base +┃ ", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown))
    terminal.type("x" * 600 + "\n")
    terminal.until("error: the conversation has .*> ")
    terminal.type("\x03")
    terminal.until("ctrl-D leaves.*> ", again="\x03")
    terminal.type("\x04")
    assert terminal.process.wait(60) == 0
