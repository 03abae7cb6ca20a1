"""Saves tiny segmenters of random weights: SAM, SAM 2 and SAM 3, laid out as theirs are."""

import json
from pathlib import Path

import torch
import transformers

VECTORS = Path(__file__).parent / "fixtures" / "vectors"
WIDTH = 16
PROMPTS = {"hidden_size": WIDTH, "mask_input_channels": 4}
DECODER = {
    "hidden_size": WIDTH,
    "mlp_dim": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "iou_head_hidden_dim": WIDTH,
}
MEMORY = {  # of the video models, which share their weights with those for images
    "memory_attention_hidden_size": WIDTH,
    "memory_attention_feed_forward_hidden_size": WIDTH,
    "memory_attention_num_layers": 1,
    "memory_encoder_hidden_size": WIDTH,
    "memory_encoder_output_channels": 8,
    "mask_downsampler_embed_dim": WIDTH,
    "memory_fuser_embed_dim": WIDTH,
    "memory_fuser_intermediate_dim": WIDTH,
    "memory_fuser_num_layers": 1,
}


def save_tiny(kind: str, folder: Path) -> torch.nn.Module:
    """Saves a segmenter of a model_type with the settings of its images; returns it."""
    make, side = {
        "sam": (_sam, 64),
        "sam2": (_sam2, 64),
        "sam2_video": (_sam2_video, 64),
        "sam3": (_sam3, 56),
        "sam3_tracker": (_sam3_tracker, 56),
        "sam3_video": (_sam3_video, 56),
    }[kind]
    torch.manual_seed(0)
    model = make(side).eval()
    for name, weight in model.named_parameters():  # louder than usual: places must differ
        if weight.ndim > 1 or name.endswith("bias"):
            weight.data = weight.data * 4 + 0.2 * torch.randn(weight.shape)
    model.save_pretrained(folder)

    size = {"longest_edge": side} if kind == "sam" else {"height": side, "width": side}
    settings = {"size": size, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]}
    (Path(folder) / "preprocessor_config.json").write_text(json.dumps(settings))
    if kind in ("sam3", "sam3_video"):
        _tokenizer().save_pretrained(folder)
    return model


def _tokenizer():
    return transformers.PreTrainedTokenizerFast.from_pretrained(VECTORS / "released-region")


def _sam(side: int):
    size = {"image_size": side, "patch_size": 8}
    vision = {
        "hidden_size": WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "mlp_dim": WIDTH,
        "output_channels": WIDTH,
        "num_pos_feats": 8,
        "global_attn_indexes": [0],
        "window_size": 2,
    }
    config = transformers.SamConfig(
        vision_config=vision | size,
        prompt_encoder_config=PROMPTS | size,
        mask_decoder_config=DECODER,
    )
    return transformers.SamModel(config)


def _sam2_parts(side: int) -> dict:
    backbone = {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": 8,
        "num_attention_heads": 1,
        "blocks_per_stage": [1, 1, 2, 1],
        "embed_dim_per_stage": [8, 16, 32, 64],
        "num_attention_heads_per_stage": [1, 2, 4, 8],
        "window_size_per_stage": [8, 4, 4, 4],
        "window_positional_embedding_background_size": [2, 2],
        "global_attention_blocks": [3],
        "image_size": [side, side],
    }
    vision = {
        "model_type": "sam2_vision_model",
        "backbone_config": backbone,
        "backbone_channel_list": [64, 32, 16, 8],
        "backbone_feature_sizes": [[side // 4] * 2, [side // 8] * 2, [side // 16] * 2],
        "fpn_hidden_size": WIDTH,
    }
    prompts = PROMPTS | {"image_size": side, "patch_size": 16}
    return {
        "vision_config": vision,
        "prompt_encoder_config": prompts,
        "mask_decoder_config": DECODER,
    }


def _sam2(side: int):
    return transformers.Sam2Model(transformers.Sam2Config(**_sam2_parts(side)))


def _sam2_video(side: int):
    parts = _sam2_parts(side)
    kind = transformers.models.sam2_video.configuration_sam2_video.Sam2VideoMaskDecoderConfig
    decoder = kind(**parts.pop("mask_decoder_config"))  # transformers 5.18 misreads a dict
    config = transformers.Sam2VideoConfig(**parts, mask_decoder_config=decoder, **MEMORY)
    return transformers.Sam2VideoModel(config)


def _sam3_vision(side: int) -> dict:
    backbone = {
        "model_type": "sam3_vit_model",
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": side,
        "patch_size": 14,
        "window_size": 2,
        "global_attn_indexes": [0],
        "pretrain_image_size": 28,
    }
    return {
        "model_type": "sam3_vision_model",
        "backbone_config": backbone,
        "fpn_hidden_size": WIDTH,
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
    }


def _sam3_tracker_parts(side: int) -> dict:
    return {
        "vision_config": _sam3_vision(side),
        "prompt_encoder_config": PROMPTS | {"image_size": side, "patch_size": 14},
        "mask_decoder_config": DECODER,
    }


def _sam3_tracker(side: int):
    config = transformers.Sam3TrackerConfig(**_sam3_tracker_parts(side))
    return transformers.Sam3TrackerModel(config)


def _sam3_config(side: int):
    layers = {
        "hidden_size": WIDTH,
        "num_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": WIDTH,
    }
    text = {
        "vocab_size": len(_tokenizer()),
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "projection_dim": WIDTH,
        "max_position_embeddings": 32,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return transformers.Sam3Config(
        vision_config=_sam3_vision(side),
        text_config=text,
        geometry_encoder_config=layers,
        detr_encoder_config=layers,
        detr_decoder_config=layers | {"num_queries": 5},
        mask_decoder_config={
            "hidden_size": WIDTH,
            "num_attention_heads": 2,
            "num_upsampling_stages": 2,
        },
    )


def _sam3(side: int):
    return transformers.Sam3Model(_sam3_config(side))


def _sam3_video(side: int):
    tracker = transformers.Sam3TrackerVideoConfig(**_sam3_tracker_parts(side), **MEMORY)
    tracker.image_size = side
    config = transformers.Sam3VideoConfig(
        detector_config=_sam3_config(side).to_dict(), tracker_config=tracker.to_dict()
    )
    return transformers.Sam3VideoModel(config)
