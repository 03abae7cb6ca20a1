"""Keeps what the model has seen, for further requests about the same images, within a bound.

images, masks  ->  digest  ->  kept?  ->  joined  ->  diffusion_generate  ->  kept again, counted
                               else seen, all that are missing in one call
"""

import contextlib
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from PIL import Image

from ...generation_seen import Seen, SeenGroup


def digest_of(images: Sequence[Image.Image], masks: Sequence[Image.Image] = ()) -> bytes:
    """Digests all that decides what is seen: sizes and pixels of images and masks, in their order.

    Takes images and masks as `load_image` and `load_mask` give them.
    """
    found = hashlib.blake2b(digest_size=32)
    for kind, own in (("images", images), ("masks", masks)):
        found.update(f"{len(own)} {kind};".encode())
        for image in own:
            found.update(f"{image.mode} {image.width} {image.height};".encode())
            found.update(image.tobytes())
    return found.digest()


class SeenCache:
    """Keeps states by their digests, and drops those used longest ago to stay within its bound.

    It belongs to the one thread that runs the model; `nbytes` may be read in any.

    Args:
        max_bytes: of all states that are kept. A state grows while it is used, by the trunks that
            its prompts ask for, and is counted afterwards. One that is too large by itself is kept
            without its trunks, and not at all where that is not enough.
        count: called with "seen_hits" or "seen_misses" and how many there were.

    Attributes:
        nbytes: of what is kept.
    """

    def __init__(self, max_bytes: int, count: Callable[[str, int], None] = lambda name, n: None):
        self.max_bytes = max_bytes
        self.nbytes = 0
        self._count = count
        self._states: OrderedDict[bytes, tuple[Seen, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._states)

    def clear(self):
        """Drops everything."""
        self._states.clear()
        self.nbytes = 0

    @contextlib.contextmanager
    def seen(self, keys: Sequence[bytes], see: Callable[[list[int]], Seen]) -> Iterator[Seen]:
        """Gives what was seen of each key, joined; keeps it, and counts it again once it was used.

        Meanwhile others may be given the same.

        Args:
            keys: the digest of each image, or of each conversation's images.
            see: sees those of some places in `keys`, all in one call.
        """
        found = {key: self._states[key][0] for key in keys if key in self._states}
        missing = {key: place for place, key in enumerate(keys) if key not in found}
        if missing:
            found |= zip(missing, separated(see(list(missing.values()))), strict=True)
        self._count("seen_misses", len(missing))
        self._count("seen_hits", len(keys) - len(missing))
        for key in missing:
            self._keep(key, found[key])

        try:
            yield Seen.joined([found[key] for key in keys])
        finally:
            for key, state in found.items():
                self._keep(key, state)

    def _keep(self, key: bytes, state: Seen):
        """Keeps a state as the one used last; drops the oldest while there is too much."""
        self._drop(key)
        if state.nbytes > self.max_bytes:
            for group in state.groups:
                group.trunks.clear()
        size = state.nbytes
        if size > self.max_bytes:
            return
        self._states[key] = state, size
        self.nbytes += size
        while self.nbytes > self.max_bytes:
            self._drop(next(iter(self._states)))

    def _drop(self, key: bytes):
        _, size = self._states.pop(key, (None, 0))
        self.nbytes -= size


def separated(seen: Seen) -> list[Seen]:
    """Takes what was seen in one call apart, into a state for each image or conversation.

    No state holds on to the memory of another.
    """
    groups: list[list[SeenGroup]] = [[] for _ in range(seen.num_images)]
    for group in seen.groups:
        own = replace(
            group,
            images=[0],
            image_features=_owned(group.image_features),
            region_features=_owned(group.region_features),
        )
        groups[group.images[0]].append(own)

    if seen.counts is None or seen.chosen is None:
        return [replace(seen, groups=own) for own in groups]
    return [
        replace(seen, groups=own, counts=[count], chosen=[chosen])
        for own, count, chosen in zip(groups, seen.counts, seen.chosen, strict=True)
    ]


def _owned(features: torch.Tensor | None) -> torch.Tensor | None:
    """Copies features that are a part of a larger tensor."""
    if features is None or features.untyped_storage().nbytes() == features.nbytes:
        return features
    return features.clone()
