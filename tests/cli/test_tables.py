"""Tables on the terminal."""

from __future__ import annotations

from qpref.cli.tables import print_table


def test_a_table_whose_last_column_is_empty_is_printed(capsys):
    # `qpref losses check NAME` of a loss to which every rule applies: no outcome has a message.
    print_table([("  finite", "ok", ""), ("  no state", "ok", "")])
    assert capsys.readouterr().out == "  finite    ok\n  no state  ok\n"
