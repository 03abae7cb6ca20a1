"""Runs the forward passes of several batches as one, where each computes its responses alone.

    2 rows of 12 columns    [. . . .][. . . .]  \\
                                                 >  one sequence (1, N, D)  -->  logits of each
    1 row of 129 columns    [. . . . . . . . ]  /    attention: each batch its own

Nothing is padded, so short responses cost what they cost alone, whatever runs beside them.
"""

import logging
from collections.abc import Sequence

import torch

from ...generation_cache import ForwardPass
from ...modeling_attention import PackedBatch, PackedCaches

log = logging.getLogger(__name__)


def run_passes(passes: Sequence[ForwardPass]) -> list[torch.Tensor | Exception]:
    """Runs forward passes; returns the logits of each, or the error that it met."""
    packed = [i for i, one in enumerate(passes) if one.network.is_packable]
    answers: dict[int, torch.Tensor | Exception] = {}
    if len(packed) > 1:
        try:
            logits = packed_logits([passes[i] for i in packed])
            answers = dict(zip(packed, logits, strict=True))
        except Exception as error:  # one of them is to blame: each runs by itself
            log.warning("%d forward passes failed together: %s", len(packed), error)
    done = [answers[i] if i in answers else _alone(one) for i, one in enumerate(passes)]
    if passes:
        settle(passes[0].response_ids.device)
    return done


def settle(device: torch.device):
    """Waits until a GPU has done what it was given: who comes next would wait for all of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _alone(one: ForwardPass) -> torch.Tensor | Exception:
    try:
        return one.run()
    except Exception as error:
        return error


@torch.no_grad()
def packed_logits(passes: Sequence[ForwardPass]) -> list[torch.Tensor]:
    """Computes what each pass's `run` gives, all in one run of the model they share.

    All networks have to be packable (see `is_packable`).
    """
    networks = [one.network for one in passes]
    text = networks[0].text

    # Row after row of each batch, in one sequence.
    ids = torch.cat([one.response_ids.flatten() for one in passes])[None]  # (1, N)
    positions = [network.positions[:, network.prompt_length :].flatten() for network in networks]
    batches = [
        PackedBatch(
            len(one.response_ids), network.cache, network.prompt_length, network.response_mask
        )
        for one, network in zip(passes, networks, strict=True)
    ]
    sizes = [one.response_ids.numel() for one in passes]
    hidden = text.model(
        text.get_input_embeddings()(ids),
        torch.cat(positions)[None],
        None,
        PackedCaches(batches, sizes),
    )

    # Only the positions that are asked for reach the head.
    wanted = [
        _columns_of(states.unflatten(0, (len(one.response_ids), -1)), one.columns.flatten(1))
        for one, states in zip(passes, hidden[0].split(sizes), strict=True)
    ]
    logits = text.lm_head(torch.cat(wanted)).to(ids.device)  # (M, V)
    split = logits.split([len(states) for states in wanted])
    return [own.view(*one.columns.shape, -1) for one, own in zip(passes, split, strict=True)]


def _columns_of(states: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Takes some columns, int64 (B, M), of states (B, A, D), one row behind the other: (B M, D)."""
    index = columns[..., None].expand(-1, -1, states.shape[-1]).to(states.device)
    return states.gather(1, index).flatten(0, 1)
