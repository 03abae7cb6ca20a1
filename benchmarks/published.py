"""Decodes in the published ways, written plainly: the baseline of every ratio.

They are those of captioning regions (PerceptionDLM) and of answering questions (LLaDA-V). Every
step runs the whole sequence through the network and its head, takes a float64 softmax over the
whole vocabulary at every position, and remasks or commits with Python loops over positions. Nothing
is cached but the image features.
"""

import torch

from ..configuration_perceptiondlm import ROLE_CAPTION
from ..image_processing_perceptiondlm import PerceptionDLMImageProcessor
from ..modeling_attention import Structure


def caption_regions_plainly(model, inputs: dict, steps: int) -> list[list[int]]:
    """Captions regions by joint remasking; returns the ids of each row's response positions.

    Args:
        inputs: the processor's tensors in the released layout; rows run one after another.
        steps: of denoising.
    """
    return _decode_rows(model, inputs, steps, remask_jointly, suppressed=[])


def answer_questions_plainly(model, inputs: dict, steps: int) -> list[list[int]]:
    """Answers questions, as `caption_regions_plainly`, in one block that `steps` commit."""
    suppressed = model.decoding_defaults["suppress_tokens"]
    return _decode_rows(model, inputs, steps, commit_surest, suppressed)


@torch.no_grad()
def _decode_rows(model, inputs: dict, steps: int, still_masked, suppressed) -> list[list[int]]:
    names = PerceptionDLMImageProcessor.model_input_names
    vision_inputs = {k: inputs[k] for k in names if k in inputs}
    prompt_embeds = model.embed_inputs(inputs["input_ids"], inputs["role_ids"], **vision_inputs)
    return [
        _decode_row(model, inputs, prompt_embeds, row, steps, still_masked, suppressed)
        for row in range(len(prompt_embeds))
    ]


def _decode_row(model, inputs, prompt_embeds, row, steps, still_masked, suppressed) -> list[int]:
    mask_id = model.config.mask_token_id
    kept = inputs["attention_mask"][row].bool()
    ids = inputs["input_ids"][row][kept].clone()  # (L,)
    is_response = inputs["role_ids"][row][kept] == ROLE_CAPTION
    places = [i for i in range(len(ids)) if is_response[i] and ids[i] == mask_id]

    masked = set(places)
    for step in range(steps):
        # Predict every position, also those of the prompt.
        embeds = prompt_embeds[row][kept].clone()
        embeds[is_response] = model.get_input_embeddings()(ids[is_response])
        logits = _whole_sequence_logits(model, inputs, row, kept, embeds)  # (L, V)
        logits[:, suppressed] = -torch.inf
        probabilities = logits.double().softmax(-1)
        predicted = probabilities.argmax(-1)
        confidence = probabilities.gather(-1, predicted[:, None])[:, 0]

        # Reveal what is masked, then mask what the method doubts.
        for i in list(masked):
            ids[i] = predicted[i]
        masked = still_masked(places, masked, confidence, step, steps)
        for i in masked:
            ids[i] = mask_id
        if not masked:
            break

    return [int(ids[i]) for i in places]


def remask_jointly(places: list[int], masked: set[int], confidence, step: int, steps: int) -> set:
    """Returns the places to mask next: the least confident of all, committed or not."""
    count = int(len(places) * ((steps - 1 - step) / steps))
    return set(sorted(places, key=lambda i: float(confidence[i]))[:count])


def commit_surest(places: list[int], masked: set[int], confidence, step: int, steps: int) -> set:
    """Returns the places to mask next: those masked now without the most confident of them."""
    quota = len(places) // steps + (step < len(places) % steps)
    return masked - set(sorted(masked, key=lambda i: -float(confidence[i]))[:quota])


def _whole_sequence_logits(model, inputs, row, kept, embeds) -> torch.Tensor:
    columns = [inputs[k][row : row + 1, kept] for k in ("region_ids", "role_ids", "attention_mask")]
    structure = Structure(model.config.region_layout, *columns)
    hidden = model.attend(embeds[None], inputs["position_ids"][row : row + 1, kept], structure)
    return model.language_model.lm_head(hidden)[0]
