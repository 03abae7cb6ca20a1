"""States what is true of a thing of a scene: all that captions and questions speak of."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ThingFacts:
    """What is true of one thing of a scene."""

    concept: str  # `Concept.name`
    size: str  # "small", "medium-sized" or "large": diameter of its whole mask over the short side
    position: str  # one of `language.POSITIONS`, by the center of the visible mask's box
    hidden: str  # "whole", "partly hidden" or "mostly hidden", by other things
    hidden_by: int | None  # index of the thing that hides most of it
    on: int | None  # index of the thing on which it lies
    cut: str | None  # "left", "right", "top" or "bottom": the border that cuts it off
    center: tuple[float, float]  # (x, y) of its visible mask's box, shares of width and height
    area: float  # its visible share of the image
