"""The plan's format: what it takes, that mistakes name their place, and that it round-trips."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeify.errors import PlanError
from moeify.plan.plan import Plan
from moeify.plan.presets import PRESETS
from moeify.plan.selection import Schedule, matches

RULE = "version: 1\nlayers:\n  - select: {every: 2, start: 1}\n    experts: 8\n"

EXAMPLE = """\
# pr-moe.yaml: later rules override earlier ones, site by site
version: 1
layers:
  - select: {every: 2, start: 1}
    experts: 32
    top_k: 1
    residual: coefficient
  - select: {last: 2}
    experts: 64
router: {score: softmax, combine: straight_through, noise: none, capacity_factor: 1.25,
         eval_capacity_factor: null, min_capacity: 4, drop: random, aux_loss: 0.01, z_loss: 0.0}
init: {experts: copy, router: normal, seed: 0}
parallel: {expert: 8, tensor: 1, all_to_all: auto, coordinated: auto}
zero: {stage: 2, offload: none}
"""


def test_the_example_of_the_design() -> None:
    plan = Plan.loads(EXAMPLE)
    assert [rule.experts for rule in plan.layers] == [32, 64]
    assert plan.layers[1].model_fields_set == {"select", "experts"}
    assert (plan.parallel.expert, plan.zero.stage) == (8, 2)
    assert plan.router.eval_capacity_factor is None


def test_defaults() -> None:
    plan = Plan.of({"layers": [{"select": "all", "experts": 4}]})
    assert (plan.router.combine, plan.router.capacity_factor) == ("auto", 1.25)
    assert (plan.init.experts, plan.zero.stage, plan.parallel.coordinated) == ("copy", 0, "auto")
    assert plan.layers[0].top_k == 1
    with pytest.raises(ValueError, match="frozen"):
        plan.version = 1


@pytest.mark.parametrize(
    ("extra", "line", "path", "parts"),
    [
        ("    topk: 1\n", 5, "layers[0].topk", ["did you mean `top_k`", "residual"]),
        ("    top_k: true\n", 5, "layers[0].top_k", ["true (a boolean)", "an integer"]),
        ("    top_k: 1.0\n", 5, "layers[0].top_k", ["1.0", "an integer"]),
        ("    top_k: '2'\n", 5, "layers[0].top_k", ["a string", "an integer"]),
        ("    top_k: 0\n", 5, "layers[0].top_k", ["at least 1"]),
        ("    residual: no\n", 5, "layers[0].residual", ["YAML 1.2", "sigmoid"]),
        ("    residual: coeficient\n", 5, "layers[0].residual", ["did you mean coefficient?"]),
        ("    expert: linear\n", 5, "layers[0].expert", ["select: {name"]),
        ("    router: {aux_los: 1}\n", 5, "layers[0].router.aux_los", ["`aux_loss`"]),
        ("    init: {seed: -1}\n", 5, "layers[0].init.seed", ["at least 0"]),
        ("  - select: {last: 2, first: 1}\n", 5, "layers[1].select", ["`first` and `last`"]),
        ("  - select: {start: 1}\n", 5, "layers[1].select", ["exactly one"]),
        ("  - select: {last: 1, start: 1}\n", 5, "layers[1].select", ["`start`"]),
        ("  - select: {every: 0}\n", 5, "layers[1].select.every", ["at least 1"]),
        ("  - select: {half: third}\n", 5, "layers[1].select.half", ["first or second"]),
        ("  - select: al\n", 5, "layers[1].select", ["did you mean all?", "{last: 2}"]),
        ("  - select: {lst: 2}\n", 5, "layers[1].select.lst", ["did you mean `last`"]),
        ("  - select: {index: x}\n", 5, "layers[1].select.index", ["list of integers"]),
        ("  - select: {index: []}\n", 5, "layers[1].select.index", ["at least 1 item"]),
        ("  - select: {index: [1, true]}\n", 5, "layers[1].select.index[1]", ["an integer"]),
        ("  - select: {name: [a, 1]}\n", 5, "layers[1].select.name[1]", ["a string"]),
        ("  - select: {name: 're:('}\n", 5, "layers[1].select.name", ["not a regular expression"]),
        ("  - experts: 1\n", 5, "layers[1].select", ["missing"]),
        ("  - 5\n", 5, "layers[1]", ["a mapping"]),
        ("  - select: all\n    experts: 010\n", 6, "layers[1].experts", ["'010' (a string)"]),
        ("  - select: all\n    experts: 0\n", 6, "layers[1].experts", ["at least 1"]),
        ("  - select: all\n    experts: 1_000\n", 6, "layers[1].experts", ["a string"]),
        ("  - select: all\n    experts: 3000000000\n", 6, "layers[1].experts", ["at most"]),
        (
            "  - select: all\n    experts: {from: 1,\n      too: 2}\n",
            7,
            "layers[1].experts.too",
            ["did you mean `to`", "also line 6: layers[1].experts.to: is missing"],
        ),
        ("  - select: all\n    experts: dense\n    top_k: 2\n", 7, "layers[1].top_k", ["dense"]),
        ("routr: {}\n", 5, "routr", ["did you mean `router`"]),
        ("router:\n", 5, "router", ["null", "a mapping"]),
        ("router: {capacity_factor: no}\n", 5, "router.capacity_factor", ["YAML 1.2"]),
        ("router: {capacity_factor: 1:30}\n", 5, "router.capacity_factor", ["plain decimal"]),
        ("router: {capacity_factor: 0}\n", 5, "router.capacity_factor", ["more than 0"]),
        ("router: {capacity_factor: .nan}\n", 5, "router", ["finite"]),
        ("router: {z_loss: -1}\n", 5, "router.z_loss", ["at least 0"]),
        ("router:\n  drop: rondom\n", 6, "router.drop", ["did you mean random?"]),
        ("init: {drop_ratio: 1.5}\n", 5, "init.drop_ratio", ["at most 1"]),
        ("parallel: {coordinated: 1}\n", 5, "parallel.coordinated", ["auto, true or false"]),
        ("parallel: {coordinated: on}\n", 5, "parallel.coordinated", ["YAML 1.2"]),
        ("zero: {stage: 4}\n", 5, "zero.stage", ["at most 3"]),
        ("zero: {offload: cpu}\n", 5, "zero.offload", ["optimizer"]),
    ],
)
def test_a_mistake_names_file_line_and_path(
    tmp_path: Path, extra: str, line: int, path: str, parts: list[str]
) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(RULE + extra)
    with pytest.raises(PlanError) as caught:
        Plan.load(file)
    error = caught.value
    assert (error.file, error.line, error.path) == (str(file), line, path)
    for part in parts:
        assert part in error.message
    assert "pydantic" not in str(error)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("version: 2\nlayers: [{select: all}]", "version"),
        ("version: true\nlayers: [{select: all}]", "version"),
        ("version: 1.0\nlayers: [{select: all}]", "version"),
        ("layers: []", "layers"),
        ("layers: all", "layers"),
        ("version: 1", "layers"),
        ("[1]", ""),
        ("5", ""),
    ],
)
def test_a_document_that_is_not_a_plan(text: str, path: str) -> None:
    with pytest.raises(PlanError) as caught:
        Plan.loads(text)
    assert caught.value.path == path


def test_all_findings_are_reported() -> None:
    with pytest.raises(PlanError) as caught:
        Plan.loads(RULE + "router: {drop: x}\nzero: {stage: 9}\n", file="p.yaml")
    assert str(caught.value).startswith("p.yaml:5: router.drop: ")
    assert "also line 6: zero.stage: 9" in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        {1: 2},
        {"layers": [{"select": "all", "experts": 10**30}]},
        {"layers": [{"select": {"name": "\ud83d"}}]},
        {"layers": [{"select": "all", "router": {"aux_loss": float("nan")}}]},
        {"layers": [{"select": "all", "router": {"aux_loss": 10**400}}]},
        {"layers": None},
        {"layers": [{"select": "all", 3: 4}]},
    ],
)
def test_bad_data_is_a_plan_error_without_a_line(data: Any) -> None:
    with pytest.raises(PlanError) as caught:
        Plan.of(data)
    assert caught.value.line is None
    if all(isinstance(key, str) for key in data):
        with pytest.raises(PlanError):
            Plan(**data)


def test_booleans_of_coordinated() -> None:
    for word, value in (("true", True), ("false", False), ("auto", "auto")):
        assert Plan.loads(f"{RULE}parallel: {{coordinated: {word}}}").parallel.coordinated is value


@pytest.mark.parametrize("name", ["p.yaml", "p.yml", "p.json"])
@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_presets_round_trip(tmp_path: Path, preset: str, name: str) -> None:
    plan = Plan.preset(preset)
    plan.save(tmp_path / name)
    back = Plan.load(tmp_path / name)
    assert back == plan == Plan.of(preset) == Plan.of(str(tmp_path / name))
    assert back.digest() == plan.digest()
    assert hash(back) == hash(plan)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert Plan.of(plan) is plan
    assert Plan.of(plan.data()) == plan
    assert pickle.loads(pickle.dumps(back)) == copy.deepcopy(back) == plan


def test_what_a_rule_states_is_kept_and_counts() -> None:
    stated = Plan.of({"layers": [{"select": {"last": 2}, "experts": 4, "top_k": 1}]})
    silent = Plan.of({"layers": [{"select": {"last": 2}, "experts": 4}]})
    assert stated != silent
    assert stated.digest() != silent.digest()
    assert silent != 3
    assert Plan.of(silent.data()).layers[0].model_fields_set == {"select", "experts"}


def test_presets_and_options() -> None:
    plan = Plan.preset("pr-moe", experts=16, last=32)
    assert [rule.experts for rule in plan.layers] == [16, 32]
    assert Plan.preset("mixtral").router.capacity_factor is None
    assert Plan.preset("switch").router.combine == "probability"
    assert Plan.preset("moe", capacity_factor=None).router.capacity_factor is None
    with pytest.raises(PlanError, match=r"`expert`; did you mean `experts`\? allowed: experts, to"):
        Plan.preset("moe", expert=3)
    with pytest.raises(PlanError, match=r"layers\[0\].experts: '3' \(a string\)"):
        Plan.preset("moe", experts="3")
    with pytest.raises(PlanError, match="did you mean `pr-moe`"):
        Plan.preset("prmoe")


def test_of_explains_what_it_takes(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"did you mean `mixtral`\? presets: moe, pr-moe"):
        Plan.of("mixtrel")
    with pytest.raises(PlanError, match=r"Plan\.loads"):
        Plan.of(RULE)
    with pytest.raises(PlanError, match="no such file"):
        Plan.of("nothing.yaml")
    with pytest.raises(PlanError, match="a plan file ends in"):
        Plan.of(tmp_path)
    with pytest.raises(PlanError, match="not int"):
        Plan.of(5)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="ends in"):
        Plan.preset("moe").save(tmp_path / "plan.txt")


def test_save_leaves_the_old_file_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "plan.yaml"
    Plan.preset("moe").save(file)
    before = file.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(PlanError, match="No space left"):
        Plan.preset("mixtral").save(file)
    assert file.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_json_schema_is_json_and_names_every_part() -> None:
    schema = json.loads(json.dumps(Plan.json_schema()))
    assert schema["required"] == ["layers"]
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) == {
        "version",
        "layers",
        "router",
        "init",
        "parallel",
        "zero",
        "student",
    }
    assert "from" in schema["$defs"]["Schedule"]["properties"]


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; import moeify.plan.plan, moeify.plan.strict_yaml, moeify.plan.presets;"
        "import moeify.plan.selection;"
        "import moeify.plan.resolve, moeify.plan.layer_plan;"
        "moeify.plan.plan.Plan.loads('layers: [{select: all, experts: 2}]');"
        "bad = {'torch', 'networkx', 'transformers', 'rich'} & set(sys.modules);"
        "assert not bad, bad"
    )
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, timeout=60)


@pytest.mark.parametrize(
    "pattern", ["(a+)+b", "(a|a)*b", "(a|aa)+b", "(.*.*.*.*.*.*.*.*)*b", "((a{0,9}){0,9})b"]
)
def test_no_pattern_holds_a_plan_up(pattern):
    name = "a" * 4000 + "!"
    start = time.process_time()
    assert not matches(f"re:{pattern}", name)
    assert matches(f"re:{pattern}", "aab")
    assert time.process_time() - start < 5  # Python's own engine needs years for the first


@pytest.mark.parametrize("pattern", ["(?!a)b", "(?<=a)b", r"(a)\1", "((a{999}){999}){999}"])
def test_what_the_engine_does_not_know_is_told(pattern, capfd):
    with pytest.raises(PlanError, match=r"not a regular expression: .*RE2"):
        Plan.loads(f"layers: [{{select: {{name: 're:{pattern}'}}, experts: 2}}]")
    assert capfd.readouterr().err == ""


COUNT = st.integers(1, 2**31 - 1)
SMALL = st.floats(0, 10, allow_nan=False) | st.integers(0, 10)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(
    lambda name: not name.startswith("re:")
)
SELECTS = (
    st.just("all")
    | st.fixed_dictionaries({"every": COUNT}, optional={"start": st.integers(0, 99)})
    | st.fixed_dictionaries({"first": COUNT}, optional={"of": st.sampled_from(["all", "selected"])})
    | st.fixed_dictionaries({"half": st.sampled_from(["first", "second"])})
    | st.fixed_dictionaries(
        {"index": st.integers(-9, 9) | st.lists(st.integers(-9, 9), min_size=1)}
    )
    | st.fixed_dictionaries({"name": NAMES | st.lists(NAMES, min_size=1, max_size=3)})
)
ROUTERS = st.fixed_dictionaries(
    {},
    optional={
        "score": st.sampled_from(["softmax", "sigmoid"]),
        "capacity_factor": st.none() | st.floats(1e-300, 1e300),
        "aux_loss": SMALL,
        "min_capacity": st.integers(0, 9),
    },
)
SCHEDULES = st.fixed_dictionaries(
    {"from": COUNT, "to": COUNT},
    optional={"shape": st.sampled_from(["step", "linear", "geometric"])},
)
RULES = st.fixed_dictionaries(
    {"select": SELECTS, "experts": COUNT | SCHEDULES | st.just("keep")},
    optional={
        "top_k": COUNT,
        "residual": st.sampled_from(["none", "coefficient", "add", "sigmoid"]),
        "router": ROUTERS,
        "init": st.fixed_dictionaries({}, optional={"seed": st.integers(0, 2**63 - 1)}),
    },
)
PLANS = st.fixed_dictionaries(
    {"layers": st.lists(RULES, min_size=1, max_size=3)},
    optional={
        "version": st.just(1),
        "router": ROUTERS,
        "parallel": st.fixed_dictionaries(
            {}, optional={"expert": COUNT, "coordinated": st.sampled_from(["auto", True, False])}
        ),
        "zero": st.fixed_dictionaries({}, optional={"stage": st.integers(0, 3)}),
    },
)


@given(PLANS)
def test_any_plan_survives_a_file(
    tmp_path_factory: pytest.TempPathFactory, data: dict[str, Any]
) -> None:
    plan = Plan.of(data)
    folder = tmp_path_factory.getbasetemp()
    for name in ("any.yaml", "any.json"):
        plan.save(folder / name)
        back = Plan.load(folder / name)
        assert back == plan
        assert back.digest() == plan.digest()
        assert [rule.model_fields_set for rule in back.layers] == [
            rule.model_fields_set for rule in plan.layers
        ]


@given(COUNT, COUNT, st.sampled_from(["step", "linear", "geometric"]), st.integers(1, 60))
def test_schedules_are_monotone_and_end_right(low: int, high: int, shape: str, count: int) -> None:
    values = Schedule.model_validate({"from": low, "to": high, "shape": shape}).spread(count)
    assert len(values) == count
    assert values[0] == low
    assert count == 1 or values[-1] == high
    assert list(values) == sorted(values, reverse=high < low)


@given(st.integers(0, 20), st.integers(0, 20), st.integers(1, 40))
def test_geometric_between_powers_of_two(low: int, high: int, count: int) -> None:
    schedule = Schedule.model_validate({"from": 1 << low, "to": 1 << high, "shape": "geometric"})
    assert all(value.bit_count() == 1 for value in schedule.spread(count))


def test_schedules_by_example() -> None:
    def spread(shape: str, count: int) -> tuple[int, ...]:
        schedule = {"from": 8, "to": 64, "shape": shape}
        return Schedule.model_validate(schedule).spread(count)

    assert spread("step", 5) == (8, 8, 8, 64, 64)
    assert spread("linear", 3) == (8, 36, 64)
    assert spread("geometric", 4) == (8, 16, 32, 64)
    assert Schedule.model_validate({"from": 10, "to": 40, "shape": "geometric"}).spread(3) == (
        10,
        20,
        40,
    )
