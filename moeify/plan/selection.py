"""Which sites a rule means, and how many experts each of them gets. Importable without torch."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from math import log2
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

MAX_INT = 2**31 - 1
"""Largest count: expert ids are int32."""

Count: TypeAlias = Annotated[int, Field(ge=1, le=MAX_INT)]
Natural: TypeAlias = Annotated[int, Field(ge=0, le=MAX_INT)]


class Strict(BaseModel):
    """Base of every part of a plan: immutable, nothing coerced, nothing unknown."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


def _tuple_of_list(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


LISTED = BeforeValidator(_tuple_of_list)
"""Takes a list where the model keeps a tuple, so that plans are immutable throughout."""


def _check_pattern(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("plan", "holds half of a surrogate pair") from None
    if text.startswith("re:"):
        try:
            _compiled(text[3:])
        except ValueError as error:
            context = {"text": text, "error": str(error)}
            raise PydanticCustomError(
                "plan", "`{text}` is not a regular expression: {error}", context
            ) from None
    return text


def _compiled(pattern: str) -> Any:
    """Compile a regular expression for an engine whose time is linear in the name's length.

    Plans come from anywhere, and Python's own engine can be held for hours by a few characters. The
    price is that lookaround and back references are not known.
    """
    import re2

    options = re2.Options()
    options.log_errors = False
    try:
        return re2.compile(pattern, options)
    except re2.error as error:
        reason = error.args[0] if error.args else error
        text = reason.decode(errors="replace") if isinstance(reason, bytes) else str(reason)
        raise ValueError(f"{text} (the syntax is RE2's)") from None


def _one_or_many(value: Any) -> str:
    # Tags are written in angle brackets so that error paths can be cleaned of them.
    return "<many>" if isinstance(value, list | tuple) else "<one>"


_Index: TypeAlias = Annotated[int, Field(ge=-MAX_INT, le=MAX_INT)]
_Pattern: TypeAlias = Annotated[str, Field(min_length=1), AfterValidator(_check_pattern)]
_Indices: TypeAlias = Annotated[
    Annotated[_Index, Tag("<one>")]
    | Annotated[tuple[_Index, ...], LISTED, Field(min_length=1), Tag("<many>")],
    Discriminator(_one_or_many),
]
_Patterns: TypeAlias = Annotated[
    Annotated[_Pattern, Tag("<one>")]
    | Annotated[tuple[_Pattern, ...], LISTED, Field(min_length=1), Tag("<many>")],
    Discriminator(_one_or_many),
]

SELECTORS = ("every", "first", "last", "half", "index", "name")


def require_exactly_one(given: Sequence[str], keys: Sequence[str]) -> None:
    """Refuse a mapping that has none or several of `keys`."""
    if len(given) != 1:
        found = " and ".join(f"`{key}`" for key in given) or "none"
        context = {"keys": ", ".join(keys), "found": found}
        raise PydanticCustomError("plan", "needs exactly one of {keys}; found {found}", context)


class Select(Strict):
    """Sites chosen by exactly one of `every`, `first`, `last`, `half`, `index`, `name`.

    Attributes:
        every: Every n-th site, from `start` on: `{every: 2, start: 1}` is the 2nd, 4th, ...
        start: 0-based position of the first site that `every` takes.
        first: This many sites from the beginning.
        last: This many sites at the end.
        half: The first half of the sites (with the middle one), or the second.
        index: 0-based position or positions; negative ones count from the end.
        name: Site name, glob such as `*.h.7.mlp`, or `re:` and a regular expression (RE2) for the
            whole name; or a list of these, each of which must match.
        of: Count over `all` sites of the model, or over those `selected` by the rules above.
    """

    every: Count = 1
    start: Natural = 0
    first: Count = 1
    last: Count = 1
    half: Literal["first", "second"] = "first"
    index: _Indices = 0
    name: _Patterns = "*"
    of: Literal["all", "selected"] = "all"

    @model_validator(mode="after")
    def _exactly_one(self) -> Select:
        given = [key for key in SELECTORS if key in self.model_fields_set]
        require_exactly_one(given, SELECTORS)
        if "start" in self.model_fields_set and given != ["every"]:
            raise PydanticCustomError("plan", "`start` goes with `every` only")
        return self

    @property
    def key(self) -> str:
        """The one selector that was given."""
        return next(key for key in SELECTORS if key in self.model_fields_set)

    @property
    def patterns(self) -> tuple[str, ...]:
        """The patterns of `name`."""
        return (self.name,) if isinstance(self.name, str) else self.name

    def positions(self, count: int) -> tuple[int, ...]:
        """Return the chosen positions in a sequence, ascending from 0; not for `name`.

        Raises:
            IndexError: An `index` is out of range; its argument is that index.
        """
        everything = range(count)
        match self.key:
            case "every":
                return tuple(everything[self.start :: self.every])
            case "first":
                return tuple(everything[: self.first])
            case "last":
                return tuple(everything[max(0, count - self.last) :])
            case "half":
                middle = (count + 1) // 2
                return tuple(everything[:middle] if self.half == "first" else everything[middle:])
        chosen = (self.index,) if isinstance(self.index, int) else self.index
        for index in chosen:
            if not -count <= index < count:
                raise IndexError(index)
        return tuple(sorted({index % count for index in chosen}))


class Schedule(Strict):
    """Expert counts that change over the sites a rule selects, in execution order.

    Attributes:
        from_: Count of the first site (`from` in a plan).
        to: Count of the last site.
        shape: `step`: `from` in the first half (with the middle one), `to` in the second; `linear`:
            evenly spaced, rounded; `geometric`: evenly spaced ratios, rounded, to powers of two if
            both ends are such.
    """

    from_: Count = Field(alias="from")
    to: Count
    shape: Literal["step", "linear", "geometric"] = "step"

    def spread(self, count: int) -> tuple[int, ...]:
        """Return the expert count of each of `count` sites; a single site gets `from`."""
        return tuple(self._at(position, count - 1) for position in range(count))

    def _at(self, position: int, last: int) -> int:
        low, high = self.from_, self.to
        if last <= 0 or self.shape == "step":
            return low if 2 * position <= last else high
        if self.shape == "linear":
            return _between(low, high, position, last)
        if low.bit_count() == high.bit_count() == 1:
            return 1 << _between(low.bit_length(), high.bit_length(), position, last) - 1
        exponent = log2(low) + (log2(high) - log2(low)) * position / last
        return min(max(round(2**exponent), min(low, high)), max(low, high))


def _between(low: int, high: int, position: int, last: int) -> int:
    """Round `low + (high - low) * position / last` to the nearest integer, halves up."""
    return (2 * low * last + 2 * (high - low) * position + last) // (2 * last)


def matches(pattern: str, name: str) -> bool:
    """Tell whether a pattern (a glob, or `re:` and a regular expression) matches a whole name."""
    if pattern.startswith("re:"):
        return _compiled(pattern[3:]).fullmatch(name) is not None
    return fnmatchcase(name, pattern)


def nearest(word: str, known: Collection[str], limit: int = 3) -> str:
    """Suggest up to `limit` known names close to a word, or list a few if none is close."""
    close = difflib.get_close_matches(word, list(known), n=limit, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(f'`{name}`' for name in close)}?"
    return f"there are {shorten([f'`{name}`' for name in known], limit + 1)}"


def shorten(words: Sequence[str], limit: int) -> str:
    """Join words with commas, leaving out the middle ones where there are more than `limit`."""
    if len(words) <= limit:
        return ", ".join(words)
    return ", ".join([*words[: limit - 1], "...", words[-1]])
