"""Tiny random models of many architectures: what the zoo test converts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYERS = 2


@dataclass(frozen=True)
class Case:
    """One architecture.

    Attributes:
        build: Makes the model.
        sites: How many MLPs it has.
        install: How they are installed.
        inputs: Makes example inputs, or None to let moeify make them from the config.
        near: Text that must be among the reasons of the near misses.
        trains_compiled: The dense model compiles in training.
    """

    build: Callable[[], nn.Module]
    sites: int = LAYERS
    install: str = "module"
    inputs: Callable[[], dict[str, Any]] | None = None
    near: str = ""
    trains_compiled: bool = True


def hf(config: str, auto: str, **options: Any) -> Callable[[], nn.Module]:
    """Build `transformers.{auto}` from `transformers.{config}(**options)`."""

    def build() -> nn.Module:
        import transformers

        made = getattr(transformers, config)(**options)
        kind = getattr(transformers, auto)
        return kind.from_config(made) if auto.startswith("Auto") else kind(made)

    return build


CAUSAL, MASKED, SEQ2SEQ = "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForSeq2SeqLM"
IMAGES = "AutoModelForImageClassification"
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    **IDS,
}
HEADS8 = {**DECODER, "head_dim": 8}
FULL = {k: v for k, v in DECODER.items() if k != "num_key_value_heads"}
ENCODER = {k: v for k, v in FULL.items() if k not in ("bos_token_id", "eos_token_id")}
GPT = {"vocab_size": 99, "n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_inner": 48}
GPT |= {"n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}
T5 = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": LAYERS, "num_heads": 4}
T5 |= {"pad_token_id": 0, "decoder_start_token_id": 0}
SEQ = {"vocab_size": 99, "d_model": 32, "encoder_layers": LAYERS, "decoder_layers": LAYERS}
SEQ |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48}
SEQ |= {"decoder_ffn_dim": 48, "decoder_start_token_id": 2, **IDS}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS}
VISION |= {"num_attention_heads": 4, "image_size": 32, "patch_size": 8}


class Attention(nn.Module):
    def __init__(self, width: int, causal: bool = False) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, 4, c // 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.proj(y.transpose(1, 2).reshape(b, t, c))


class TimmMlp(nn.Module):
    def __init__(self, width: int, hidden: int, norm: bool) -> None:
        super().__init__()
        self.fc1, self.act, self.drop1 = nn.Linear(width, hidden), nn.GELU(), nn.Dropout(0.1)
        self.norm = nn.LayerNorm(hidden) if norm else nn.Identity()
        self.fc2, self.drop2 = nn.Linear(hidden, width), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


class SquareMlp(nn.Module):
    """The MLP of modded nanoGPT: `relu(x)^2`, without biases."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, hidden, bias=False)
        self.c_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Layer(nn.Module):
    def __init__(self, mlp: nn.Module, causal: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.attention, self.mlp = Attention(32, causal), mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Vision(nn.Module):
    def __init__(self, mlp: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 32, 8, 8)
        self.blocks = nn.ModuleList(Layer(mlp(), causal=False) for _ in range(LAYERS))
        self.head = nn.Linear(32, 10)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.patch(pixel_values).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class NanoGPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(99, 32), nn.Embedding(64, 32)
        self.h = nn.ModuleList(Layer(SquareMlp(32, 48), causal=True) for _ in range(LAYERS))
        self.lm_head = nn.Linear(32, 99, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.wte(input_ids) + self.wpe(torch.arange(input_ids.shape[1]))
        for block in self.h:
            x = block(x)
        return self.lm_head(x)


class TorchEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(99, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, LAYERS)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.encoder(self.embedding(input_ids))


class TorchTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(99, 32)
        self.transformer = nn.Transformer(32, 4, LAYERS, LAYERS, 48, batch_first=True)

    def forward(self, input_ids: Tensor, target: Tensor) -> Tensor:
        return self.transformer(self.embedding(input_ids), self.embedding(target))


def sequential_mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(32, 48), nn.GELU(), nn.Dropout(0.1), nn.Linear(48, 32), nn.Dropout(0.1)
    )


def ids(length: int = 12) -> Tensor:
    return torch.randint(3, 98, (2, length), generator=torch.Generator().manual_seed(1))


def pixels() -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))}


def audio() -> dict[str, Any]:
    return {"input_values": torch.randn(2, 800, generator=torch.Generator().manual_seed(1))}


HEAD = "is not its input width"

