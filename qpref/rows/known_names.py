"""Columns of documented layouts under qpref's names."""

from __future__ import annotations

from collections.abc import Mapping

from qpref.records import Row

NAMES: Mapping[str, str] = {
    "chosen_response": "chosen",
    "response_chosen": "chosen",
    "chosen_conversations": "chosen",
    "chosen_messages": "chosen",
    "rejected_response": "rejected",
    "response_rejected": "rejected",
    "rejected_conversations": "rejected",
    "rejected_messages": "rejected",
    "rejected_message": "rejected",
    "prompt_messages": "prompt",
    "preferred_completion": "preferred_output",
    "non_preferred_completion": "non_preferred_output",
    "initial_reason_steps": "response_prefix",
}
"""Column of another tool -> qpref's. Axolotl and Argilla have `chosen_response`; torchtune `chosen_conversations`;
ms-swift `rejected_response` and `rejected_messages`; OpenPipe `rejected_message`; OpenAI's earlier API
`preferred_completion`; Step-DPO's data `initial_reason_steps`."""


def with_known_names(row: Row) -> Row:
    """Rename a row's columns to qpref's names; a column that has its name already, or a null one, stays as it is."""
    values = row.values
    found = NAMES.keys() & values.keys()
    if not found:
        return row
    renamed = {NAMES[name]: values[name] for name in sorted(found) if values[name] is not None}
    renamed = {name: value for name, value in renamed.items() if values.get(name) is None}
    return Row(values={**values, **renamed}, source=row.source)
