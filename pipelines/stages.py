"""Makes the stages of a recipe, in their order; each can also be made and run by itself.

sa1b      masks -> caption -> categories -> mask_check -> texts
coconut   masks -> caption -> verify -> texts
"""

import dataclasses
from pathlib import Path

from .captioners import Captioner, CaptionRegions, ChatCaptioner, ModelCaptioner, ModelOptions
from .categories import (
    ChatExtractor,
    ChatVerifier,
    ExtractCategories,
    VerifyCategories,
    WordVerifier,
    head_nouns,
)
from .endpoint import ChatModel, EndpointOptions
from .mask_checks import CheckMasks
from .mask_filters import MaskFilters
from .recipe import EngineRecipe, HeadNouns, WordVerification
from .records import Stage
from .region_verifier import ModelVerification, ModelVerifier, VerifyRegions
from .text_filters import TextFilters
from .transformers_chat import TransformersChat

ANSWERS = "answers.sqlite"  # of all endpoints, in the output folder


def make_stages(recipe: EngineRecipe) -> list[Stage]:
    """Makes the stages of a recipe; no model is loaded, and nothing asked, before a call."""
    stages: list[Stage] = []
    if recipe.masks is not None:
        stages.append(MaskFilters(recipe.masks))
    if recipe.captioner is not None:
        stages.append(CaptionRegions(make_captioner(recipe)))
    if recipe.categories is not None:
        stages.append(ExtractCategories(_extractor(recipe)))
    if recipe.mask_check is not None:
        stages.append(CheckMasks(recipe.mask_check))
    if recipe.verifier is not None:
        stages.append(_verify_stage(recipe))
    if recipe.texts is not None:
        stages.append(TextFilters(recipe.texts))
    return stages


def make_captioner(recipe: EngineRecipe) -> Captioner:
    """Makes the captioner of a recipe that has one."""
    if isinstance(recipe.captioner, ModelOptions):
        return ModelCaptioner(recipe.captioner)
    return ChatCaptioner(_chat(recipe, recipe.captioner, "image-text-to-text"), recipe.prompt)


def _extractor(recipe: EngineRecipe):
    options = recipe.categories
    if isinstance(options, HeadNouns):
        return head_nouns
    return ChatExtractor(_chat(recipe, options, "text-generation"), options.prompt)


def _verify_stage(recipe: EngineRecipe) -> Stage:
    options = recipe.verifier
    if isinstance(options, ModelVerification):
        return VerifyRegions(ModelVerifier(options))
    if isinstance(options, WordVerification):
        return VerifyCategories(WordVerifier(options.synonyms))
    chat = _chat(recipe, options, "text-generation")
    return VerifyCategories(ChatVerifier(chat, options.prompt))


def _chat(recipe: EngineRecipe, options, task: str) -> ChatModel | TransformersChat:
    if not isinstance(options, EndpointOptions):
        return TransformersChat(options, task)
    cache = options.cache or str(Path(recipe.output.folder, ANSWERS))
    return ChatModel(dataclasses.replace(options, cache=cache))
