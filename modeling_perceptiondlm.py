"""The network: encode tiles, prompt regions, replay them, attend, predict, and the diffusion loss.

Axis letters: B batch, L sequence, Q K queries and keys, T tiles, P patches of a tile, R region
prompts, K regions of the batch, C vision width, D text width, h w rows and columns of cells, V
vocabulary.
"""

import os
from dataclasses import dataclass
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_perceptiondlm import (
    ROLE_CAPTION,
    ROLE_ROI,
    ROLE_SHARED,
    SHARED_REGION,
    PerceptionDLMConfig,
    expect_shards_inside,
)
from .generation_diffusion import DiffusionGenerationMixin
from .generation_generate import default_generation_config
from .generation_options import expect_neutral
from .modeling_attention import Structure
from .modeling_language import (
    PerceptionDLMLanguageModel,
    PerceptionDLMPreTrainedModel,
    for_decoder_layers,
    keep_unpacked,
    placeable,
    quantizable,
)
from .modeling_loss import draw_masked, expect_masked, mask_rate, masked_loss
from .modeling_vision import (
    IMAGE_TOKENS,
    PerceptionDLMConnector,
    PerceptionDLMVisionModel,
    RegionPrompts,
    merge_patches,
    patch_prompts,
    replay_regions,
    tile_counts,
)

# What `forward` may be given of arguments that mean nothing to it, beside None.
FORWARD_NEUTRAL = {
    "inputs_embeds": (),
    "past_key_values": (),
    "use_cache": (False,),
    "output_attentions": (False,),
}


@dataclass
class PerceptionDLMOutput(ModelOutput):
    """Holds the result of a forward pass.

    Attributes:
        loss: scalar, with labels.
        logits: (B, L, V), or the positions of `logits_to_keep`; None with labels, where only
            masked positions reach the head.
        hidden_states: embeddings and every layer's output (B, L, D), on request.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None

    @property
    def last_hidden_state(self):
        """Raises AttributeError: TRL's SFTTrainer reads it for a loss over next tokens."""
        raise AttributeError(
            "expected a trainer that takes the loss of `forward`, got one that asks for"
            " last_hidden_state; with TRL use perceptiondlm.training.sft.DiffusionSFTTrainer"
        )


