"""Read a YAML file of somebody else: plain values alone, within bounds, each key once.

PyYAML's safe loader runs no code, but it follows aliases that repeat each other (a few lines that stand for gigabytes),
keeps the last of two equal keys in silence, and reads 5e-7 as a text. The node graph is checked first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from qpref import opening
from qpref.errors import RecipeError

MAX_BYTES = 256 * 2**10
MAX_NODES = 20_000
"""Most nodes with every alias written out; the longest files of these tools have some hundred."""
MAX_DEPTH = 32


def read_settings(path: Path) -> dict[str, Any]:
    """Read a mapping of texts to values; empty values are left out.

    Raises:
        RecipeError: the file can't be read, is no YAML, larger or deeper than a configuration, has a key twice, or a
            tag that stands for a Python object.
    """
    try:
        text = opening.read_bytes(path, MAX_BYTES, follow=True).decode("utf-8-sig")
        return _settings(text)
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such file") from None
    except opening.NotPlainError as error:
        raise RecipeError(f"{path}: cannot be read: {_size(error.strerror or '')}") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: not UTF-8") from None
    except RecursionError:
        raise RecipeError(f"{path}: nested more than {MAX_DEPTH} deep") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f":{mark.line + 1}" if mark else ""
        raise RecipeError(f"{path}{where}: not plain YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{path}: {' '.join(str(error).split())}") from None


def _size(problem: str) -> str:
    return f"it is larger than {MAX_BYTES // 2**10} KiB" if "larger" in problem else problem


def _settings(text: str) -> dict[str, Any]:
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            raise ValueError("empty: expected `key: value` lines")
        if not isinstance(node, yaml.MappingNode):
            raise ValueError("expected `key: value` lines")
        _check(node, {}, 0)
        values = loader.construct_document(node)
    finally:
        loader.dispose()
    if odd := next((key for key in values if not isinstance(key, str)), None):
        raise ValueError(f"{odd!r}: expected a text as key")
    return {key: value for key, value in values.items() if value is not None and value != ""}


def _check(node: yaml.Node, sizes: dict[int, int], depth: int) -> int:
    """Return the number of nodes under a node with all aliases written out, 0 in `sizes` while it is being counted.

    Raises:
        ValueError: there are too many, they are too deep, a node contains itself, or a mapping has a key twice.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"nested more than {MAX_DEPTH} deep")
    if id(node) in sizes:
        if sizes[id(node)] == 0:
            raise ValueError(f"line {node.start_mark.line + 1}: an alias inside of its own value")
        return sizes[id(node)]
    sizes[id(node)] = 0
    size = 1
    for inner in _inner(node):
        size += _check(inner, sizes, depth + 1)
        if size > MAX_NODES:
            raise ValueError(f"more than {MAX_NODES:,} values, aliases written out")
    sizes[id(node)] = size
    return size


def _inner(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        return list(node.value)
    if not isinstance(node, yaml.MappingNode):
        return []
    seen: set[str] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.value != "<<":
            if key.value in seen:
                raise ValueError(f"line {key.start_mark.line + 1}: {key.value} is there twice")
            seen.add(key.value)
    return [one for pair in node.value for one in pair]
