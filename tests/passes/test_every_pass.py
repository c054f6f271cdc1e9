"""What holds for each pass: where it runs, how it is described, and how it is tested."""

from __future__ import annotations

import dataclasses
import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from moeify.convert.pipeline import PIPELINE, PassInputs
from moeify.passes.infra.base import Fact, Pass
from moeify.sites.discovery import discover

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(p.stem for p in (ROOT / "passes").glob("*.py") if p.stem != "__init__")


@pytest.fixture(scope="module")
def pipeline() -> dict[str, Pass]:
    """The passes of `PIPELINE` by name, whatever world they need."""
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)), nn.Tanh())
    given = PassInputs(discover(model, torch.ones(6, 8)))
    return {p.name: p for _, make in PIPELINE for p in make(given)}


def module_of(name: str) -> ModuleType:
    return importlib.import_module(f"moeify.passes.{name}")


def class_of(name: str) -> type:
    """Return the one pass of a module."""
    module = module_of(name)
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and value.__module__ == module.__name__
        and hasattr(value, "requires")
    ]
    assert len(found) == 1, found
    return found[0]


def doc_of(name: str) -> str:
    return module_of(name).__doc__ or ""


def test_every_pass_of_the_pipeline_has_a_module(pipeline):
    assert len(NAMES) == 14
    names = {name.replace("_", "-") for name in NAMES}
    assert set(pipeline) <= names


@pytest.mark.parametrize("name", NAMES)
def test_runs_in_the_pipeline_or_says_where(name, pipeline):
    pass_ = class_of(name)
    assert pass_.name == name.replace("_", "-")
    if pass_.name in pipeline:
        assert type(pipeline[pass_.name]) is pass_
        return
    user = re.search(r"`(moeify\.[\w.]+)` runs this pass", doc_of(name))
    assert user, f"{name} is not in PIPELINE, and its docstring does not say what runs it"
    assert getattr(importlib.import_module(user[1]), pass_.__name__) is pass_


@pytest.mark.parametrize("name", NAMES)
def test_shows_the_graph_before_and_after(name):
    doc = doc_of(name)
    assert doc.startswith(f"{name.replace('_', '-')}: ")
    assert re.search(r"\bBefore\b[^:]*::\n", doc)
    assert re.search(r"\b[Aa]fter\b[^:]*::\n", doc)


@pytest.mark.parametrize("name", NAMES)
def test_is_a_frozen_dataclass_of_known_facts(name):
    pass_ = class_of(name)
    assert dataclasses.is_dataclass(pass_)
    assert pass_.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert pass_.requires | pass_.provides <= set(Fact)


@pytest.mark.parametrize("name", NAMES)
def test_has_each_kind_of_test(name):
    path = ROOT / "tests" / "passes" / f"test_{name}.py"
    text = path.read_text(encoding="utf-8")
    helpers = ("before_and_after", "assert_untouched", "assert_idempotent", "assert_requires")
    assert [helper for helper in helpers if f"{helper}(" not in text] == []
    assert list((path.parent / "golden").glob(f"{name}*.txt"))
    refused = set(re.findall(r"assert_requires\([^\n]*?\bFact\.(\w+)", text))
    assert {fact.name for fact in class_of(name).requires} <= refused
