"""Inputs made from a config: every kind of model runs on them, and has the MLPs that it should."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from moeify import moeify
from moeify.capture.torch_calls import tensors_in
from moeify.errors import CaptureError
from moeify.hf.detect import example_inputs_for
from moeify.sites.discovery import discover

transformers = pytest.importorskip("transformers")
PLAN = {"layers": [{"select": "all", "experts": 3, "top_k": 2}]}

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
