"""Strict YAML and JSON: what is read, and that every refusal names its line."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from moeify.errors import PlanError
from moeify.plan import strict_yaml
from moeify.plan.strict_yaml import MAX_BYTES, MAX_DEPTH, line_of, load, path_text, plain

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63) + 1, 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
)
DATA = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text("abc:#no -1", min_size=1), inner, max_size=3)
    ),
    max_leaves=8,
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("12", 12),
        ("-3", -3),
        ("+3", 3),
        ("0", 0),
        ("1e-3", 1e-3),
        ("1.", 1.0),
        (".5", 0.5),
        ("-1.5E+2", -150.0),
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("010", "010"),
        ("0o10", "0o10"),
        ("0x1f", "0x1f"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("nan", "nan"),
        ("1e", "1e"),
    ],
)
def test_plain_scalars_follow_yaml_1_2(text: str, value: Any) -> None:
    assert plain(text) == value
    assert type(plain(text)) is type(value)


@pytest.mark.parametrize("text", [".nan", ".NaN", ".inf", "-.Inf", "1e999", "9" * 25, "9" * 9000])
def test_plain_refuses_what_is_not_finite(text: str) -> None:
    with pytest.raises(ValueError):
        plain(text)


@pytest.mark.parametrize(
    ("text", "line", "part"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "`a` is already set on line 1"),
        ("a:\n  b: 1\n  b: 2\n", 3, "`b` is already set on line 2"),
        ("a: &x 1\n", 1, "anchors"),
        ("a: 1\nb: *x\n", 2, "aliases"),
        ("a: 1\nb: {<<: {c: 1}}\n", 2, "merge"),
        ("a: 1\nb: !!python/object:os.system {}\n", 2, "tag"),
        ("a: !!int '3'\n", 1, "tag"),
        ("a: ! 3\n", 1, "tag"),
        ("a: 1\n---\nb: 1\n", 2, "second document"),
        ("a: 1\n1: 2\n", 2, "not a string"),
        ("a: 1\ntrue: 2\n", 2, "not a string"),
        ("a: 1\n~: 2\n", 2, "not a string"),
        ("{[1]: 2}\n", 1, "not a collection"),
        ("a: 1\nb: .nan\n", 2, "finite"),
        ("a: 1\nb: 1e999\n", 2, "out of range"),
        ("a: 1\nb: " + "9" * 5000, 2, "64 bits"),
        ("a: 1\nb: [1\n", 3, "not valid YAML"),
        ("a:\n\t- 1\n", 2, "not valid YAML"),
        ("a: b: c\n", 1, "not valid YAML"),
        ("a: 1\nb: \0\n", 2, "not valid YAML"),
        ('a: "\\ud83d"\n', 1, "surrogate"),
        ("", 1, "empty"),
        ("# nothing\n", 1, "empty"),
        ("---\n", 1, "empty"),
        ("a:\n" + "  " + "[" * 20_000, 2, "deeper"),
        ("{a: " * 20_000, 1, "deeper"),
        ("- " * 20_000, 1, "deeper"),
    ],
)
def test_bad_yaml_names_its_line(text: str, line: int, part: str) -> None:
    with pytest.raises(PlanError, match=part) as caught:
        load(text, "plan.yaml")
    assert (caught.value.file, caught.value.line) == ("plan.yaml", line)
    assert str(caught.value).startswith(f"plan.yaml:{line}: ")


@pytest.mark.parametrize(
    ("text", "line", "part"),
    [
        ('{"a": 1,\n "a": 2}', 2, "already set on line 1"),
        ('{"a":\n NaN}', 2, "finite"),
        ('{"a": -Infinity}', 1, "finite"),
        ('{"a":\n 1e999}', 2, "out of range"),
        ("{\n'a': 1}", 2, "not valid JSON"),
        ('{"a": 1} x', 1, "not valid JSON"),
        ('{"a": 010}', 1, "not valid JSON"),
        ('["\\ud83d"]', 1, "surrogate"),
        ("[" * 40 + "]" * 40, 1, "deeper"),
        ("[" * 200_000, None, "deeper"),
        ('"\\"' * 100_000, 1, "not valid JSON"),
        (" \n", 1, "empty"),
    ],
)
def test_bad_json_names_its_line(text: str, line: int | None, part: str) -> None:
    with pytest.raises(PlanError, match=part) as caught:
        load(text, "plan.json")
    assert caught.value.line == line


def test_malformed_escape_is_a_plan_error() -> None:
    with pytest.raises(PlanError, match="not valid YAML"):
        load('a: "\\UFFFFFFFF"')


def test_depth_limit_is_exact() -> None:
    load("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    with pytest.raises(PlanError, match="deeper"):
        load("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1))


def test_many_values_are_refused() -> None:
    with pytest.raises(PlanError, match="more than"):
        load("[" + "a," * 60_000 + "]")


def test_lines_of_keys_and_items() -> None:
    text = "version: 1\nlayers:\n  - select: all\n    experts: {from: 1,\n      to: 2}\n  - x\n"
    for name, source in (("p.yaml", text), ("p.yaml", text.replace("\n", "\r\n"))):
        data, lines = load(source, name)
        assert data["layers"][0]["experts"] == {"from": 1, "to": 2}
        assert lines[("layers", 0, "experts", "to")] == 5
        assert lines[("layers", 1)] == 6
        assert line_of(("layers", 0, "select", "name"), lines) == 3
        assert line_of(("zero", "stage"), lines) == 1


def test_json_lines_and_strings() -> None:
    data, lines = load('{\t"a"\n: ["x\\ud83d\\ude00 [}", 1e-3,\n -1, null, true]}', "p.JSON")
    assert data == {"a": ["x\U0001f600 [}", 1e-3, -1, None, True]}
    assert lines[("a", 2)] == 3


def test_path_text() -> None:
    assert path_text(("layers", 1, "select", "name", 0)) == "layers[1].select.name[0]"
    assert path_text(()) == ""


def test_read_refuses_what_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"a: 1\nb: \xe9\n")
    (tmp_path / "big.yaml").write_bytes(b"#" * (MAX_BYTES + 1))
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbfa: 1\n")
    for name, part in [
        ("latin.yaml", ":2: not UTF-8"),
        ("big.yaml", "1 MiB"),
        ("none.yaml", "no such file"),
        (".", "directory"),
        ("a\0b", "cannot be read"),
    ]:
        with pytest.raises(PlanError, match=part):
            strict_yaml.read(tmp_path / name)
    assert load(strict_yaml.read(tmp_path / "bom.yaml"))[0] == {"a": 1}


def test_write_is_all_or_nothing(tmp_path: Path) -> None:
    target = tmp_path / "plan.yaml"
    strict_yaml.write(target, "old")
    with pytest.raises(PlanError, match="cannot be written"):
        strict_yaml.write(target, "new \ud83d")
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["plan.yaml"]
    with pytest.raises(PlanError, match="cannot be written"):
        strict_yaml.write(tmp_path / "none" / "plan.yaml", "x")


@given(DATA.filter(lambda data: data is not None), st.sampled_from(["p.yaml", "p.json"]))
@example(["\x85", "\u2028 a", "1e-3", "a\n b", " x ", "\ufeff", "<<", "~"], "p.yaml")
def test_dump_and_load_round_trip(data: Any, file: str) -> None:
    back, _ = load(strict_yaml.dump(data, file), file)
    assert back == data


@given(st.text(st.sampled_from("-+.0123456789eE_:xo infaNtrue"), max_size=6))
def test_plain_never_guesses(text: str) -> None:
    try:
        value = plain(text)
    except ValueError:
        return
    if isinstance(value, float):
        assert math.isfinite(value)
        assert value == float(text)
    elif isinstance(value, int) and not isinstance(value, bool):
        assert str(value) == text.removeprefix("+").replace("-0", "0")
