"""A fresh byte-level BPE tokenizer for a model trained from scratch."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

BOS_TOKEN, EOS_TOKEN = "<|startoftext|>", "<|endoftext|>"
MASK_TOKEN, EOT_TOKEN = "<|mdm_mask|>", "<|eot_id|>"
START_HEADER_TOKEN, END_HEADER_TOKEN = "<|start_header_id|>", "<|end_header_id|>"
IMAGE_TOKEN, IMAGE_START_TOKEN, IMAGE_END_TOKEN = "<IMG_CONTEXT>", "<img>", "</img>"
MOST_REGIONS = 16  # placeholders and caption markers
ROI_TOKENS = [f"<|reserved_token_{i}|>" for i in range(MOST_REGIONS)]
CAPTION_TOKENS = [f"<|Mask_Cap_{i}|>" for i in range(MOST_REGIONS)]
SPECIAL_TOKENS = [
    BOS_TOKEN,
    EOS_TOKEN,
    MASK_TOKEN,
    START_HEADER_TOKEN,
    END_HEADER_TOKEN,
    EOT_TOKEN,
    IMAGE_TOKEN,
    IMAGE_START_TOKEN,
    IMAGE_END_TOKEN,
    *ROI_TOKENS,
    *CAPTION_TOKENS,
]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of at most `vocab_size` tokens, special tokens and all 256 bytes included.

    Words are told apart before merging with their leading space, so that a frequent word becomes
    one token.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    least = len(alphabet) + len(SPECIAL_TOKENS)
    if vocab_size < least:
        raise ValueError(f"expected a vocab_size of at least {least}, got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        pad_token=EOS_TOKEN,
        mask_token=MASK_TOKEN,
        padding_side="left",
    )


def special_token_ids(tokenizer: PreTrainedTokenizerFast) -> dict:
    """The fields of `PerceptionDLMConfig` that name special tokens, by this tokenizer."""
    ids = tokenizer.convert_tokens_to_ids
    return {
        "mask_token_id": ids(MASK_TOKEN),
        "eot_token_id": ids(EOT_TOKEN),
        "start_header_token_id": ids(START_HEADER_TOKEN),
        "end_header_token_id": ids(END_HEADER_TOKEN),
        "bos_token_id": ids(BOS_TOKEN),
        "eos_token_id": ids(EOS_TOKEN),
        "pad_token_id": tokenizer.pad_token_id,
        "image_token_id": ids(IMAGE_TOKEN),
        "image_start_token_id": ids(IMAGE_START_TOKEN),
        "image_end_token_id": ids(IMAGE_END_TOKEN),
        "roi_token_ids": ids(ROI_TOKENS),
        "caption_token_ids": ids(CAPTION_TOKENS),
    }
