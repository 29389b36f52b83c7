"""JSON Schema of a recipe, for editors and validators: the core's tables, and the options of the installed plugins."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from qpref.errors import PluginError
from qpref.hooks import manager
from qpref.hooks.manager import Kind, Loaded, PluginHost
from qpref.recipe.loss_section import LossSection
from qpref.recipe.resolved_document import DEFAULT_VALIDATOR
from qpref.recipe.schedule import Schedule, can_be_scheduled
from qpref.recipe.sections import Recipe, SinkSection

DIALECT = GenerateJsonSchema.schema_dialect
Json = dict[str, Any]


def recipe_schema(host: PluginHost, distribution: str | None = None) -> Json:
    """Return the schema of a recipe, draft 2020-12.

    Every key has its description, type, range and default, as the models have them. Rules between keys, and paths, are
    in no schema: `qpref train --dry-run` checks them too.

    Args:
        distribution: plugins of this one alone; None takes all that can be loaded.
    """
    schema = TypeAdapter(Recipe).json_schema()
    tables = schema["properties"]
    losses = _plugins(host, manager.LOSS, distribution)
    checks = _plugins(host, manager.CHECK, distribution)
    sinks = _plugins(host, manager.SINK, distribution)
    table = {"oneOf": [_named(loss, LossSection) for loss in losses]}
    schema["$defs"]["Loss"] = table
    schema["$defs"]["Schedule"] = Schedule.model_json_schema()
    one = {"$ref": "#/$defs/Loss"}
    tables["loss"] = {
        "description": "The loss, or with [[loss]] the terms of a weighted sum.",
        "anyOf": [one, {"type": "array", "items": one, "minItems": 1}],
    }
    tables["checks"] = _checks(checks)
    tables["sinks"] = {
        "description": "Metric sinks. metrics.jsonl is written whatever they are.",
        "type": "array",
        "items": {"oneOf": [_named(sink, SinkSection) for sink in sinks]},
        "default": [{"name": "console"}],
    }
    readers = [reader for reader in _plugins(host, manager.READER, distribution) if reader.record.options is not None]
    for name in ("DataSection", "SourceSection"):
        schema["$defs"][name]["properties"]["reader"]["anyOf"] = [{"type": "string"}, *_reader_tables(readers)]
    rewards = [_named(reward) for reward in _plugins(host, manager.REWARD, distribution)]
    schema["$defs"]["RoundsSection"]["properties"]["reward"]["anyOf"] = [{"type": "string"}, *rewards]
    for name in ("LossSection", "SinkSection"):
        schema["$defs"].pop(name, None)
    return {"$schema": DIALECT, "title": "A recipe of qpref"} | schema


def _plugins(host: PluginHost, kind: Kind, distribution: str | None) -> list[Loaded]:
    offers = [offer for offer in host.offers if offer.kind == kind.prefix]
    return list(_loaded(host, kind, [offer.name for offer in offers if distribution in (None, offer.distribution)]))


def _loaded(host: PluginHost, kind: Kind, names: Iterable[str]) -> Iterable[Loaded]:
    for name in sorted(set(names)):
        try:
            yield host.load(kind, name)
        except PluginError:
            continue


def _named(plugin: Loaded, section: type[BaseModel] | None = None) -> Json:
    """Return the schema of a plugin's table: `name`, the core's own keys, and the options."""
    record = plugin.record
    own = {} if section is None else section.model_json_schema()["properties"]
    is_loss = section is LossSection
    name = {"const": record.name, "description": record.summary, "type": "string"}
    options = with_schedules(_options(record.options), record.options) if is_loss else _options(record.options)
    return {
        "title": record.name,
        "description": record.summary,
        "type": "object",
        "properties": {**own, "name": name, **options["properties"]},
        "required": ["name", *options.get("required", [])],
        "additionalProperties": False,
    }


def _options(model: type[BaseModel]) -> Json:
    """Return the schema of an options model; a numeric option of a loss may be a schedule."""
    schema = model.model_json_schema(ref_template="#/$defs/{model}")
    inline = schema.pop("$defs", {})
    properties = _inlined(schema.get("properties", {}), inline)
    return {"properties": properties, "required": schema.get("required", [])}


def _inlined(value: Any, definitions: Json) -> Any:
    """Replace references to a model's own definitions, which have no place of their own in the recipe's schema."""
    if isinstance(value, dict):
        if "$ref" in value:
            found = _inlined(definitions[value["$ref"].rpartition("/")[2]], definitions)
            return {**found, **{key: one for key, one in value.items() if key != "$ref"}}
        return {key: _inlined(one, definitions) for key, one in value.items()}
    return [_inlined(one, definitions) for one in value] if isinstance(value, list) else value


def _checks(plugins: list[Loaded]) -> Json:
    """Return the schema of `[checks]`: the options of the default validator, and a table for each of the others."""
    properties: Json = {}
    for plugin in plugins:
        options = _options(plugin.record.options)
        table = {"type": "object", "description": plugin.record.summary, **options, "additionalProperties": False}
        properties[plugin.record.name] = table
        if plugin.record.name == DEFAULT_VALIDATOR:
            properties = options["properties"] | properties
    return {
        "description": "Options of the checks of the data; any check but the default ones runs where it has a table.",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }


def _reader_tables(plugins: list[Loaded]) -> list[Json]:
    """Return the schemas of `[data.reader]`: for readers without options, and for each reader with some."""
    tables = [{"type": "object", "properties": {"name": {"type": "string"}}, "additionalProperties": False}]
    for plugin in plugins:
        options = _options(plugin.record.options)
        name = {"const": plugin.record.name, "type": "string"}
        tables.append(
            {
                "title": plugin.record.name,
                "description": plugin.record.summary,
                "type": "object",
                "properties": {"name": name, **options["properties"]},
                "required": options["required"],
                "additionalProperties": False,
            }
        )
    return tables


def with_schedules(schema: Json, model: type[BaseModel]) -> Json:
    """Let each numeric option be a table `{ start, end, schedule }` too."""
    for name, option in schema["properties"].items():
        if name in model.model_fields and can_be_scheduled(model, name):
            description = option.pop("description", "")
            schema["properties"][name] = {
                "description": description,
                "anyOf": [option, {"$ref": "#/$defs/Schedule"}],
            }
    return schema
