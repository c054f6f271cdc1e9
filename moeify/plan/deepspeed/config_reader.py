"""Read a DeepSpeed config section by section, so that no key is lost. Without torch.

What is mapped is taken out of its section. What is left is reported with a sentence of advice, or
with the nearest known key.
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
    """Where a config came from, and notes on what a plan cannot express."""

    file: str | None = None
    lines: Lines = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # a sentence for each key not carried over

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
        """Note what becomes of a key, once."""
        note = f"{strict_yaml.path_text(where)}: {text}"
        if note not in self.notes:
            self.notes.append(note)


class Section:
    """A mapping of the config, from which keys are taken; `places` has those of keys elsewhere."""

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
                    "auto: taken as unset; Hugging Face's Trainer, which would fill it in, is not "
                    "consulted",
                )
            elif each is not None:
                self.left[key] = each
        self._seen: list[str] = []

    def at(self, key: str) -> Where:
        return self._places.get(key, (*self.where, key))

    def take(self, key: str, kind: str = "", default: Any = None) -> Any:
        """Take a value out; `kind` is a key of `_KINDS`, or "" for anything."""
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
        """Take a word out that must be one of `words`."""
        word: str | None = self.take(key, "word", default)
        allowed = tuple(words)
        if word is not None and word not in allowed:
            raise self.fault(key, f"`{word}` does not fit: expected {', '.join(allowed)}")
        return word

    def section(self, key: str) -> Section:
        """Take a mapping out as a section of its own."""
        return Section(self.source, self.take(key), self.at(key))

    def fault(self, key: str, message: str) -> PlanError:
        return self.source.fault(self.at(key), message)

    def note(self, key: str, text: str) -> None:
        self.source.note(self.at(key), text)

    def report(self, known: Mapping[str, Unmapped]) -> None:
        """Note every key that was not taken, with the advice for it where there is one."""
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
    """Return a short text of a value, as JSON where that is possible."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = type(value).__name__
    return text if len(text) <= 60 else f"{text[:57]}..."


def read(config: Any) -> tuple[Mapping[str, Any], Source]:
    """Read a dict, a path to a JSON file, JSON text, or that in URL-safe base64.

    Raises:
        PlanError: The file does not exist, or does not hold a JSON object.
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
        # `name` ends in .json, so that the file is read as JSON whatever it is called.
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
