"""The table of architectures: how each is built, what it is given, and what is allowed where it is not the rule."""

from typing import Any

import diffusers
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F

from .training import Architecture
from .without_torchvision import import_timm

timm = import_timm()

_TEXT = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_IDS = torch.arange(48).view(3, 16) * 7 % 61 + 1


def _language(kind: str, **settings: Any) -> Architecture:
    """A language model of transformers, with its loss on what comes next, or on what is masked."""
    config = getattr(hf, kind + "Config")(**settings)
    suffix = (
        "ForCausalLM" if hasattr(hf, kind + "ForCausalLM") and not hasattr(hf, kind + "ForMaskedLM") else "ForMaskedLM"
    )
    name = kind + ("LMHeadModel" if kind == "GPT2" else suffix)
    return Architecture(lambda: getattr(hf, name)(config), lambda: {"input_ids": _IDS, "labels": _IDS})


def _sequences(name: str, config: Any) -> Architecture:
    return Architecture(
        lambda: getattr(hf, name)(config),
        lambda: {"input_ids": _IDS, "labels": _IDS.flip(1), "decoder_input_ids": _IDS},
    )


def _images(size: int = 32, count: int = 4) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def _classes(name: str, config: Any, size: int = 32) -> Architecture:
    return Architecture(
        lambda: getattr(hf, name)(config), lambda: {"pixel_values": _images(size), "labels": torch.tensor([0, 1, 2, 3])}
    )


def _timm(name: str, size: int = 32, **settings: Any) -> Architecture:
    return Architecture(
        lambda: timm.create_model(name, num_classes=8, **settings),
        lambda: {"x": _images(size, 8)},
        lambda model, batch: F.cross_entropy(model(batch["x"]), torch.arange(8)),
    )


def _denoising(build: Any, **given: Any) -> Architecture:
    """A model of diffusers that tells noise from an image at several time steps."""
    noise = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))

    def loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        return F.mse_loss(model(batch["noisy"], **batch["given"]).sample[:, :3], noise)

    times = torch.tensor([713.0, 20.0])
    return Architecture(build, lambda: {"noisy": _images(16, 2) + noise, "given": {"timestep": times, **given}}, loss)


def _mae() -> Architecture:
    config = hf.ViTMAEConfig(
        **(_VISION | _NO_DROPOUT),
        decoder_hidden_size=32,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=64,
    )
    noise = torch.rand(4, 16, generator=torch.Generator().manual_seed(3))
    return Architecture(lambda: hf.ViTMAEForPreTraining(config), lambda: {"pixel_values": _images(), "noise": noise})


def _detr() -> Architecture:
    backbone = hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12, 16, 20], depths=[1] * 4, layer_type="basic", out_features=["stage4"]
    )
    config = hf.DetrConfig(
        use_timm_backbone=False,
        backbone_config=backbone,
        use_pretrained_backbone=False,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_queries=6,
        num_labels=4,
        dropout=0.0,
    )
    boxes = torch.rand(3, 4, generator=torch.Generator().manual_seed(4)) * 0.3 + 0.3
    target = {"class_labels": torch.tensor([0, 1, 2]), "boxes": boxes}
    return Architecture(
        lambda: hf.DetrForObjectDetection(config),
        lambda: {"pixel_values": _images(64, 2), "labels": [target, target]},
        tolerances={"bf16": 0.03},
        reason="boxes are matched to queries one to one: near a tie, rounding decides which query learns which box",
    )


def _forecast() -> Architecture:
    config = hf.PatchTSTConfig(
        context_length=32,
        prediction_length=8,
        num_input_channels=3,
        patch_length=4,
        patch_stride=4,
        d_model=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=64,
        loss="mse",
        attention_dropout=0.0,
        ff_dropout=0.0,
        head_dropout=0.0,
    )
    series = torch.rand(8, 40, 3, generator=torch.Generator().manual_seed(5)) * 100 + 1000
    return Architecture(
        lambda: hf.PatchTSTForPrediction(config),
        lambda: {"past_values": series[:, :32], "future_values": series[:, 32:]},
    )


def _speech() -> Architecture:
    config = hf.WhisperConfig(
        vocab_size=64,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=16,
        dropout=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    sound = torch.randn(3, 8, 32, generator=torch.Generator().manual_seed(6))
    return Architecture(
        lambda: hf.WhisperForConditionalGeneration(config), lambda: {"input_features": sound, "labels": _IDS}
    )


def _waves() -> Architecture:
    config = hf.Wav2Vec2Config(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        conv_dim=(16, 16),
        conv_stride=(5, 4),
        conv_kernel=(10, 8),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        feat_proj_dropout=0.0,
        layerdrop=0.0,
        mask_time_prob=0.0,
        final_dropout=0.0,
        activation_dropout=0.0,
        ctc_loss_reduction="mean",
    )
    wave = torch.randn(2, 640, generator=torch.Generator().manual_seed(7))
    return Architecture(
        lambda: hf.Wav2Vec2ForCTC(config), lambda: {"input_values": wave, "labels": torch.arange(1, 13).view(2, 6)}
    )


def _pairs() -> Architecture:
    text = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 16,
        "eos_token_id": 63,
    }
    config = hf.CLIPConfig(text_config=text, vision_config={**_VISION}, projection_dim=16)
    return Architecture(
        lambda: hf.CLIPModel(config),
        lambda: {"input_ids": _IDS, "pixel_values": _images(count=3), "return_loss": True},
    )


_VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
_DECODER = _TEXT | {"num_key_value_heads": 2}
_SEQ = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "dropout": 0.0,
}
_UNET = {"sample_size": 16, "layers_per_block": 1, "block_out_channels": (8, 16), "norm_num_groups": 4}

ARCHITECTURES: dict[str, Architecture] = {
    # language, decoders
    "GPT-2": _language(
        "GPT2",
        vocab_size=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=32,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "Llama": _language("Llama", **_DECODER),
    "Llama, 12 layers": _language("Llama", **(_DECODER | {"num_hidden_layers": 12})),
    "Qwen2": _language("Qwen2", **_DECODER),
    "Qwen3": _language("Qwen3", **_DECODER, head_dim=8),
    "Mistral": _language("Mistral", **_DECODER),
    "Gemma": _language("Gemma", **_DECODER, head_dim=8, pad_token_id=0),
    "Phi": _language("Phi", **_TEXT, resid_pdrop=0.0, embd_pdrop=0.0),
    "OPT": _language(
        "OPT",
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=64,
        dropout=0.0,
        word_embed_proj_dim=32,
        max_position_embeddings=32,
    ),
    "GPT-NeoX": _language("GPTNeoX", **_TEXT, hidden_dropout=0.0, attention_dropout=0.0),
    "BLOOM": _language("Bloom", vocab_size=64, hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.0),
    "Mixtral": _language("Mixtral", **_DECODER, num_local_experts=4),
    "Mamba": _language("Mamba", vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4),
    # language, encoders
    "BERT": _language("Bert", **_TEXT, **_NO_DROPOUT),
    "RoBERTa": _language("Roberta", **_TEXT, **_NO_DROPOUT, max_position_embeddings=32),
    "ALBERT": _language("Albert", **_TEXT, **_NO_DROPOUT, embedding_size=16),
    "DeBERTa-v2": _language("DebertaV2", **_TEXT, **_NO_DROPOUT, relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "DistilBERT": _language(
        "DistilBert", vocab_size=64, dim=32, n_layers=2, n_heads=4, hidden_dim=64, dropout=0.0, attention_dropout=0.0
    ),
    # sequences to sequences
    "T5": _sequences(
        "T5ForConditionalGeneration",
        hf.T5Config(
            vocab_size=64,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        ),
    ),
    "BART": _sequences("BartForConditionalGeneration", hf.BartConfig(**_SEQ)),
    # images
    "ViT": _classes("ViTForImageClassification", hf.ViTConfig(**_VISION, **_NO_DROPOUT, num_labels=4)),
    "BEiT": _classes(
        "BeitForImageClassification", hf.BeitConfig(**_VISION, **_NO_DROPOUT, drop_path_rate=0.0, num_labels=4)
    ),
    "ViT-MAE": _mae(),
    "DETR": _detr(),
    "SegFormer": _classes(
        "SegformerForImageClassification",
        hf.SegformerConfig(
            num_encoder_blocks=2,
            depths=[1, 1],
            sr_ratios=[2, 1],
            hidden_sizes=[16, 32],
            patch_sizes=[7, 3],
            strides=[4, 2],
            num_attention_heads=[1, 2],
            mlp_ratios=[2, 2],
            drop_path_rate=0.0,
            classifier_dropout_prob=0.0,
            num_labels=4,
            **_NO_DROPOUT,
        ),
    ),
    "CLIP": _pairs(),
    # sound, series
    "Whisper": _speech(),
    "Wav2Vec2": _waves(),
    "PatchTST": _forecast(),
    # timm
    "ResNet": _timm("resnet10t", channels=(16, 24, 32, 40), stem_width=8),
    "MobileNet-v3": _timm("mobilenetv3_small_050", drop_rate=0.0),
    "RegNet": _timm("regnetx_002"),
    "DenseNet": _timm("densenet121", growth_rate=8, block_config=(2, 2, 2, 2)),
    "ConvNeXt": _timm("convnext_atto", depths=(1, 1, 1, 1), dims=(16, 24, 32, 40)),
    "DeiT": _timm("deit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=32, num_heads=4),
    "EVA-02": _timm("eva02_tiny_patch14_224", img_size=32, patch_size=8, depth=2, embed_dim=32, num_heads=4),
    "Swin": _timm(
        "swin_tiny_patch4_window7_224",
        img_size=32,
        patch_size=2,
        window_size=4,
        embed_dim=16,
        depths=(1, 1),
        num_heads=(2, 4),
    ),
    # diffusers
    "UNet": _denoising(
        lambda: diffusers.UNet2DModel(
            **_UNET,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=4,
        )
    ),
    "UNet with text": _denoising(
        lambda: diffusers.UNet2DConditionModel(
            **_UNET,
            in_channels=3,
            out_channels=3,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=4,
        ),
        encoder_hidden_states=torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(8)),
    ),
    "DiT": _denoising(
        lambda: diffusers.DiTTransformer2DModel(
            num_attention_heads=4,
            attention_head_dim=8,
            in_channels=3,
            out_channels=3,
            num_layers=2,
            sample_size=16,
            patch_size=4,
            norm_num_groups=4,
            dropout=0.0,
        ),
        class_labels=torch.tensor([1, 2]),
    ),
}
