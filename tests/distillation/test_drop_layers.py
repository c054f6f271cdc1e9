"""A student is the hand-truncated model: dense, converted, saved, loaded, generating."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moeify as mf
from moeify.capture.capture import capture
from moeify.distillation.size import describe
from moeify.distillation.student import drop_layers, student
from moeify.errors import MoeifyError, PlanError, UnsupportedModuleError
from moeify.formats.native.export import native_files
from moeify.hf.detect import example_inputs_for, is_hf
from moeify.passes.match.stacks import find_stacks
from moeify.plan.plan import Plan
from moeify.plan.student import StudentSpec
from moeify.sites.record import ATTRIBUTE, require_conversion
from moeify.storage.tensor_source import LiveTensors
from moeify.storage.writer import write_model_files
from tests.zoo_models import (
    CAUSAL,
    DECODER,
    ENCODER,
    FULL,
    GPT,
    HEADS8,
    IMAGES,
    MASKED,
    SEQ,
    SEQ2SEQ,
    T5,
    VISION,
    Layer,
    hf,
    ids,
    sequential_mlp,
)

KEPT = (0, 2, 3)  # of 4 layers
PLAN = {
    "layers": [
        {"select": {"every": 2, "start": 1}, "experts": {"from": 2, "to": 4}},
        {"select": {"last": 1}, "experts": 4, "top_k": 2, "residual": "coefficient"},
    ],
    "init": {"experts": "drop"},
}


class Encoder(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
        self.embedding, self.encoder = nn.Embedding(99, 32), nn.TransformerEncoder(layer, layers)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.encoder(self.embedding(input_ids))


class Blocks(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.wte = nn.Embedding(99, 32)
        self.h = nn.ModuleList(Layer(sequential_mlp(), causal=True) for _ in range(layers))
        for at, block in enumerate(self.h):
            block.layer_idx, block.dilation = at, at
        self.num_layers = layers

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.wte(input_ids)
        for block in self.h:
            x = block(x)
        return x


def deep(config: str, auto: str, *depths: str, **options: Any) -> Any:
    return lambda n: hf(config, auto, **{**options, **dict.fromkeys(depths, n)})()


BART = {"max_position_embeddings": 64, "forced_eos_token_id": 2, **SEQ}
WHISPER = {"num_mel_bins": 8, "max_source_positions": 30, "max_target_positions": 40, **SEQ}
WHISPER |= {"suppress_tokens": None, "begin_suppress_tokens": None}
BOTH = ("encoder_layers", "decoder_layers")
N = "num_hidden_layers"
ZOO = {
    "gpt2": deep("GPT2Config", CAUSAL, "n_layer", **GPT),
    "llama": deep("LlamaConfig", CAUSAL, N, **DECODER),
    "qwen3": deep("Qwen3Config", CAUSAL, N, **HEADS8),
    "bert": deep("BertConfig", MASKED, N, **ENCODER),
    "t5": deep("T5Config", SEQ2SEQ, "num_layers", "num_decoder_layers", **T5),
    "bart": deep("BartConfig", SEQ2SEQ, *BOTH, **BART),
    "whisper": deep("WhisperConfig", "WhisperForConditionalGeneration", *BOTH, **WHISPER),
    "opt": deep("OPTConfig", CAUSAL, N, ffn_dim=48, word_embed_proj_dim=32, **FULL),
    "gpt_neox": deep("GPTNeoXConfig", CAUSAL, N, **FULL),
    "vit": deep("ViTConfig", IMAGES, N, **VISION),
    "nn.TransformerEncoder": Encoder,
    "blocks": Blocks,
}


CONVERTED = ("gpt2", "qwen3", "nn.TransformerEncoder", "bert", "bart", "t5", "vit", "opt")


def inputs_for(model: nn.Module) -> dict[str, Any]:
    return example_inputs_for(model) if is_hf(model) else {"input_ids": ids()}


def output(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        found = model(**inputs)
    return found if isinstance(found, Tensor) else found.logits


def truncated(model: nn.Module, paths: list[str], into: nn.Module) -> None:
    """Copy the kept layers of a model into one that was built shorter."""
    now = {str(at): str(i) for i, at in enumerate(KEPT)}
    state = {}
    for name, tensor in model.state_dict().items():
        for path in paths:
            if match := re.fullmatch(re.escape(path) + r"\.(\d+)\.(.*)", name):
                name = f"{path}.{now[match[1]]}.{match[2]}" if match[1] in now else ""
        if name:
            state[name] = tensor
    into.load_state_dict(state)


def by_hand(model: nn.Module, short: nn.Module, inputs: Mapping[str, Any]) -> list[str]:
    """Fill the short model with the kept layers; return where the layers are."""
    paths = [s.path for s in find_stacks(model, capture(model, inputs))[0]]
    truncated(model, paths, short)
    return paths


@pytest.mark.parametrize("name", ZOO)
def test_equals_the_hand_truncated_model(name):
    model, short = ZOO[name](4).eval(), ZOO[name](3).eval()
    inputs = inputs_for(model)
    by_hand(model, short, inputs)
    small = student(model, {"keep": list(KEPT)}, example_inputs=inputs)
    assert torch.equal(output(small, inputs), output(short, inputs))
    assert small.state_dict().keys() == short.state_dict().keys()
    if is_hf(model):
        assert small.config.to_dict() == short.config.to_dict()
        assert model.config.to_dict() != small.config.to_dict()  # the teacher's own stays


@pytest.mark.parametrize("name", CONVERTED)
@pytest.mark.thin(2)
def test_a_converted_student_equals_the_converted_short_model(name, tmp_path):
    model, short, again = ZOO[name](4).eval(), ZOO[name](3).eval(), ZOO[name](3).eval()
    inputs = inputs_for(model)
    paths = by_hand(model, short, inputs)
    mf.moeify(model, PLAN, example_inputs=inputs, verify=False)
    before = output(model, inputs)
    small = student(model, {"keep": list(KEPT)})
    assert torch.equal(output(model, inputs), before)
    plan = require_conversion(small).plan
    mf.moeify(short, plan, example_inputs=inputs, verify=False)
    truncated(model, paths, short)
    expected = output(short, inputs)
    assert torch.equal(output(small, inputs), expected)
    now, then = (require_conversion(m) for m in (small, short))
    assert [c.layer for c in now.layers] == [c.layer for c in then.layers]
    assert now.ledger == then.ledger
    assert len(mf.router_stats(small)) == len(now.layers)
    assert mf.aux_loss(small).ndim == 0
    if name not in ("bart", "nn.TransformerEncoder"):
        return
    mf.save(small, tmp_path / "student")
    loaded = mf.load(tmp_path / "student", model=None if is_hf(small) else again)
    assert torch.equal(output(loaded, inputs), expected)
    dense = mf.demoeify(copy.deepcopy(small))
    assert dense.state_dict().keys() == ZOO[name](3).state_dict().keys()


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    model = ZOO["llama"](4).eval()
    return mf.moeify(model, {**PLAN, "student": {"keep": [0, 1, 3]}}, verify=False)


def test_generates_saves_and_compiles(teacher, tmp_path):
    import transformers

    small = student(teacher)
    prompt = ids(4)
    kwargs = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached = small.generate(prompt, use_cache=True, **kwargs)
    assert torch.equal(cached, small.generate(prompt, use_cache=False, **kwargs))
    small.save_pretrained(tmp_path / "custom", export="custom")
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "custom", trust_remote_code=True
    )
    expected = small(prompt).logits
    assert torch.equal(again(prompt).logits, expected)
    assert again.config.num_hidden_layers == 3
    twice = student(again, {"keep": [1, 2]})  # of a generated class, whose config holds the plan
    twice.save_pretrained(tmp_path / "twice", export="custom")
    third = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "twice", trust_remote_code=True
    )
    assert torch.equal(third(prompt).logits, twice(prompt).logits)
    compiled = torch.compile(copy.deepcopy(small), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(prompt).logits, expected)
    plain = mf.moeify(ZOO["llama"](4).eval(), {"layers": [{"select": "all", "experts": 2}]})
    drop_layers(plain, {"depth": 2})
    write_model_files(native_files(plain, LiveTensors(plain)), tmp_path / "native")
    native = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    torch.testing.assert_close(native(prompt).logits, plain(prompt).logits, atol=1e-5, rtol=1e-5)
    plain.train()
    plain(input_ids=prompt, labels=prompt).loss.backward()


def test_fresh_weights_are_drawn_by_the_model_and_the_plan(teacher):
    state = torch.get_rng_state()
    first, second = (student(teacher, {"depth": 2, "weights": "fresh"}) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    old = student(teacher, {"depth": 2}).state_dict()
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
        assert tensor.isfinite().all()
        if "norm" not in name and tensor.numel() > 100:
            assert not torch.equal(tensor, old[name]), name
    experts = first.model.layers[1].mlp.experts.down_proj
    assert not torch.equal(experts[0], experts[1])  # init: drop
    assert 0.015 < first.model.layers[0].self_attn.q_proj.weight.std() < 0.025
    model = Blocks(3)
    made = student(model, {"keep": [0, 2], "weights": "fresh"}, example_inputs={"input_ids": ids()})
    assert [(b.layer_idx, b.dilation) for b in made.h] == [(0, 0), (1, 2)]  # one is a position
    assert (made.num_layers, model.num_layers) == (2, 3)
    assert not torch.equal(made.h[0].attention.qkv.weight, model.h[0].attention.qkv.weight)
    assert made(ids()).isfinite().all()


def test_one_stack_of_two_and_lists_of_layers():
    model = ZOO["t5"](3)
    small = student(model, {"keep": [0, 2], "stack": "decoder"})
    assert (len(small.encoder.block), len(small.decoder.block)) == (3, 2)
    assert (small.config.num_layers, small.config.num_decoder_layers) == (3, 2)
    assert small.generate(ids(), max_new_tokens=3, do_sample=False).shape[0] == 2
    with pytest.raises(UnsupportedModuleError, match=r"encoder\.block\.0: cannot be dropped: enc"):
        student(model, {"keep": [1, 2], "stack": "encoder"})
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    options = {**HEADS8, "num_hidden_layers": 4, "layer_types": kinds, "sliding_window": 4}
    options |= {"use_sliding_window": True}
    qwen = hf("Qwen3Config", CAUSAL, **options)()
    small = student(qwen, {"keep": [1, 3]})
    assert small.config.layer_types == ["sliding_attention", "full_attention"]
    assert [layer.self_attn.layer_idx for layer in small.model.layers] == [0, 1]
    assert [layer.self_attn.sliding_window for layer in small.model.layers] == [4, None]


REFUSED = {
    "albert": (
        hf("AlbertConfig", MASKED, embedding_size=16, **ENCODER),
        "runs 2 times: layers share its weights",
    ),
    "swin": (
        hf(
            "SwinConfig",
            IMAGES,
            image_size=32,
            patch_size=2,
            embed_dim=16,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=4,
        ),
        "is one of 2 stages of",
    ),
    "a stack of linears": (
        lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)),
        "no residual path",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_is_not_a_stack(name):
    build, reason = REFUSED[name]
    model = build()
    inputs = None if is_hf(model) else torch.randn(2, 8)
    with pytest.raises(UnsupportedModuleError, match=reason):
        drop_layers(model, {"depth": 1}, example_inputs=inputs)


BAD = [
    ({"keep": [0, 4]}, PlanError, "there is no layer 4; positions go from 0 to 3"),
    ({"drop": {"every": 5}}, PlanError, "drops none of 4 layers"),
    ({"depth": 5}, PlanError, "more than the model's 4 layers"),
    ({"depth": 4}, PlanError, "nothing to drop"),
    ({"keep": [0, 2]}, UnsupportedModuleError, "is a Mixture of Experts"),
    ({"depth": 2, "stack": "encoder"}, PlanError, "has no encoder, but model.layers"),
    ({"depht": 2}, PlanError, "did you mean `depth`"),
    (PLAN, PlanError, "has no `student:` section"),
]


@pytest.mark.parametrize(("spec", "kind", "reason"), BAD, ids=lambda v: str(v)[:40])
def test_bad_choices_leave_the_model_as_it_was(teacher, spec, kind, reason):
    before = dict(teacher.named_parameters())
    with pytest.raises(kind, match=re.escape(reason)):
        drop_layers(teacher, spec)
    now = dict(teacher.named_parameters())
    assert now.keys() == before.keys()
    assert all(now[name] is before[name] for name in before)


def test_an_error_rolls_back(teacher, monkeypatch):
    def fail(*_: object) -> None:
        raise RuntimeError("on purpose")

    before, record = list(teacher.state_dict()), require_conversion(teacher)
    monkeypatch.setattr("moeify.distillation.student.check_tensors", fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        drop_layers(teacher, {"depth": 2})
    assert list(teacher.state_dict()) == before
    assert teacher.config.num_hidden_layers == 4
    assert require_conversion(teacher) is record
    assert [layer.self_attn.layer_idx for layer in teacher.model.layers] == [0, 1, 2, 3]


def test_wrapped_and_sharded_models(teacher):
    record = copy.copy(teacher.__dict__[ATTRIBUTE])
    record.parallel = object()
    several = copy.copy(teacher)
    several.__dict__[ATTRIBUTE] = record
    with pytest.raises(MoeifyError, match="converted for several ranks"):
        drop_layers(several, {"depth": 2})
    with pytest.raises(UnsupportedModuleError, match="the model inside first"):
        drop_layers(nn.DataParallel(teacher), {"depth": 2})
    with pytest.raises(MoeifyError, match="is compiled"):
        drop_layers(torch.compile(Blocks(2)), {"depth": 1}, example_inputs={"input_ids": ids()})
    with pytest.raises(PlanError, match="say which layers"):
        drop_layers(Blocks(2))


def test_size_on_meta(teacher):
    with torch.device("meta"):
        model = ZOO["llama"](4)
    mf.moeify(model, PLAN)
    small = student(model, {"depth": 3})
    assert all(p.is_meta for p in small.parameters())
    size = describe(small, model)
    resolved = Plan.of(PLAN).resolve(ZOO["llama"](4))
    assert (size.of.parameters, size.of.active) == (resolved.parameters, resolved.active_parameters)
    assert size.parameters == sum(p.numel() for p in small.parameters())
    assert re.search(r"parameters +[\d,]+ +[\d,]+ +1\.\d\dx", str(size))


def test_the_plan_section():
    plan = Plan.of({**PLAN, "student": {"depth": 0.875, "distill": {"schedule": "staged"}}})
    assert Plan.of(plan.data()) == plan
    assert "student" not in Plan.of(PLAN).data()
    assert plan.student.distill.stop == 0.5
    assert StudentSpec(drop={"every": 8}).positions(24) == tuple(
        i for i in range(24) if i not in (7, 15, 23)
    )
    kept = plan.student.positions(24)
    assert (len(kept), kept[0], kept[-1]) == (21, 0, 23)
    for bad, reason in (
        ({}, "needs exactly one of drop, keep, depth; found none"),
        ({"depth": 2, "keep": [0]}, "found `keep` and `depth`"),
        ({"keep": [1, 0]}, "ascending order"),
        ({"depth": 1.5}, "expected less than 1.0"),
        ({"depth": True}, "expected an integer"),
    ):
        with pytest.raises(PlanError, match=re.escape(reason)):
            Plan.of({**PLAN, "student": bad})
