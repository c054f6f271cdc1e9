"""YAML and JSON for plans, read strictly: nothing is guessed, and every value knows its line.

PyYAML follows YAML 1.1, where `no` is false, `1e-3` a string, `010` eight, `1:30` ninety, and the
last of two equal keys wins. Here scalars follow YAML 1.2, and duplicate keys and ambiguous numbers
are errors that name their line. Parsing walks PyYAML's flat stream of events without recursion, so
neither deep nesting nor an alias bomb does harm. Importable without torch.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import yaml

from moeify.atomic_file import replace_file
from moeify.errors import PlanError

Where: TypeAlias = tuple[str | int, ...]
"""Place of a value: keys and positions from the root, such as `("layers", 1, "select")`."""

Lines: TypeAlias = Mapping[Where, int]
"""1-based line of every key and every list item."""

MAX_BYTES: Final = 1 << 20
_TOO_LONG: Final = "longer than 1 MiB; a plan is a few lines"
MAX_DEPTH: Final = 32
MAX_NODES: Final = 50_000

_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS: Final[dict[str, bool | None]] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]|[^\s"\[\]{},:]+|\n', re.DOTALL)


def path_text(where: Where) -> str:
    """Return a place as text such as `layers[1].select`; empty for the root."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where)
    return text.removeprefix(".")


def line_of(where: Where, lines: Lines) -> int | None:
    """Return the 1-based line of a place, or of the nearest one around it; None if unknown."""
    for end in range(len(where), -1, -1):
        if (line := lines.get(where[:end])) is not None:
            return line
    return None


def plain(text: str) -> str | int | float | bool | None:
    """Resolve an unquoted scalar by YAML 1.2, without octal, hexadecimal, `_` or `:` numbers.

    Raises:
        ValueError: It is a number that is not finite, or an integer beyond 64 bits.
    """
    if text in _WORDS:
        return _WORDS[text]
    if _NOT_FINITE.fullmatch(text):
        raise ValueError(f"{text} is not a finite number")
    if _INT.fullmatch(text):
        # Counted first: Python refuses, with an error of its own, to read very long integers.
        if len(text) > 20 or abs(int(text)) >= 1 << 63:
            raise ValueError("the integer does not fit 64 bits")
        return int(text)
    if _FLOAT.fullmatch(text):
        if not math.isfinite(value := float(text)):
            raise ValueError(f"{text} is out of range")
        return value
    return text


def read(path: str | os.PathLike[str]) -> str:
    """Read a plan's text.

    Raises:
        PlanError: It is missing, not a file, longer than 1 MiB, or not UTF-8.
    """
    file = os.fspath(path)
    try:
        with Path(file).open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise PlanError("there is no such file", file=file) from None
    except IsADirectoryError:
        raise PlanError("this is a directory; name the plan file in it", file=file) from None
    except (OSError, ValueError) as error:
        raise PlanError(f"cannot be read: {error}", file=file) from error
    if len(raw) > MAX_BYTES:
        raise PlanError(_TOO_LONG, file=file)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise PlanError("not UTF-8 text; save the file as UTF-8", file=file, line=line) from None


