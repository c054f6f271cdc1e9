"""Sites of whole models: names, what training mode objects to, inputs made from a config."""

from __future__ import annotations

import copy
import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeify import find_mlps, moeify
from moeify.capture.torch_calls import tensors_in
from moeify.errors import CaptureError
from moeify.hf.detect import example_inputs_for
from moeify.sites.discovery import discover

transformers = pytest.importorskip("transformers")
D, H = 8, 24
PLAN = {"layers": [{"select": "all", "experts": 3, "top_k": 2}]}


class MLP(nn.Module):
    """Does something in training only."""

    def __init__(self, how: str = "") -> None:
        super().__init__()
        self.up, self.down, self.how = nn.Linear(D, H), nn.Linear(H, D), how

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        if self.training and self.how == "noise":
            h = h + torch.randn_like(h)
        act = F.silu if self.training and self.how == "other" else F.gelu
        h = F.dropout(act(h), 0.1, self.training and self.how != "never")
        y = self.down(h)
        if self.training and self.how == "depth":
            y = y * torch.bernoulli(torch.full(y.shape[:1], 0.9))[:, None, None]
        return y


def only(model: nn.Module, x: Tensor) -> Any:
    found = discover(model, x)
    assert len(found.sites) == 1, found.near_misses
    return found.sites[0]


@pytest.mark.parametrize(
    ("how", "install", "reason"),
    [
        ("", "module", ""),
        ("depth", "across modules", ""),
        ("noise", "refused", "in training mode it is not such an MLP"),
        ("other", "refused", "something else in training mode"),
        ("never", "refused", "something else in training mode"),
    ],
)
def test_training_mode_is_looked_at(how: str, install: str, reason: str) -> None:
    site = only(nn.Sequential(nn.Linear(D, D), MLP(how)), torch.randn(2, 5, D))
    assert site.install == install
    assert reason in site.reason


def test_names_and_order() -> None:
    model = nn.Sequential(MLP(), nn.Sequential(nn.LayerNorm(D), MLP()), MLP("other"))
    sites = find_mlps(model, torch.randn(2, 5, D))
    assert [(s.name, s.index) for s in sites] == [("0", 0), ("1.1", 1), ("2", -1)]


def test_no_inputs_for_a_plain_module() -> None:
    with pytest.raises(CaptureError, match="Sequential is not a Hugging Face model: give exa"):
        discover(nn.Sequential(MLP()))


def test_a_large_model_on_meta() -> None:
    config = transformers.LlamaConfig(num_hidden_layers=32, vocab_size=128256)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    started = time.process_time()
    found = discover(model)
    assert len(found.sites) == 32
    assert found.capture.mode == "fake"
    assert time.process_time() - started < 10


# -- inputs from a config

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
}
VISION = dict(TEXT, image_size=32, patch_size=8)
del VISION["vocab_size"]
SMALL = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2}
HEADS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
WIDE = {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48}


def build(name: str) -> tuple[nn.Module, int]:
    """Return a tiny random model, and the number of its MLPs."""
    t = transformers
    match name:
        case "gpt_neox":
            return t.GPTNeoXModel(t.GPTNeoXConfig(**TEXT)), 2
        case "whisper":
            ids = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
            size = {"max_source_positions": 20, "num_mel_bins": 16, "decoder_start_token_id": 1}
            return t.WhisperModel(t.WhisperConfig(**SMALL, **HEADS, **WIDE, **ids, **size)), 4
        case "series":
            lengths = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2]}
            config = t.TimeSeriesTransformerConfig(
                **lengths, num_time_features=2, **SMALL, **HEADS, **WIDE
            )
            return t.TimeSeriesTransformerModel(config), 4
        case "video":
            return t.VideoMAEModel(t.VideoMAEConfig(**VISION, num_frames=4)), 2
        case "two towers":
            config = t.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16)
            return t.CLIPModel(config), 4
        case "image in text":
            config = t.LlavaConfig(
                vision_config=t.CLIPVisionConfig(**VISION),
                text_config=t.LlamaConfig(**TEXT),
                image_token_id=127,
                vision_feature_layer=-1,
            )
            return t.LlavaForConditionalGeneration(config), 5
        case "spectrogram":
            config = t.ASTConfig(**TEXT, max_length=40, num_mel_bins=20)
            return t.ASTModel(config), 2
        case "audio":
            config = t.Wav2Vec2Config(**TEXT, num_conv_pos_embeddings=4)
            return t.Wav2Vec2Model(config), 2
        case "own cache":
            return t.DINOv3ViTModel(t.DINOv3ViTConfig(**VISION)), 2
        case "shared expert":
            config = t.Qwen2MoeConfig(
                **TEXT, num_key_value_heads=2, num_experts=4, mlp_only_layers=[0]
            )
            return t.Qwen2MoeForCausalLM(config), 1
        case _:
            experts = {"num_local_experts": 4, "interleave_moe_layer_step": 2}
            heads = {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
            config = t.Llama4TextConfig(**TEXT, **experts, **heads, intermediate_size_mlp=48)
            return t.Llama4ForCausalLM(config), 1


@pytest.mark.parametrize(
    "name",
    [
        "gpt_neox",
        "whisper",
        "series",
        "video",
        "two towers",
        "image in text",
        "spectrogram",
        "audio",
        "own cache",
        "shared expert",
        "experts by bmm",
    ],
)
@pytest.mark.thin(2)
def test_models_need_no_inputs(name: str) -> None:
    torch.manual_seed(0)
    model, count = build(name)
    model.eval()
    inputs = example_inputs_for(model)
    dense = copy.deepcopy(model)
    found = discover(model, inputs)
    assert [s.install == "refused" for s in found.sites] == [False] * count, found.sites
    moeify(model, PLAN, example_inputs=inputs, verify=False)
    for a, b in zip(tensors_in(model(**inputs)), tensors_in(dense(**inputs)), strict=True):
        if a.is_floating_point():
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_inputs_that_cannot_be_made() -> None:
    class Odd(nn.Module):
        main_input_name = "molecule"
        config = transformers.PretrainedConfig()

        def forward(self, molecule: Tensor) -> Tensor:
            return molecule

    with pytest.raises(CaptureError, match=r"Odd takes 'molecule', which moeify cannot make"):
        example_inputs_for(Odd())
