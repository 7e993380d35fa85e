"""Config nodes to dataclasses: every key is read or refused."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def unknown_key(key: str, valid: typing.Iterable[str], where: str) -> ValueError:
    """The error for a key that nothing reads, with the nearest one that is read."""
    near = difflib.get_close_matches(key, list(valid), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return ValueError(f"{where}: unknown key {key!r}{hint} (known: {', '.join(sorted(valid))})")


def parse(cls: type[T], node: Mapping[str, Any] | None, where: str) -> T:
    """Build a dataclass from a config node, nested dataclasses included.

    Args:
        cls: the dataclass.
        node: a mapping or OmegaConf node; None means all defaults.
        where: the node's path in the config, for errors.

    Raises:
        ValueError: a key that the dataclass lacks, a missing key without a default, or a value that its field's type
        refuses.
    """
    if node is None:
        node = {}
    if not isinstance(node, Mapping) and not hasattr(node, "items"):
        raise ValueError(f"{where}: expected a group of keys, got {node!r}")
    types = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in node.items():
        if key not in fields:
            raise unknown_key(str(key), fields, where)
        values[key] = _convert(types[key], value, f"{where}.{key}")
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{where}: the key {name!r} is missing")
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _convert(annotation: Any, value: Any, where: str) -> Any:
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    if value is None and type(None) in options:
        return None
    for option in options:
        if dataclasses.is_dataclass(option):
            return parse(option, value, where)  # type: ignore[arg-type]
        if option is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if option is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if option in (str, bool) and isinstance(value, option):
            return value
    raise ValueError(f"{where}: expected {getattr(annotation, '__name__', annotation)}, got {value!r}")
