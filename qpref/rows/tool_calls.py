"""Canonical form of tool calls and of tools' JSON schemas: the same whichever reader and notation they came from.

Arrow gives every object of a column the fields of all, null where they aren't its own, and one number type to a field.
So that JSON and Arrow give the same records, null fields are dropped, and integral floats are integers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from qpref.rows.values import BadRowError, check_texts_within, kind_of

MAX_INTEGER = 2**53
"""Integral floats below this are exact; larger ones stay floats."""


def tool_calls_of(value: object, where: str) -> list[dict[str, object]]:
    """Parse tool calls: a list of objects, or its JSON text.

    A call becomes `{"type": "function", "function": {"name": ..., "arguments": {...}}}`. Arguments that are the JSON
    text of an object become the object, and missing ones an empty object; any other text stays.

    Raises:
        BadRowError: it is something else, or holds a text that is refused.
    """
    calls = _decoded(value) if isinstance(value, str) else value
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise BadRowError("not_a_message", f"{where}: tool_calls is a list of objects, found {kind_of(value)}")
    check_texts_within(calls, where)
    return [_call(_without_nulls(call), where) for call in calls]


def _call(call: dict[str, object], where: str) -> dict[str, object]:
    if "function" not in call and isinstance(call.get("name"), str):
        others = {key: value for key, value in call.items() if key not in ("type", "name", "arguments")}
        call = others | {"function": {key: call[key] for key in ("name", "arguments") if key in call}}
    function = call.get("function")
    if not isinstance(function, dict):
        return call
    arguments = function.get("arguments", "")
    is_blank = isinstance(arguments, str) and not arguments.strip()
    function = function | {"arguments": {} if is_blank else _object_of(arguments, where)}
    return {"type": "function"} | call | {"function": function}


def tools_of(value: object) -> list[dict[str, object]]:
    """Parse tools: a list of JSON schemas, or its JSON text. A schema, or its `parameters`, may be JSON text.

    A function's schema becomes `{"type": "function", "function": {...}}`, as transformers writes it.

    Raises:
        BadRowError: it is something else, or holds a text that is refused.
    """
    tools = _decoded(value) if isinstance(value, str) else value
    schemas = [_object_of(tool, "tools") for tool in tools] if isinstance(tools, list) else [None]
    found = [schema for schema in schemas if isinstance(schema, dict)]
    if len(found) < len(schemas):
        raise BadRowError("not_a_message", f"tools: expected a list of JSON schemas, found {kind_of(value)}")
    check_texts_within(found, "tools")
    return [_tool(_without_nulls(schema)) for schema in found]


def _tool(schema: dict[str, object]) -> dict[str, object]:
    if "function" not in schema and isinstance(schema.get("name"), str):
        schema = {"function": {key: value for key, value in schema.items() if key != "type"}}
    function = schema.get("function")
    if not isinstance(function, dict):
        return schema
    if "parameters" in function:
        function = function | {"parameters": _object_of(function["parameters"], "tools")}
    return {"type": "function"} | schema | {"function": function}


def _object_of(value: object, where: str) -> object:
    """Decode the JSON text of an object; return anything else, such as invalid JSON, as it is."""
    found = value
    while isinstance(found, str):  # some tools encode it twice
        found = _decoded(found)
    if not isinstance(found, dict) or found is value:
        return value
    check_texts_within(found, where)
    return _without_nulls(found)


def _decoded(text: str) -> object:
    """Parse strict JSON, without NaN; None where it is invalid."""
    try:
        value: object = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    return value


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _without_nulls(values: Mapping[str, object]) -> dict[str, object]:
    """Drop null fields at every depth, and write integral floats as integers; nulls in lists stay."""
    return {key: _canonical(value) for key, value in values.items() if value is not None}


def _canonical(value: object) -> object:
    if isinstance(value, dict):
        return _without_nulls(value)
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < MAX_INTEGER:
        return int(value)
    return value
