"""Reads a DeepSpeed config section by section, so that no key is lost. Without torch.

What is mapped is taken out of its section; what is left is reported with a sentence of advice, or
with the nearest known word.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from moeify.errors import PlanError
from moeify.plan import strict_yaml
from moeify.plan.deepspeed.unsupported_keys import Unmapped
from moeify.plan.strict_yaml import Lines, Where

_KINDS: Final[Mapping[str, tuple[tuple[type, ...], str]]] = {
    "flag": ((bool,), "true or false"),
    "count": ((int,), "an integer"),
    "number": ((int, float), "a number"),
    "word": ((str,), "a string"),
    "mapping": ((Mapping,), "a mapping"),
}


@dataclass(slots=True)
class Source:
    """Where a config came from, and what it says that a plan cannot.

    Attributes:
        file: Its file, for messages.
        lines: Line of every place in it.
        notes: A sentence for each key that is not carried over.
    """

    file: str | None = None
    lines: Lines = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def fault(self, where: Where, message: str) -> PlanError:
        """Make an error about a place in the config."""
        inside = where[:1] in self.lines  # arguments beside the config are in no file
        return PlanError(
            message,
            file=self.file if inside else None,
            line=strict_yaml.line_of(where, self.lines) if inside else None,
            path=strict_yaml.path_text(where),
        )

    def note(self, where: Where, text: str) -> None:
        """Report a key."""
        note = f"{strict_yaml.path_text(where)}: {text}"
        if note not in self.notes:
            self.notes.append(note)


class Section:
    """A mapping of the config, from which keys are taken.

    Args:
        source: Where notes and errors go.
        value: The mapping; None is an empty one.
        where: Its place.
        places: Places of keys that stand elsewhere.

    Raises:
        PlanError: It is no mapping, or a key is no string.
    """

    def __init__(
        self,
        source: Source,
        value: Any,
        where: Where = (),
        places: Mapping[str, Where] | None = None,
    ) -> None:
        if value is not None and not isinstance(value, Mapping):
            raise source.fault(where, f"{show(value)} does not fit: expected a mapping")
        self.source, self.where, self._places = source, where, places or {}
        self.left: dict[str, Any] = {}
        for key, each in (value or {}).items():
            if not isinstance(key, str):
                raise source.fault(where, f"the key {key!r} is not a string")
            if isinstance(each, str) and each == "auto":
                source.note(
                    (*where, key),
                    "auto: taken as unset; what would fill it in (Hugging Face's Trainer) is not "
                    "asked",
                )
            elif each is not None:
                self.left[key] = each
        self._seen: list[str] = []

    def at(self, key: str) -> Where:
        """Return the place of a key."""
        return self._places.get(key, (*self.where, key))

    def take(self, key: str, kind: str = "", default: Any = None) -> Any:
        """Take a value out.

        Args:
            key: Its key.
            kind: A word of `_KINDS`, or "" for anything.
            default: What stands for a missing value.

        Raises:
            PlanError: It is of another kind.
        """
        self._seen.append(key)
        if key not in self.left:
            return default
        value = self.left.pop(key)
        if not kind:
            return value
        types, text = _KINDS[kind]
        if not isinstance(value, types) or (isinstance(value, bool) and kind != "flag"):
            raise self.fault(key, f"{show(value)} does not fit: expected {text}")
        return value

    def choice(self, key: str, words: Iterable[str], default: str | None = None) -> str | None:
        """Take a word out that must be one of `words`.

        Raises:
            PlanError: It is another one.
        """
        word: str | None = self.take(key, "word", default)
        allowed = tuple(words)
        if word is not None and word not in allowed:
            raise self.fault(key, f"`{word}` does not fit: expected {', '.join(allowed)}")
        return word

    def section(self, key: str) -> Section:
        """Take a mapping out as a section of its own."""
        return Section(self.source, self.take(key), self.at(key))

    def fault(self, key: str, message: str) -> PlanError:
        """Make an error about a key."""
        return self.source.fault(self.at(key), message)

    def note(self, key: str, text: str) -> None:
        """Report a key."""
        self.source.note(self.at(key), text)

    def report(self, known: Mapping[str, Unmapped]) -> None:
        """Report what nobody took.

        Args:
            known: Advice by key.
        """
        for key, value in self.left.items():
            if key in known:
                if not known[key].is_off(value):
                    self.note(key, known[key].advice.format(value=show(value)))
                continue
            close = difflib.get_close_matches(key, {*known, *self._seen}, n=1, cutoff=0.6)
            guess = f"; did you mean `{close[0]}`?" if close else ""
            self.note(key, f"unknown key, not carried over{guess}")
        self.left.clear()


def show(value: Any) -> str:
    """Write a value briefly, as JSON where that is possible."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = type(value).__name__
    return text if len(text) <= 60 else f"{text[:57]}..."


def read(config: Any) -> tuple[Mapping[str, Any], Source]:
    """Read a config in the forms that DeepSpeed takes.

    Args:
        config: A dict; a path to a JSON file; JSON text; or that in URL-safe base64.

    Returns:
        The data and where it came from.

    Raises:
        PlanError: There is no such file, or it holds no JSON object.
    """
    if isinstance(config, Mapping):
        return config, Source()
    if isinstance(config, os.PathLike):
        config = os.fspath(config)
    elif isinstance(config, str):
        text = config if config.lstrip().startswith("{") else None
        if text is None and not os.path.isfile(config):
            text = _decoded(config)
        if text is not None:
            return _parse(text, "<ds_config>.json", "<ds_config>")
    if not isinstance(config, str):
        raise PlanError(f"a DeepSpeed config is a dict, a path or JSON, not {show(config)}")
    return _parse(strict_yaml.read(config), f"{config}.json", config)


def _parse(text: str, name: str, file: str) -> tuple[Mapping[str, Any], Source]:
    if not text.strip():
        raise PlanError("empty; a DeepSpeed config is a JSON object", file=file, line=1)
    try:
        # Whatever the file is called, it holds JSON.
        data, lines = strict_yaml.load(text, name)
    except PlanError as error:
        raise PlanError(error.message, file=file, line=error.line, path=error.path) from None
    if not isinstance(data, Mapping):
        raise PlanError("a DeepSpeed config is a JSON object", file=file, line=1)
    return data, Source(file, lines)


def _decoded(text: str) -> str | None:
    try:
        decoded = base64.urlsafe_b64decode(text).decode()
    except (binascii.Error, ValueError):
        return None
    return decoded if decoded.lstrip().startswith("{") else None
