"""Orders samples: shuffled by seed and epoch, in batches of samples of like length."""

from collections.abc import Iterator

from torch.utils.data import Sampler

from .samples import ORDER_STREAM, generator_of

BATCHES_SORTED = 16  # batches' worth of samples that are sorted by length together


class EpochSampler(Sampler):
    """Indices of one epoch, counted on over epochs (`epoch * n + i`).

    So workers need no notice of the epoch, and a sample's index says all that its noise depends
    on. With `lengths`, samples are sorted within chunks of a few global batches and the batches
    shuffled, so that a batch holds samples of like length and an epoch still every sample once.
    """

    def __init__(self, dataset, seed: int, batch_size: int, group: bool):
        self.dataset = dataset
        self.seed = seed
        self.batch_size = batch_size
        self.group = group
        self.epoch = 0

    def set_epoch(self, epoch: int):
        """Tells the sampler which epoch comes; the trainer calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        n = len(self.dataset)
        rng = generator_of(self.seed, ORDER_STREAM, self.epoch)
        order = (rng.permutation(n) + self.epoch * n).tolist()
        yield from self._grouped(order, rng) if self.group else order

    def _grouped(self, order: list[int], rng) -> Iterator[int]:
        """Yields indices batch by batch, each batch of samples of like length."""
        step = self.batch_size * BATCHES_SORTED
        for start in range(0, len(order), step):
            chunk = sorted(order[start : start + step], key=self.dataset.length, reverse=True)
            batches = [
                chunk[i : i + self.batch_size] for i in range(0, len(chunk), self.batch_size)
            ]
            whole = [batch for batch in batches if len(batch) == self.batch_size]
            for k in rng.permutation(len(whole)):
                yield from whole[k]
            yield from (index for batch in batches[len(whole) :] for index in batch)
