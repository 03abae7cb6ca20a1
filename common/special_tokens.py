"""The one table of special tokens: their texts, by the fields of the config that hold their ids."""

from transformers import PreTrainedTokenizerFast

MAX_REGIONS = 16  # placeholders and caption markers that a vocabulary has

NAMED_TOKENS = {
    "bos_token_id": "<|startoftext|>",
    "eos_token_id": "<|endoftext|>",
    "mask_token_id": "<|mdm_mask|>",
    "start_header_token_id": "<|start_header_id|>",
    "end_header_token_id": "<|end_header_id|>",
    "eot_token_id": "<|eot_id|>",
}
IMAGE_TOKENS = {
    "image_token_id": "<IMG_CONTEXT>",
    "image_start_token_id": "<img>",
    "image_end_token_id": "</img>",
}
LLAVA_IMAGE_TOKENS = {"image_token_id": "<image>"}
ROI_TOKENS = [f"<|reserved_token_{i}|>" for i in range(MAX_REGIONS)]
CAPTION_TOKENS = [f"<|Mask_Cap_{i}|>" for i in range(MAX_REGIONS)]


def token_ids(tokenizer: PreTrainedTokenizerFast, image_tokens: dict[str, str]) -> dict:
    """Returns the config's fields of special-token ids, as a tokenizer's vocabulary has them.

    Raises ValueError for a vocabulary without one of the tokens that every model needs.
    """
    vocabulary = tokenizer.get_vocab()
    named = {**NAMED_TOKENS, **image_tokens}
    missing = [token for token in named.values() if token not in vocabulary]
    if missing:
        raise ValueError(f"expected a tokenizer with {' '.join(missing)}, got one without")

    ids = {"image_start_token_id": None, "image_end_token_id": None}
    ids |= {field: vocabulary[token] for field, token in named.items()}
    ids["pad_token_id"] = tokenizer.pad_token_id
    ids["roi_token_ids"] = [vocabulary[t] for t in ROI_TOKENS if t in vocabulary]
    ids["caption_token_ids"] = [vocabulary[t] for t in CAPTION_TOKENS if t in vocabulary]
    return ids