class PerceptionDLMForConditionalGeneration(DiffusionGenerationMixin, PerceptionDLMPreTrainedModel):
    """Captions image regions, or answers about images, by masked diffusion (arXiv:2606.19534)."""

    _tied_weights_keys = {
        "language_model.lm_head.weight": "language_model.model.embed_tokens.weight"
    }
    vision_tower: PerceptionDLMVisionModel
    connector: PerceptionDLMConnector
    region_prompts: nn.Module | None
    image_newline: nn.Parameter | None
    language_model: PerceptionDLMLanguageModel
    accepts_loss_kwargs = False  # trainers average losses over accumulated batches themselves

    def __init__(self, config: PerceptionDLMConfig):
        super().__init__(config)
        # Vision.
        self.vision_tower = PerceptionDLMVisionModel(config.vision_config)
        self.connector = PerceptionDLMConnector(config)
        self.region_prompts = None
        if config.num_region_prompts:
            width = config.vision_config.hidden_size
            self.region_prompts = RegionPrompts(config.num_region_prompts, width)
        self.image_newline = None
        if config.image_layout == "anyres":
            self.image_newline = nn.Parameter(torch.empty(config.text_config.hidden_size))
        # Language.
        self.language_model = PerceptionDLMLanguageModel(config.text_config)
        self.generation_config = default_generation_config(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, RegionPrompts):
            init.normal_(module.weight, std=1.0)
        elif module is self and self.image_newline is not None:
            init.normal_(self.image_newline, std=self.config.initializer_range)

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value):
        self.language_model.set_output_embeddings(value)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Loads as in transformers, but refuses weights that do not fit the config.

        A `quantization_config` quantizes the linear layers of the decoder alone.

        The model remembers where its processor is: the folder's absolute path, or the Hub id at
        the revision that the weights are of. Raises ValueError for tensors that are damaged or
        unknown; of another shape, unless `ignore_mismatched_sizes`; or missing, unless another
        `config` than the checkpoint's is given, by which the model may have more than was saved:
        transformers draws it at random and says so.
        """
        # What transformers is asked for, remembered for the processor beside the weights.
        names = ("subfolder", "revision", "token", "cache_dir", "local_files_only")
        options = {k: kwargs[k] for k in names if kwargs.get(k) is not None}
        wants_info = kwargs.pop("output_loading_info", False)
        may_mismatch = kwargs.pop("ignore_mismatched_sizes", False)
        if pretrained_model_name_or_path is not None:
            expect_shards_inside(
                os.path.join(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
            )
        device_map = kwargs.get("device_map")
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = for_decoder_layers(kwargs["quantization_config"])
            kwargs["device_map"] = device_map = quantizable(device_map)
        if isinstance(device_map, dict) and "disk" in device_map.values():
            config = kwargs.get("config") or pretrained_model_name_or_path
            if not hasattr(config, "to_dict"):
                config = PerceptionDLMConfig.from_pretrained(config, **options)
            kwargs["device_map"] = placeable(device_map, config.tie_word_embeddings)

        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path,
                *args,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # or transformers ends with a RuntimeError
                **kwargs,
            )
        except (SafetensorError, UnpicklingError, EOFError) as error:
            raise ValueError(
                f"expected readable weights in {pretrained_model_name_or_path}, got: {error}"
            ) from error

        # What transformers only warns of is refused.
        if not model._hf_peft_config_loaded:  # else `info` is the adapter's
            accepted = {"mismatched_keys"} if may_mismatch else set()
            if not _is_own_config(kwargs.get("config"), pretrained_model_name_or_path, options):
                accepted.add("missing_keys")
            _expect_all_weights(pretrained_model_name_or_path, info, accepted)

        keep_unpacked(model)

        # Where the processor will be looked for.
        if pretrained_model_name_or_path is not None:
            place = os.fspath(pretrained_model_name_or_path)
            commit = getattr(model.config, "_commit_hash", None)
            if os.path.isdir(place):
                place = os.path.abspath(place)
            elif commit is not None:
                options["revision"] = commit
            model._source = (place, options)
        return (model, info) if wants_info else model

    def encode_images(self, pixel_values, region_patches=None) -> torch.Tensor:
        """Returns visual features (T, cells, D) of tiles (T, 3, S, S).

        `region_patches` bool (T, R, h, w) says which patches each region prompt is added to.
        """
        prompts = None
        if region_patches is not None:
            if self.region_prompts is None:
                raise ValueError("expected a model with region prompts for masks, got one without")
            prompts = patch_prompts(self.region_prompts, region_patches)  # (T, P, C)
        features = self.vision_tower(pixel_values, prompts)
        return self.connector(merge_patches(features, self.config.spatial_merge_size))

    def _waits_for_others(self) -> bool:
        """Tells whether other processes wait for this one's gradients or its share of weights."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return False
        from torch.distributed.tensor import DTensor

        parameters = self.vision_tower.parameters()
        return self.training or any(isinstance(p, DTensor) for p in parameters)

    def _unseen_image(self) -> torch.Tensor:
        """Returns 0, computed through the whole vision path.

        Under DDP and FSDP every rank must run the same modules, so a batch without images adds
        this to its embeddings.
        """
        size = self.config.vision_config.image_size
        blank = torch.zeros(1, 3, size, size, device=self.device)
        patches = None
        if self.region_prompts is not None:
            side = self.config.grid_side
            shape = (1, self.config.num_region_prompts, side, side)
            patches = torch.zeros(shape, dtype=torch.bool, device=self.device)
        unseen = 0 * self.encode_images(blank, patches).sum()
        return unseen if self.image_newline is None else unseen + 0 * self.image_newline.sum()

    def image_tokens(self, features, image_grids, image_sizes) -> torch.Tensor:
        """Returns the visual tokens (tokens, D) of all images.

        `features` (T, cells, D) are those of their tiles; `image_grids` and `image_sizes` are
        lists of pairs.
        """
        layout = self.config.image_layout
        tiles = features.split(tile_counts(features, image_grids, layout))
        newline = None if self.image_newline is None else self.image_newline.to(features.device)
        tokens = [
            IMAGE_TOKENS[layout](own, grid, size, newline, self.config)
            for own, grid, size in zip(tiles, image_grids, image_sizes, strict=True)
        ]
        return torch.cat(tokens)

    def embed_inputs(self, input_ids, role_ids, **images) -> torch.Tensor:
        """Returns token embeddings (B, L, D) with visual and RoI tokens spliced in.

        `images` are `pixel_values` ... `region_features` of `forward`.
        """
        # By way of forward: the newline is this module's own, and at hand only while it runs.
        return self(input_ids, role_ids=role_ids, **images, stop_at="embeds")

    def see_features(self, **images) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Encodes images, for any number of prompts about them.

        `images` are `pixel_values` ... `box_images` of `forward`. Returns `image_features` and
        `region_features` (None without boxes), which `forward` takes in their place.
        """
        return self(**images, stop_at="features")

    def _features(
        self, pixel_values, image_grids, image_sizes, region_patches, boxes, box_images
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns what `see_features` describes."""
        grids = [tuple(grid) for grid in image_grids.tolist()]
        features = self.encode_images(pixel_values, region_patches)
        tokens = self.image_tokens(features, grids, image_sizes.tolist())
        if boxes is None or not self.config.roi_output_size:
            return tokens, None
        return tokens, replay_regions(features, grids, boxes, box_images, self.config)

    def _embed(self, input_ids, role_ids, image_features, region_features) -> torch.Tensor:
        """Returns what `embed_inputs` describes, of features that are computed."""
        embeds = self.get_input_embeddings()(input_ids)  # (B, L, D)
        B, L, D = embeds.shape
        fixed = role_ids != ROLE_CAPTION  # what is being denoised may hold any id
        places = fixed & (input_ids == self.config.image_token_id)
        if image_features is None:
            embeds = _splice(embeds, places, embeds.new_zeros(0, D), "image")
            return embeds + self._unseen_image().to(embeds) if self._waits_for_others() else embeds

        # The tokens of the images, at their placeholders.
        embeds = _splice(embeds, places, image_features, "image")

        # The features of each region's box, replayed at the RoI placeholders.
        if region_features is not None:
            roi_ids = torch.tensor(self.config.roi_token_ids, device=input_ids.device)
            places = (role_ids == ROLE_ROI) & torch.isin(input_ids, roi_ids)
            embeds = _splice(embeds, places, region_features.flatten(0, 1), "RoI")
        return embeds

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        region_ids: torch.Tensor | None = None,
        role_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grids: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        region_patches: torch.Tensor | None = None,
        boxes: torch.Tensor | None = None,
        box_images: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        region_features: torch.Tensor | None = None,
        region_orders: torch.Tensor | None = None,
        response_columns: torch.Tensor | None = None,
        response_start: torch.Tensor | None = None,
        task: str | None = None,
        labels: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        loss_weighting: str = "inverse_rate",
        logits_to_keep: int | torch.Tensor = 0,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        stop_at: str | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values=None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
    ) -> PerceptionDLMOutput | tuple | torch.Tensor:
        """Predicts every position, or, with labels, computes the diffusion loss.

        Args:
            input_ids ... box_images: what the processor makes; positions default to 0, 1, 2, ...
                over what is not padding, structure to none.
            image_features: float (tokens, D), of all images' tokens; region_features: float (K,
                roi_output_size^2, D). What `see_features` made of images, instead of
                `pixel_values` and what comes with them.
            region_orders ... task: not used here; generation reads them.
            labels: int (B, L), -100 where there is nothing to learn. Labelled positions are
                masked with probability p = (1 - eps) t + eps.
            timesteps: t in [0, 1], float (B,); noise: uniform draws, float (B, L), a position is
                masked where noise < p. Both are drawn when not given.
            loss_weighting: "inverse_rate" (LLaDA: cross-entropy / p, over the label count) or
                "none" (mean cross-entropy of a sample's masked positions).
            logits_to_keep: without labels, the last so many positions (0: all), or their indices.
            stop_at: "features" returns what `see_features` describes, "embeds" what
                `embed_inputs` does, before anything attends; "masked_logits", with labels, the
                logits (n, V) of the n masked positions, row by row, of which a caller makes a
                loss of its own.
            inputs_embeds ... output_attentions: as trainers and adapters pass them, None or False.
        """
        expect_neutral(
            {
                "inputs_embeds": inputs_embeds,
                "past_key_values": past_key_values,
                "use_cache": use_cache,
                "output_attentions": output_attentions,
            },
            FORWARD_NEUTRAL,
        )
        # Encode the images, but for those whose features are given.
        images = (pixel_values, image_grids, image_sizes, region_patches, boxes, box_images)
        if pixel_values is not None and len(pixel_values):
            if image_features is not None:
                raise ValueError("expected pixel_values or image_features, got both")
            image_features, region_features = self._features(*images)
        if stop_at == "features":
            return image_features, region_features

        if input_ids is None:
            raise ValueError("expected input_ids, got none")
        attention_mask, position_ids, region_ids, role_ids = _with_defaults(
            input_ids, attention_mask, position_ids, region_ids, role_ids
        )

        if stop_at == "masked_logits" and labels is None:
            raise ValueError('expected labels with stop_at="masked_logits", got none')

        # Mask what is to be learned.
        if labels is not None:
            rate = mask_rate(timesteps, labels)
            masked = draw_masked(labels, rate, noise)
            input_ids = input_ids.masked_fill(masked, self.config.mask_token_id)
        elif timesteps is not None or noise is not None:
            raise ValueError("expected timesteps and noise only with labels, got no labels")
        elif self.training and torch.is_grad_enabled():
            expect_masked(input_ids, role_ids == ROLE_CAPTION, self.config.mask_token_id)

        # Embed.
        embeds = self._embed(input_ids, role_ids, image_features, region_features)
        if stop_at == "embeds":
            return embeds

        # Attend.
        structure = Structure(self.config.region_layout, region_ids, role_ids, attention_mask)
        wants_states = self._wants(output_hidden_states, "output_hidden_states")
        states: list | None = [] if wants_states else None
        hidden = self.attend(embeds, position_ids, structure, states)

        # Predict: the loss of the masked positions, or logits.
        loss = logits = None
        if labels is not None:
            own = self._masked_logits(hidden, masked)
            if stop_at == "masked_logits":
                return own
            labels, masked, rate = (x.to(own.device) for x in (labels, masked, rate))
            loss = masked_loss(own, labels, masked, rate, loss_weighting)
        else:
            logits = self._kept_logits(hidden, logits_to_keep)
        output = PerceptionDLMOutput(loss, logits, tuple(states) if states is not None else None)
        return output if self._wants(return_dict, "return_dict") else output.to_tuple()

    def attend(
        self, embeds, position_ids, structure: Structure, hidden_states: list | None = None
    ) -> torch.Tensor:
        """Runs embedded sequences (B, L, D) through the decoder as a structure says.

        `hidden_states` is a list to which the embeddings and each layer's output are appended.
        Returns normalized states (B, L, D), of which `language_model.lm_head` makes logits.
        """
        implementation = self.language_model.config._attn_implementation
        return self.language_model.model(
            embeds,
            position_ids,
            structure.argument(implementation, embeds.dtype),
            hidden_states=hidden_states,
        )

    def _masked_logits(self, hidden, masked) -> torch.Tensor:
        """Computes logits (n, V) of the n masked positions.

        Where there are none the head runs on a position that is then dropped: under DDP and FSDP
        every rank must run the same modules, and none is called with nothing.
        """
        if not bool(masked.any()):
            return self.language_model.lm_head(hidden[:1, 0])[:0]
        return self.language_model.lm_head(hidden[masked.to(hidden.device)])

    def _kept_logits(self, hidden, kept: int | torch.Tensor) -> torch.Tensor:
        """Computes logits (B, kept, V) of the last so many positions, or of some indices."""
        last = isinstance(kept, int)
        hidden = hidden[:, slice(-kept, None) if last else kept]
        if not hidden.shape[1]:
            raise ValueError(f"expected at least one position in logits_to_keep, got {kept}")
        return self.language_model.lm_head(hidden)

    def _wants(self, flag: bool | None, name: str) -> bool:
        """Returns a flag of the call or, where it is None, the config's."""
        if not isinstance(flag, (bool, type(None))):
            raise ValueError(f"expected {name} True or False, got {flag!r}")
        return flag if flag is not None else bool(getattr(self.config, name))


