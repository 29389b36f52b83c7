"""LaTeX that lost a backslash to an escape is named with its word; honest tabs and line breaks are not."""

from __future__ import annotations

import pytest

from qpref.records import Finding, Message, PreferencePair, Row, Source, UnpairedExample
from qpref.rows.formats import records_of_row
from qpref_plugins import check_text
from qpref_plugins.check_text.escapes import lost_backslash
from tests.plugins.check_cases import reported

SOURCE = Source(path="pairs.x", line=1)
COMMANDS = [
    *r"\theta \times \triangle \therefore \text{if} \textbf{a} \textit{a} \tilde{x} \tfrac12 \tag{1}".split(),  # noqa: SIM905 - shorter
    *r"\nabla \notin \newline \noindent \nonumber \rho \right) \rightarrow \renewcommand".split(),  # noqa: SIM905
]
IN_MATH = r"\tau \to \tan \tanh \top \nu \ne \neq \neg \ni \not \ngeq \nleq \nmid \rangle \rfloor \rceil \rm".split()  # noqa: SIM905


def undoubled(text: str) -> str:
    """Read a text as JSON does where its backslashes aren't doubled."""
    for letter, escape in (("t", "\t"), ("n", "\n"), ("r", "\r")):
        text = text.replace(f"\\{letter}", escape)
    return text


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("text", ["{}", "3 {} 5", "so {}, and", "line one\nthen {} here", "${}$"])
def test_a_command_that_is_no_word_without_its_letter_is_found_anywhere(command, text):
    found = lost_backslash(undoubled(text.format(command)))
    assert found is not None
    assert command.startswith(found)
    assert lost_backslash(text.format(command)) is None


@pytest.mark.parametrize("command", IN_MATH)
@pytest.mark.parametrize("text", ["${}$", "so $x {} y$ holds", "for $f{}$.", "a $p$ and $x_1 {} 3$"])
def test_a_command_that_may_be_a_word_is_found_in_inline_math(command, text):
    assert lost_backslash(undoubled(text.format(command))) == command
    assert lost_backslash(undoubled("so, " + command + " it is")) is None


def test_python_keeps_the_backslash_of_a_bracket_and_loses_that_of_the_command():
    assert lost_backslash("since \\(a \neq b\\) holds") == r"\neq"


@pytest.mark.parametrize(
    "text",
    [
        "for one in ones:\n\tif one:\n\t\tprint(one)\n\telse:\n\t\ttimes += 1",
        "name\texternal\nfront\tyes",
        "a\tan\to\tau\ttop\nb\text\n",
        "abc\timestamp\theader\ttitle",
        "$5\nu can pay $6",
        "custa R$5\ne depois R$6",
        "costs $5,\ne custa $6, no?",
        "$$\nu = 3\n$$",
        "the sum $a +\nb$ is",
        "$x = 1;\n\topen($y);\n\treturn $z;",
        "\ttan line\n\ttoo",
        "let $x=1;\n\to=2;($y)",
        "Usage:\n\n\trm -r $HOME\n\tan example $x",
        "old line ends\rhold\rright\rreference",
        "CRLF\r\nho\r\nright\r\n",
        "the text{ure} and a\textra word",
        "nur ein Satz\nunter $x$ und $y$\nein anderer",
        "",
    ],
)
def test_honest_white_space_is_not_taken_for_a_lost_backslash(text):
    assert lost_backslash(text) is None


PAIR = PreferencePair(
    prompt=(Message(role="user", content="Is $a \neq b$?"),),
    chosen=(Message(role="assistant", content="Since $3 \times 5 = 15$, yes, it is not."),),
    rejected=(Message(role="assistant", content="No, since nobody would ask if it were."),),
    source=SOURCE,
)


def test_the_finding_names_each_side_with_its_word():
    ((code, line, message),) = reported(check_text, [PAIR])
    assert (code, line) == ("lost_backslash", 1)
    assert r"prompt: '\neq' lost its backslash to the escape '\n', JSON writes it '\\neq'" in message
    assert r"chosen: '\times' lost its backslash to the escape '\t', JSON writes it '\\times'" in message
    assert "rejected" not in message


def test_a_completion_is_looked_at_too_and_the_option_switches_it_off():
    single = UnpairedExample(prompt=PAIR.rejected, completion=PAIR.chosen, label=True, source=SOURCE)
    assert [code for code, _, _ in reported(check_text, [single])] == ["lost_backslash"]
    assert reported(check_text, [single], lost_backslash="off") == []


@pytest.mark.parametrize(
    "command", [r"\frac", r"\forall", r"\beta", r"\begin", r"\vec", r"\varphi", r"\alpha", r"\approx"]
)
@pytest.mark.parametrize("side", ["prompt", "chosen"])
def test_a_control_character_before_a_word_names_the_command(command, side):
    lost = {"f": "\f", "b": "\b", "v": "\v", "a": "\a"}[command[1]] + command[2:]
    row = {"prompt": "Why?", "chosen": "Because.", "rejected": "No."} | {side: f"so {lost}{{1}}"}
    finding = records_of_row(Row(values=row, source=SOURCE))
    assert isinstance(finding, Finding)
    assert finding.code == "control_character"
    assert finding.message.endswith(
        f"'{command}' lost its backslash to the escape '{command[:2]}': JSON writes it '\\{command}'"
    )


@pytest.mark.parametrize("text", ["page one\f\nPage two", "page one\fPage two", "bell\a", "\x1b[0m", "a\0b"])
def test_other_control_characters_are_to_be_removed(text):
    finding = records_of_row(Row(values={"prompt": "a", "chosen": text, "rejected": "b"}, source=SOURCE))
    assert isinstance(finding, Finding)
    assert finding.message.endswith("remove it")
