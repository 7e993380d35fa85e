"""Config nodes to dataclasses: every key is read or refused, with the nearest one that exists.

Imports nothing but the standard library, so that a misspelt key is reported at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class ConfigError(ValueError):
    """A config node has an unknown, missing or unusable key."""


def unknown_key(key: str, valid: Iterable[str], where: str) -> ConfigError:
    """The error for a key that nothing reads, with the nearest one that is read.

    >>> print(unknown_key("sead", ["seed", "name"], "config"))
    config: unknown key 'sead'; did you mean 'seed'? (known: name, seed)
    """
    known = sorted(valid)
    near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return ConfigError(f"{where}: unknown key {shown(key)}{hint} (known: {', '.join(known)})")


def shown(value: Any) -> str:
    """A value for an error message: cut where it is long, and a number of thousands of digits is no error of its own.

    >>> shown("a" * 200)[-10:]
    'aaaaaaa...'
    """
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write out such a number
        return f"a number of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:97]}..."


def check_keys(node: Mapping[str, Any], valid: Iterable[str], where: str) -> None:
    """Refuse a node that is no group of keys, or has one that is not valid."""
    known = list(valid)
    if not isinstance(node, Mapping):
        raise ConfigError(f"{where} must be a mapping of keys to values (known: {', '.join(known)}), got {shown(node)}")
    for key in node:
        if key not in known:
            raise unknown_key(str(key), known, where)


def flattened(node: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested mappings, by dotted key; a list is a leaf.

    >>> flattened({"a": {"b": 1}, "c": [2]}, "config")
    {'config.a.b': 1, 'config.c': [2]}
    """
    if not isinstance(node, Mapping) or not node:
        return {prefix: node}
    inside = f"{prefix}." if prefix else ""
    return {key: value for name, child in node.items() for key, value in flattened(child, f"{inside}{name}").items()}


def parse(cls: type[T], node: Mapping[str, Any] | None, where: str) -> T:
    """Build a dataclass from a config node, nested dataclasses included.

    Args:
        cls: the dataclass. Its fields are str, bool, int, float, list[str] (a single string will do), dataclasses, or
            one of these or None; what must hold between them its ``__post_init__`` checks, with a ValueError.
        node: a mapping or OmegaConf node; None means all defaults.
        where: the node's path in the config, for errors.

    Raises:
        ConfigError: a key that the dataclass lacks, a missing key without a default, or a value that its field's type
            refuses.
    """
    node = {} if node is None else node
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    check_keys(node, fields, where)
    values = {key: _convert(hints[key], value, f"{where}.{key}") for key, value in node.items()}
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where} lacks the key {name!r}")
    try:
        return cls(**values)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def _convert(annotation: Any, value: Any, where: str) -> Any:
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    if value is None and type(None) in options:
        return None
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    for option in options:
        if dataclasses.is_dataclass(option):
            return parse(option, value, where)  # type: ignore[arg-type]
        if option is float and number and abs(value) <= sys.float_info.max:
            return float(value)
        if option is float and isinstance(value, float):  # infinite, or not a number
            return value
        if option is int and number and (isinstance(value, int) or value.is_integer()):
            return int(value)
        if option in (str, bool) and isinstance(value, option):
            return value
        if typing.get_origin(option) is list:
            strings = [value] if isinstance(value, str) else value
            if isinstance(strings, typing.Sequence) and strings and all(isinstance(s, str) and s for s in strings):
                return list(strings)
    wanted = " or ".join(_NAMES.get(o, "a text or a list of them") for o in options)
    raise ConfigError(f"{where} must be {wanted}, got {shown(value)}")


_NAMES = {str: "a text", bool: "true or false", int: "a whole number", float: "a number", type(None): "null"}