# What a config says of its file and of how it is run, not of which weights there are.
RUN_SETTINGS = {"architectures", "auto_map", "dtype", "transformers_version", "_name_or_path"}


def _is_own_config(given, place, options: dict) -> bool:
    """Tells whether a model was built from the config that is saved beside the weights."""
    if place is None:
        return False
    if not hasattr(given, "to_dict"):  # None or a path
        return given is None
    saved = PerceptionDLMConfig.from_pretrained(place, **options)
    return _without(saved.to_dict(), RUN_SETTINGS) == _without(given.to_dict(), RUN_SETTINGS)


def _without(values: dict, names: set[str]) -> dict:
    return {
        k: _without(v, names) if isinstance(v, dict) else v
        for k, v in values.items()
        if k not in names
    }


def _expect_all_weights(place, info: dict, accepted: set[str]):
    """Refuses what transformers only warns of, but for the kinds of keys that are accepted."""
    # All that is wrong is named at once.
    found = {
        "missing": sorted(info["missing_keys"] if "missing_keys" not in accepted else ()),
        "unknown": sorted(info["unexpected_keys"]),
        "of another shape": [
            f"{name} {tuple(got)} instead of {tuple(expected)}"
            for name, got, expected in sorted(info["mismatched_keys"])
            if "mismatched_keys" not in accepted
        ],
    }
    problems = [
        f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in found.items()
        if names
    ]
    if problems:
        raise ValueError(
            f"expected weights in {place} that fit the config, got {'; '.join(problems)}"
        )


