"""Trains a student on a frozen teacher's predictions: the same responses in another layout.

So a checkpoint of the joint layout teaches itself the tree layout. Student and teacher see the same
image, regions and responses, masked at the same positions; only what attends to what differs, and
how boxes are sampled. The captions are only contexts to predict in, so the teacher can write them.

Axis letters: B samples, L positions, n masked positions, V vocabulary.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from ..common.loading import load_model
from ..modeling_loss import LOSS_WEIGHTINGS, draw_masked, mask_rate
from ..modeling_perceptiondlm import PerceptionDLMForConditionalGeneration
from ..processing_perceptiondlm import PerceptionDLMProcessor
from .recipe_sections import DistillationRecipe
from .samples import DiffusionCollator, Sample

Pair = tuple[Sample, Sample]  # the student's sample, and the teacher's of the same responses


@dataclass
class Teacher:
    """A frozen model and its processor."""

    model: PerceptionDLMForConditionalGeneration
    processor: PerceptionDLMProcessor

    @classmethod
    def load(cls, recipe: DistillationRecipe, student, device: torch.device) -> "Teacher":
        """Loads the teacher of a recipe onto a device.

        Raises ValueError where the student's processor has other tokens, another tile size or
        other region prompts.
        """
        dtype = getattr(torch, recipe.dtype)
        model, processor = load_model(recipe.checkpoint, recipe.subfolder, dtype)
        processor.image_processor.max_tiles = student.image_processor.max_tiles
        expect_alike(student, processor)
        return cls(model.requires_grad_(False).eval().to(device), processor)


def expect_alike(student, teacher):
    """Refuses processors with other tokens, tile sizes or region prompts, for samples to pair."""
    ours, theirs = _shared_facts(student), _shared_facts(teacher)
    for name, value in ours.items():
        if theirs[name] != value:
            raise ValueError(
                f"expected a teacher with the student's {name}, got"
                f" {_shortened(theirs[name])} instead of {_shortened(value)}"
            )


def _shared_facts(processor) -> dict:
    """Returns what the processors of student and teacher have in common."""
    images = processor.image_processor
    return {
        "vocabulary": processor.tokenizer.get_vocab(),
        "num_region_prompts": images.num_region_prompts,
        "image_size": images.image_size,
    }


def _shortened(value) -> str:
    return f"{len(value)} tokens" if isinstance(value, dict) else str(value)


class PairedDataset(Dataset):
    """Pairs the samples of two data sets that draw the same content for an index."""

    def __init__(self, student, teacher):
        self.student = student
        self.teacher = teacher

    def __len__(self) -> int:
        return len(self.student)

    def __getitem__(self, index: int) -> Pair:
        return self.student[index], self.teacher[index]

    def length(self, index: int) -> int:
        """Estimates how long the student's sample is."""
        return self.student.length(index)


class PairedSamples:
    """Makes the student's and the teacher's sample of one record, with the same draws."""

    def __init__(self, student, teacher):
        self.student = student
        self.teacher = teacher
        self.count = student.count
        self.samples_of = student.samples_of
        self.length = student.length

    def make(self, record, number: int, rng, key: tuple, epoch: int) -> Pair:
        """Makes both samples of group `number` of a record."""
        again = copy.deepcopy(rng)
        return (
            self.student.make(record, number, rng, key, epoch),
            self.teacher.make(record, number, again, key, epoch),
        )


class PairedCollator:
    """Batches pairs: the student's inputs, and under "teacher" those of the teacher.

    The teacher's responses are masked where the student's are. What the joint layout predicts
    besides (markers, and what stands between two captions) is neither masked nor learned.
    """

    def __init__(self, student: DiffusionCollator, teacher: DiffusionCollator):
        self.student = student
        self.teacher = teacher

    def __call__(self, pairs: list[Pair]) -> dict:
        students, teachers = map(list, zip(*pairs, strict=True))
        batch, taught = self.student(students), self.teacher(teachers)
        own, other = _response_places(batch, students), _response_places(taught, teachers)
        if not own.any(1).all():
            raise ValueError("expected samples with responses, got one without")
        if not torch.equal(own.sum(1), other.sum(1)):
            raise ValueError(
                f"expected responses of the same lengths in both layouts, got {own.sum(1).tolist()}"
                f" and {other.sum(1).tolist()} tokens: set data.caption_length"
            )

        batch["labels"] = batch["labels"].masked_fill(~own, -100)
        taught["labels"] = taught["labels"].masked_fill(~other, -100)
        noise = torch.ones_like(taught["noise"])
        noise[other] = batch["noise"][own]
        return batch | {"teacher": taught | {"noise": noise, "timesteps": batch["timesteps"]}}


def _response_places(batch: Mapping, samples: list[Sample]) -> torch.Tensor:
    """Marks, bool (B, L), the positions of the responses' own tokens, region after region."""
    places = torch.zeros(batch["labels"].shape, dtype=torch.bool)
    repeats = len(places) // len(samples)  # 2 where masking is complementary
    start = max(sample.sequence.prompt_length for sample in samples)
    for i, row in enumerate(places):
        sequence = samples[i // repeats].sequence
        for slot in sequence.slots:
            first = start + slot.start - sequence.prompt_length
            row[first : first + len(slot)] = True
    return places


def distillation_loss(
    student, teacher: Teacher, inputs: dict, recipe: DistillationRecipe, weighting: str
) -> torch.Tensor:
    """Returns the weighted mean of the diffusion loss and the divergence from the teacher.

    Args:
        inputs: a batch of `PairedCollator`.
        weighting: of the masked positions, a name in `LOSS_WEIGHTINGS`.
    """
    inputs = dict(inputs)
    taught = inputs.pop("teacher")
    with torch.no_grad():
        wanted = teacher.model(**taught, stop_at="masked_logits")  # (n, V)
    predicted = student(**inputs, stop_at="masked_logits")

    labels = inputs["labels"].to(predicted.device)
    rate = mask_rate(inputs["timesteps"].to(predicted.device), labels)
    masked = draw_masked(labels, rate, inputs["noise"].to(predicted.device))
    predicted, wanted = predicted.float(), wanted.to(predicted.device).float()

    T, share = recipe.temperature, recipe.teacher_share
    targets = F.log_softmax(wanted / T, -1)
    guesses = F.log_softmax(predicted / T, -1)
    divergence = F.kl_div(guesses, targets, reduction="none", log_target=True).sum(-1)
    # T^2 keeps the gradient's size whatever the temperature (arXiv:1503.02531).
    losses = share * T**2 * divergence
    if share < 1:
        losses = losses + (1 - share) * F.cross_entropy(predicted, labels[masked], reduction="none")
    return LOSS_WEIGHTINGS[weighting](losses, labels, masked, rate)
