"""Turn what pydantic found into one `PlanError` with file, line and place."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from moeify.errors import PlanError
from moeify.plan.strict_yaml import Lines, Where, line_of, path_text

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

_SELECT = (
    "all, {every: 2, start: 1}, {first: 3}, {last: 2}, {half: second}, {index: [1, 3]}"
    ' or {name: "*.h.7.mlp"}'
)
_ALLOWED = {
    "layers": "a list of rules such as {select: all, experts: 8}",
    "layers.select": _SELECT,
    "layers.select.index": "an integer or a list of integers",
    "layers.select.name": "a string or a list of strings",
    "layers.experts": "an integer of at least 1, dense, or {from: 32, to: 64, shape: step}",
    "parallel.coordinated": "auto, true or false",
    "version": "1",
}
"""What a field accepts, where the type that pydantic tried last is only part of the answer."""

_TYPES: Mapping[str, str] = {
    "int_type": "an integer",
    "int_parsing_size": "a smaller integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a string",
    "tuple_type": "a list",
    **dict.fromkeys(("model_type", "model_attributes_type", "dict_type"), "a mapping"),
    "greater_than_equal": "at least {ge}",
    "greater_than": "more than {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "less than {lt}",
    "literal_error": "{expected}",
    "too_short": "at least {min_length} item",
    "string_unicode": "text without half of a surrogate pair",
    "string_too_short": "some text",
}
"""What fits instead, by pydantic's error type, with the fields of its context."""

_BOUNDS = frozenset(("less_than_equal", "too_short", "string_too_short", "string_unicode"))
_BOOLEAN_WORDS = frozenset(("yes", "no", "on", "off", "y", "n"))
_NUMBER_LIKE = re.compile(r"[-+]?(0x|0o)?[0-9][0-9_:.eE+-]*")


def plan_error(
    error: ValidationError, known: Mapping[str, tuple[str, ...]], lines: Lines, file: str | None
) -> PlanError:
    """Translate a failed validation: the first finding in full, any others on lines of their own.

    `known` has the allowed keys of every mapping in a plan, by dotted path without positions.
    """
    found: list[tuple[bool, int, Where, str]] = []
    for details in error.errors(include_url=False):
        where = tuple(
            part for part in details["loc"] if isinstance(part, int) or not part.startswith("<")
        )
        # A key is often missing because it was misspelt, so that finding comes later; the rest
        # is in the order of lines, as a reader meets it.
        late, line = details["type"] == "missing", line_of(where, lines) or 0
        found.append((late, line, where, _message(details, where, known)))
    found.sort(key=lambda finding: finding[:2])
    _, line, where, message = found[0]
    for _, other_line, other_where, other in found[1:]:
        prefix = f"line {other_line}: " if other_line else ""
        message += f"\n  also {prefix}{path_text(other_where)}: {other}"
    return PlanError(message, file=file, line=line or None, path=path_text(where))


def _message(details: ErrorDetails, where: Where, known: Mapping[str, tuple[str, ...]]) -> str:
    dotted = ".".join(part for part in where if isinstance(part, str))
    parent = ".".join(part for part in where[:-1] if isinstance(part, str))
    kind, context, given = details["type"], details.get("ctx", {}), details["input"]
    if kind == "plan":
        return details["msg"]
    if kind == "missing":
        return f"is missing; it takes {_ALLOWED[dotted]}" if dotted in _ALLOWED else "is missing"
    if kind in ("extra_forbidden", "invalid_key"):
        return unknown(str(where[-1]), known.get(parent, ()), "key")
    expected = _TYPES[kind].format(**context) if kind in _TYPES else details["msg"]
    if kind == "literal_error":
        expected = expected.replace("'", "")
    # A violated bound is specific enough; a wrong type is reported with all accepted forms.
    if kind not in _BOUNDS and isinstance(where[-1] if where else None, str):
        expected = _ALLOWED.get(dotted, expected)
    return f"{_show(given)} does not fit: expected {expected}{_hint(given, kind, context)}"


def guess(word: str, known: Iterable[str]) -> str:
    """Return "did you mean `x`? " for the nearest known word, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"did you mean `{close[0]}`? " if close else ""


def unknown(word: str, known: tuple[str, ...], what: str) -> str:
    """Return the message for a word that is not allowed; `what` is its kind, such as "key"."""
    return f"unknown {what} `{word}`; {guess(word, known)}allowed: {', '.join(known)}"


def _show(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"{json.dumps(value)} (a boolean)"
    if isinstance(value, str):
        return f"{_cut(repr(value))} (a string)"
    return _cut(repr(value))


def _cut(text: str, width: int = 60) -> str:
    return text if len(text) <= width else f"{text[: width - 3]}..."


def _hint(given: Any, kind: str, context: Mapping[str, Any]) -> str:
    if not isinstance(given, str):
        return ""
    if given.lower() in _BOOLEAN_WORDS:
        return "; YAML 1.2 reads this word as a string: write true, false, null or a listed word"
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", str(context["expected"]))
        close = difflib.get_close_matches(given, choices, n=1, cutoff=0.5)
        return f"; did you mean {close[0]}?" if close else ""
    if _NUMBER_LIKE.fullmatch(given):
        return "; write a plain decimal number: no quotes, leading zeros, `_` or `:`"
    return ""