ZOO: dict[str, Case] = {
    "gpt2": Case(hf("GPT2Config", CAUSAL, **GPT)),
    "llama": Case(hf("LlamaConfig", CAUSAL, **DECODER)),
    "mistral": Case(hf("MistralConfig", CAUSAL, **DECODER)),
    "qwen2": Case(hf("Qwen2Config", CAUSAL, **DECODER)),
    "qwen3": Case(hf("Qwen3Config", CAUSAL, **HEADS8)),
    "gemma2": Case(hf("Gemma2Config", CAUSAL, **HEADS8)),
    "gemma3": Case(hf("Gemma3TextConfig", CAUSAL, **HEADS8)),
    "phi": Case(hf("PhiConfig", CAUSAL, **DECODER)),
    "phi3": Case(hf("Phi3Config", CAUSAL, **DECODER)),
    "glm4": Case(hf("Glm4Config", CAUSAL, **HEADS8)),
    "olmo2": Case(hf("Olmo2Config", CAUSAL, **DECODER)),
    "opt": Case(
        hf("OPTConfig", CAUSAL, ffn_dim=48, word_embed_proj_dim=32, **FULL),
        install="across modules",
    ),
    "gpt_neox": Case(hf("GPTNeoXConfig", CAUSAL, **FULL)),
    "gptj": Case(hf("GPTJConfig", CAUSAL, rotary_dim=4, **GPT)),
    "bloom": Case(
        hf("BloomConfig", CAUSAL, vocab_size=99, hidden_size=32, n_layer=LAYERS, n_head=4, **IDS),
        install="across modules",
    ),
    "falcon": Case(hf("FalconConfig", CAUSAL, ffn_hidden_size=48, **FULL)),
    "bert": Case(hf("BertConfig", MASKED, **ENCODER), install="across modules", near=HEAD),
    "roberta": Case(hf("RobertaConfig", MASKED, **ENCODER), install="across modules", near=HEAD),
    "albert": Case(
        hf("AlbertConfig", MASKED, embedding_size=16, **ENCODER),
        1,
        install="across modules",
        near=HEAD,
    ),
    "deberta_v2": Case(
        hf(
            "DebertaV2Config",
            MASKED,
            relative_attention=True,
            pos_att_type=["c2p", "p2c"],
            position_buckets=8,
            **ENCODER,
        ),
        install="across modules",
        near=HEAD,
    ),
    "distilbert": Case(
        hf(
            "DistilBertConfig",
            MASKED,
            vocab_size=99,
            dim=32,
            hidden_dim=48,
            n_layers=LAYERS,
            n_heads=4,
            max_position_embeddings=64,
            pad_token_id=0,
        ),
        near=HEAD,
    ),
    "modernbert": Case(
        hf("ModernBertConfig", MASKED, cls_token_id=1, sep_token_id=2, **FULL), near=HEAD
    ),
    "t5": Case(hf("T5Config", SEQ2SEQ, **T5), 2 * LAYERS),
    "t5 gated": Case(hf("T5Config", SEQ2SEQ, feed_forward_proj="gated-gelu", **T5), 2 * LAYERS),
    "bart": Case(
        hf("BartConfig", SEQ2SEQ, max_position_embeddings=64, forced_eos_token_id=2, **SEQ),
        2 * LAYERS,
        install="across modules",
    ),
    "whisper": Case(
        hf(
            "WhisperConfig",
            "WhisperForConditionalGeneration",
            num_mel_bins=8,
            max_source_positions=30,
            max_target_positions=40,
            suppress_tokens=None,
            begin_suppress_tokens=None,
            **SEQ,
        ),
        2 * LAYERS,
        install="across modules",
        near="mixes neighbouring positions",
    ),
    "vit": Case(hf("ViTConfig", IMAGES, **VISION)),
    "dinov2": Case(hf("Dinov2Config", IMAGES, mlp_ratio=2, **VISION)),
    "swin": Case(
        hf(
            "SwinConfig",
            IMAGES,
            image_size=32,
            patch_size=2,
            embed_dim=16,
            depths=[1, 1],
            num_heads=[2, 4],
            window_size=4,
        ),
    ),
    "convnext": Case(
        hf(
            "ConvNextConfig",
            IMAGES,
            hidden_sizes=[16, 32],
            depths=[1, 1],
            num_stages=2,
            patch_size=4,
            image_size=32,
        ),
        install="across modules",
    ),
    "clip": Case(
        hf(
            "CLIPConfig",
            "CLIPModel",
            projection_dim=16,
            text_config={**ENCODER, "bos_token_id": 1, "eos_token_id": 2},
            vision_config=VISION,
        ),
        2 * LAYERS,
    ),
    "siglip": Case(hf("SiglipVisionConfig", "SiglipVisionModel", **VISION), LAYERS + 1),
    "wav2vec2": Case(
        hf(
            "Wav2Vec2Config",
            "Wav2Vec2ForCTC",
            conv_dim=[16, 16],
            conv_stride=[5, 4],
            conv_kernel=[10, 8],
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=2,
            apply_spec_augment=False,
            layerdrop=0.0,
            **FULL,
        ),
        inputs=audio,
        trains_compiled=False,
    ),
    "mamba": Case(
        hf(
            "MambaConfig",
            CAUSAL,
            vocab_size=99,
            hidden_size=32,
            num_hidden_layers=LAYERS,
            state_size=4,
            **IDS,
        ),
        0,
    ),
    "mixtral": Case(
        hf("MixtralConfig", CAUSAL, num_local_experts=4, num_experts_per_tok=2, **DECODER), 0
    ),
    "nn.TransformerEncoder": Case(
        TorchEncoder, install="across modules", inputs=lambda: {"input_ids": ids()}
    ),
    "nn.Transformer": Case(
        TorchTransformer,
        2 * LAYERS,
        install="across modules",
        inputs=lambda: {"input_ids": ids(), "target": ids(7)},
    ),
    "timm Mlp": Case(lambda: Vision(lambda: TimmMlp(32, 48, False)), inputs=pixels),
    "timm Mlp, norm": Case(lambda: Vision(lambda: TimmMlp(32, 48, True)), inputs=pixels),
    "torchvision MLP": Case(lambda: Vision(sequential_mlp), inputs=pixels),
    "nanoGPT": Case(NanoGPT, inputs=lambda: {"input_ids": ids()}),
}
