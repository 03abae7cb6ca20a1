"""Trains a byte-level BPE tokenizer for a model from scratch."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ..common.special_tokens import CAPTION_TOKENS, IMAGE_TOKENS, NAMED_TOKENS, ROI_TOKENS

SPECIAL_TOKENS = [*NAMED_TOKENS.values(), *IMAGE_TOKENS.values(), *ROI_TOKENS, *CAPTION_TOKENS]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a tokenizer of at most `vocab_size` tokens, special ones and all 256 bytes included.

    Words are told apart before merging with their leading space, so that a frequent word becomes
    one token.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    min_size = len(alphabet) + len(SPECIAL_TOKENS)
    if vocab_size < min_size:
        raise ValueError(f"expected a vocab_size of at least {min_size}, got {vocab_size}")

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
        bos_token=NAMED_TOKENS["bos_token_id"],
        eos_token=NAMED_TOKENS["eos_token_id"],
        pad_token=NAMED_TOKENS["eos_token_id"],
        mask_token=NAMED_TOKENS["mask_token_id"],
        padding_side="left",
    )