def _with_defaults(input_ids, attention_mask, position_ids, region_ids, role_ids):
    """Fills in, of the four tensors (B, L) beside `input_ids`, those that are None.

    They are made as for plain, unpadded text.
    """
    if not input_ids.numel():
        shape = tuple(input_ids.shape)
        raise ValueError(f"expected input_ids (B, L) of at least one position, got shape {shape}")

    # Nothing is padding, positions count up, and nobody is kept from seeing anybody.
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if position_ids is None:
        position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    if region_ids is None:
        region_ids = torch.full_like(input_ids, SHARED_REGION)
    if role_ids is None:
        role_ids = torch.full_like(input_ids, ROLE_SHARED)

    # What was given has to have the shape of the ids.
    named = {"attention_mask": attention_mask, "position_ids": position_ids}
    for name, tensor in {**named, "region_ids": region_ids, "role_ids": role_ids}.items():
        if tensor.shape != input_ids.shape:
            raise ValueError(
                f"expected {name} of the shape of input_ids {tuple(input_ids.shape)},"
                f" got {tuple(tensor.shape)}"
            )
    return attention_mask, position_ids, region_ids, role_ids


def _splice(embeds, places, tokens, name: str) -> torch.Tensor:
    """Puts tokens (n, D) where `places`, bool (B, L), says, in row-major order."""
    # A mismatch is never truncated or repeated: the inputs were made by another processor.
    expected = int(places.sum())
    if expected != len(tokens):
        raise ValueError(
            f"expected {len(tokens)} {name} placeholders in input_ids, one for each {name} token,"
            f" got {expected}"
        )
    return embeds.masked_scatter(places[..., None].to(embeds.device), tokens.to(embeds))


PerceptionDLMForConditionalGeneration.register_for_auto_class("AutoModel")

__all__ = ["PerceptionDLMForConditionalGeneration", "PerceptionDLMPreTrainedModel"]