def load(text: str, file: str | None = None) -> tuple[Any, Lines]:
    """Parse YAML, or JSON if the file's name ends in `.json`; return data and lines.

    Raises:
        PlanError: The text is not a single document of the strict subset; names file and line.
    """
    builder = _Builder(file)
    if len(text) > MAX_BYTES:
        raise PlanError(_TOO_LONG, file=file)
    if file is not None and file.lower().endswith(".json"):
        _load_json(text, builder)
    else:
        _load_yaml(text, builder)
    if builder.root is None:
        raise PlanError("empty; a plan needs at least `layers`", file=file, line=1)
    return builder.root, builder.lines


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that would be read as something else, such as `1e-3`."""


def _represent_str(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    try:
        # Only double quotes escape U+0085 and its like, which other styles fold as line breaks.
        safe = text.isprintable() and isinstance(plain(text), str)
    except ValueError:
        safe = False
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if safe else '"')


_Dumper.add_representer(str, _represent_str)


def dump(data: Any, file: str) -> str:
    """Return dicts, lists and scalars as text that `load` reads back; JSON for a `.json` file."""
    if file.lower().endswith(".json"):
        return json.dumps(data, indent=2, allow_nan=False) + "\n"
    return yaml.dump(
        data, Dumper=_Dumper, sort_keys=False, default_flow_style=None, allow_unicode=True, width=99
    )


def write(path: str | os.PathLike[str], text: str) -> None:
    """Write a file, all or nothing.

    Raises:
        PlanError: It cannot be written; an older file is left as it was.
    """
    file = os.fspath(path)
    try:
        replace_file(Path(file).resolve(), text.encode())
    except (OSError, ValueError) as error:
        raise PlanError(f"cannot be written: {error}", file=file) from error


@dataclass(slots=True)
class _Frame:
    """A list or mapping that is still open."""

    container: dict[str, Any] | list[Any]
    where: Where
    key: str | None = None  # waits for its value


class _Builder:
    """Build data from a flat stream of openings, closings and scalars."""

    def __init__(self, file: str | None) -> None:
        self.file = file
        self.root: Any = None
        self.lines: dict[Where, int] = {}
        self._stack: list[_Frame] = []
        self._nodes = 0

    def error(self, message: str, line: int | None) -> PlanError:
        """Make an error at a line, in the innermost open container."""
        frame = self._stack[-1] if self._stack else None
        return PlanError(
            message, file=self.file, line=line, path=path_text(frame.where) if frame else ""
        )

    def open(self, container: dict[str, Any] | list[Any], line: int) -> None:
        if self._wants_key():
            raise self.error("a key must be a string, not a collection", line)
        if len(self._stack) >= MAX_DEPTH:
            raise PlanError(f"nested deeper than {MAX_DEPTH} levels", file=self.file, line=line)
        self._stack.append(_Frame(container, self._attach(container, line)))

    def close(self) -> None:
        self._stack.pop()

    def scalar(self, value: str | int | float | bool | None, line: int) -> None:
        if isinstance(value, str) and not _is_unicode(value):
            raise self.error("a string holds half of a surrogate pair", line)
        if self._wants_key():
            self._key(value, line)
        else:
            self._attach(value, line)

    def _wants_key(self) -> bool:
        if not self._stack:
            return False
        frame = self._stack[-1]
        return isinstance(frame.container, dict) and frame.key is None

    def _key(self, key: str | int | float | bool | None, line: int) -> None:
        frame = self._stack[-1]
        if not isinstance(key, str):
            shown = json.dumps(key)
            raise self.error(f"the key {shown} is not a string; quote it if it is meant", line)
        where = (*frame.where, key)
        if where in self.lines:
            raise self.error(f"the key `{key}` is already set on line {self.lines[where]}", line)
        frame.key = key
        self.lines[where] = line

    def _attach(self, value: Any, line: int) -> Where:
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise PlanError(f"more than {MAX_NODES} values", file=self.file, line=line)
        if not self._stack:
            self.root = value
            self.lines[()] = line
            return ()
        frame = self._stack[-1]
        if isinstance(frame.container, list):
            where = (*frame.where, len(frame.container))
            frame.container.append(value)
            self.lines[where] = line
            return where
        assert frame.key is not None
        where, frame.container[frame.key] = (*frame.where, frame.key), value
        frame.key = None
        return where


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= char <= "\udfff" for char in text)


def _load_yaml(text: str, builder: _Builder) -> None:
    try:
        documents = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            line = event.start_mark.line + 1 if event.start_mark is not None else 0
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise builder.error(
                        "a second document starts here; a plan is one document", line
                    )
            elif isinstance(event, yaml.NodeEvent):
                _yaml_node(event, line, builder)
            elif isinstance(event, yaml.CollectionEndEvent):
                builder.close()
    except PlanError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        message = ", ".join(part for part in (error.context, error.problem) if part)
        at = mark.line + 1 if mark is not None else None
        raise builder.error(f"not valid YAML: {message}", at) from None
    except yaml.reader.ReaderError as error:
        at = text.count("\n", 0, error.position) + 1
        raise builder.error(f"not valid YAML: {error.reason}", at) from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        # PyYAML lets some malformed escapes through to `chr`, which raises plain ValueErrors.
        raise builder.error(f"not valid YAML: {error}", None) from None


def _yaml_node(event: yaml.NodeEvent, line: int, builder: _Builder) -> None:
    if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
        raise builder.error("anchors and aliases (`&a`, `*a`) are not allowed; write it out", line)
    if isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent) and event.tag is not None:
        raise builder.error(f"the tag {event.tag} is not allowed; a plan is plain data", line)
    if isinstance(event, yaml.MappingStartEvent):
        builder.open({}, line)
    elif isinstance(event, yaml.SequenceStartEvent):
        builder.open([], line)
    elif isinstance(event, yaml.ScalarEvent):
        # An unquoted scalar has style None; a quoted or block one is always a string.
        if event.style is not None:
            builder.scalar(event.value, line)
        elif event.value == "<<":
            raise builder.error("merge keys (`<<`) are not allowed; write it out", line)
        else:
            builder.scalar(_resolve(event.value, line, builder), line)


def _resolve(text: str, line: int, builder: _Builder) -> str | int | float | bool | None:
    try:
        return plain(text)
    except ValueError as error:
        raise builder.error(str(error), line) from None


def _load_json(text: str, builder: _Builder) -> None:
    if not text.strip():
        return
    try:
        # Only the grammar is asked for here: values, and their lines, come from the tokens.
        json.loads(text, parse_int=str, parse_float=str)
    except json.JSONDecodeError as error:
        raise builder.error(f"not valid JSON: {error.msg}", error.lineno) from None
    except RecursionError:
        raise builder.error(f"nested deeper than {MAX_DEPTH} levels", None) from None
    line = 1
    for match in _JSON_TOKEN.finditer(text):
        _json_token(match.group(), line, builder)
        line += match.group() == "\n"


def _json_token(token: str, line: int, builder: _Builder) -> None:
    if token == "\n":
        return
    if token in "[{":
        builder.open([] if token == "[" else {}, line)
    elif token in "]}":
        builder.close()
    elif token.startswith('"'):
        builder.scalar(json.loads(token), line)
    elif token in ("NaN", "Infinity", "-Infinity"):
        raise builder.error(f"{token} is not a finite number", line)
    else:
        builder.scalar(_resolve(token, line, builder), line)
