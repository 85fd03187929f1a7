"""Megatron-core's LLaVA: an image encoder and a projection, whose vectors stand among the words of a GPT or a hybrid.

Source: megatron/core/models/multimodal/llava_model.py. Where Megatron takes one image token for all tiles of an image,
`input_ids` here hold one for each place that they take, as everywhere in transformers.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
    MoeCausalLMOutputWithPast,
)
from transformers.utils import can_return_tuple

from .configuration_mcore_llava import McoreLlavaConfig
from .context_images import number_images, reasons_of_encoder, sizes_of_images, targets_of_words
from .context_parallel import IGNORED, ContextParallel, active, not_in_torchs
from .layout import is_empty
from .modeling_mcore import EXPERTS, NORMS, McorePreTrainedModel, register_names
from .modeling_mcore_gpt import McoreGPTForCausalLM, McoreGPTModel
from .modeling_mcore_hybrid import McoreHybridForCausalLM, McoreHybridModel
from .projection import MultimodalProjector
from .vision import CLIPViTModel
from .vision_radio import RADIOViTModel

ENCODERS = {"clip": CLIPViTModel, "radio": RADIOViTModel}
LANGUAGE_MODELS = {"mcore_gpt": McoreGPTModel, "mcore_hybrid": McoreHybridModel}
CAUSAL_MODELS: dict[str, type[McoreGPTForCausalLM]] = {
    "mcore_gpt": McoreGPTForCausalLM,
    "mcore_hybrid": McoreHybridForCausalLM,
}
PARTS = ("vision_model", "vision_projection", "language_model")
PREFIXES = (
    (r"^language_model\.output_layer\.", r"^output_layer\."),
    *((f"^{part}\\.", f"^model\\.{part}\\.") for part in PARTS),
)


class McoreLlavaPreTrainedModel(McorePreTrainedModel):
    """What the LLaVA classes share."""

    config_class = McoreLlavaConfig
    input_modalities = ("image", "text")
    auto_map: ClassVar[dict[str, str]] = {
        "AutoConfig": "configuration_mcore_llava.McoreLlavaConfig",
        "AutoModel": "modeling_mcore_llava.McoreLlavaModel",
        "AutoModelForImageTextToText": "modeling_mcore_llava.McoreLlavaForConditionalGeneration",
    }
    _no_split_modules: ClassVar[list[str]] = [*McoreHybridModel._no_split_modules, "ScaledLayer"]
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"^language_model\.output_layer\."]  # by the base model
    _supports_context_parallel = False
    config: McoreLlavaConfig

    @property
    def _is_stateful(self) -> bool:
        """As the language model's: whether a token once taken in cannot be taken back."""
        return "M" in getattr(self.config.text_config, "hybrid_layer_pattern", "")

    def get_input_embeddings(self) -> nn.Module:
        return self.base_model.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base_model.language_model.set_input_embeddings(value)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As all models', with each part's dtype in its configuration: loading puts it there, and saves the same."""
        for part in (self.config.text_config, self.config.vision_config):
            part.dtype = self.dtype
        super().save_pretrained(*args, **kwargs)


class McoreLlavaModel(McoreLlavaPreTrainedModel):
    """Tokens and images to hidden states."""

    mtp = None  # heads that predict further tokens, which the language model cannot have here

    def __init__(self, config: McoreLlavaConfig) -> None:
        super().__init__(config)
        self.vision_model = ENCODERS[config.vision_config.kind.tower](config.vision_config)
        self.vision_projection = MultimodalProjector(config)
        self.language_model = LANGUAGE_MODELS[config.text_config.model_type](config.text_config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        num_tiles: Tensor | list[int] | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states `[b, s, h]` of tokens `[b, s]`, with images where there are image tokens, in their order.

        Args:
            attention_mask, position_ids: of all places, as a GPT's.
            inputs_embeds: vectors `[b, s, h]` in the place of `input_ids`.
            pixel_values: tiles of all images in the batch, `[t, 3, img_h, img_w]`; None: there are no images. Under
                context parallelism too, where `input_ids` are a rank's.
            num_tiles: `[images]`, how many of the tiles are each image's; needed where tiles have tags.

        Raises:
            ValueError: image tokens and images do not fit.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds is needed")
        words = cast(Tensor, inputs_embeds) if input_ids is None else self.embed_words(input_ids)  # [b, s, h]
        if (context := active()) is not None:
            given = {**kwargs, "attention_mask": attention_mask, "past_key_values": past_key_values}
            sizes = sizes_of_images(input_ids, pixel_values, num_tiles)
            problems = reasons_of_encoder(self.vision_model)
            context.enter(self.language_model, words, position_ids, given, problems, **sizes)
        else:
            not_in_torchs(self)
        if pixel_values is not None:
            places = self.image_places(input_ids, inputs_embeds)
            own = self.check_places(places, len(pixel_values))
            features = self.get_image_features(pixel_values, num_tiles, return_dict=True).pooler_output.flatten(0, 1)
            features = features if own is None else features[own.to(features.device)]
            places = places[..., None].to(words.device)
            words = words.masked_scatter(places, features.to(words.device, words.dtype))
        elif input_ids is not None and is_empty(past_key_values):
            self.check_places(self.image_places(input_ids), 0)
        return self.language_model(None, attention_mask, position_ids, past_key_values, words, **kwargs)

    @can_return_tuple
    def get_image_features(
        self, pixel_values: Tensor, num_tiles: Tensor | list[int] | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """What stands in the places of each tile, `pooler_output` `[t, img_seq_len, h]`, and the encoder's own output.

        Args:
            pixel_values: tiles `[t, 3, img_h, img_w]`.
            num_tiles: `[images]`, how many tiles each image has; needed where tiles have tags.
        """
        encoded = self.vision_model(pixel_values, **{**kwargs, "return_dict": True})
        features = self.vision_projection(encoded.last_hidden_state)  # [t, places, h]
        if num_tiles is not None or self.config.tile_tags is not None:
            features = self.tag(features, num_tiles)
        return BaseModelOutputWithPooling(
            last_hidden_state=encoded.last_hidden_state,
            pooler_output=features,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )

    def tag(self, features: Tensor, num_tiles: Tensor | list[int] | None) -> Tensor:
        """`[t, places, h]` with the vectors of a tag before each tile: its number's, the thumbnail's before the last.

        Raises:
            ValueError: numbers of tiles that are not known, or not those of the images.
        """
        tags, tiles = self.config.tile_tags, len(features)
        if num_tiles is None:
            raise ValueError(f"tiles have tags here, by their place in an image: num_tiles is needed for {tiles} tiles")
        counts = num_tiles.tolist() if isinstance(num_tiles, Tensor) else list(num_tiles)
        most = tiles if tags is None else len(tags)
        if sum(counts) != tiles or any(not 1 <= count <= most for count in counts):
            raise ValueError(
                f"num_tiles {counts} must be from 1 to {most} an image, and add up to the {tiles} tiles of pixel_values"
            )
        if tags is None:
            return features
        ids = [tag for count in counts for tag in (*tags[: count - 1], tags[-1])]
        vectors = self.get_input_embeddings()(torch.tensor(ids, device=features.device))  # [t, tag, h]
        return torch.cat((vectors.to(features.dtype), features), dim=1)

    def embed_words(self, input_ids: Tensor) -> Tensor:
        """Vectors `[b, s, h]`; token 0's stand in the places of images, as in Megatron."""
        return self.get_input_embeddings()(input_ids.masked_fill(self.image_places(input_ids), 0))

    def image_places(self, input_ids: Tensor | None, inputs_embeds: Tensor | None = None) -> Tensor:
        """Where image tokens are, `[b, s]`; found by their vector if there are vectors alone."""
        token = self.config.image_token_id
        if input_ids is not None:
            return input_ids == token
        if token < 0:
            raise ValueError(
                f"image_token_id {token} is no word and has no vector to be found by: images need input_ids, not "
                f"inputs_embeds"
            )
        words = self.get_input_embeddings()
        vector = words(torch.tensor(token, device=cast(Tensor, words.weight).device))
        return (inputs_embeds == vector).all(dim=-1)

    def check_places(self, places: Tensor, tiles: int) -> Tensor | None:
        """As many image tokens `[b, s]` as places that tiles take; a compiled graph cannot look.

        Returns:
            of a rank of context parallelism, which of all tiles' vectors are for its own places, `[own]`; else None.
        """
        if torch.compiler.is_compiling():
            return None
        context, each = active(), self.config.img_seq_len
        own, found = (None, int(places.sum())) if context is None else number_images(context, places)
        if found != tiles * each:
            raise ValueError(
                f"there are {found} image tokens ({self.config.image_token_id}), but {tiles} tiles in pixel_values, "
                f"which take {tiles} x {each} = {tiles * each} places: an image's tokens must be {each} for each of "
                f"its tiles, as the processor makes them"
            )
        return own


class McoreLlavaForConditionalGeneration(McoreLlavaPreTrainedModel, McoreGPTForCausalLM):
    """Tokens and images to logits of the next token: a causal model whose body takes images too."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {
        "output_layer.weight": "model.language_model.embedding.word_embeddings.weight"
    }
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = []

    def build_body(self, heads: bool = False) -> Any:
        return McoreLlavaModel(self.config)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        num_tiles: Tensor | list[int] | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | MoeCausalLMOutputWithPast:
        """As a GPT's, with the images of `McoreLlavaModel.forward`.

        As in Megatron's loss, the places of images predict nothing and are not predicted, whatever `labels` `[b, s]`
        say there: so the first word after an image does not count either.
        """
        if labels is not None and input_ids is not None and active() is None:
            images = input_ids == self.config.image_token_id
            labels = labels.masked_fill(images | F.pad(images, (1, 0))[:, :-1], IGNORED)
            if (shifted := kwargs.get("shift_labels")) is not None:
                kwargs["shift_labels"] = shifted.masked_fill(images | F.pad(images, (0, 1))[:, 1:], IGNORED)
        return super().forward(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            pixel_values=pixel_values,
            num_tiles=num_tiles,
            **kwargs,
        )

    def context_targets(
        self, context: ContextParallel, input_ids: Tensor | None, labels: Tensor, call: dict[str, Any]
    ) -> tuple[Tensor | float, dict[str, Any]]:
        """As a GPT's, of the targets that `forward` counts."""
        if input_ids is None:
            return super().context_targets(context, input_ids, labels, call)
        return targets_of_words(context, input_ids == self.config.image_token_id, labels, call)

    def get_image_features(self, pixel_values: Tensor, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
        """As `McoreLlavaModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, *args, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As transformers', with images in the first forward alone if there is a cache to keep them."""
        given = {**kwargs, "inputs_embeds": inputs_embeds, "is_first_iteration": is_first_iteration}
        inputs = super().prepare_inputs_for_generation(input_ids, **given)
        if not is_first_iteration and kwargs.get("use_cache", True):
            inputs.pop("pixel_values", None)
            inputs.pop("num_tiles", None)
        return inputs

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        """As transformers', for beams or several answers; the images of a row stay together, however many it has."""
        pixels, counts = kwargs.pop("pixel_values", None), kwargs.pop("num_tiles", None)
        images: dict[str, Any] = {"pixel_values": pixels, "num_tiles": counts}
        if expand_size > 1 and pixels is not None:
            given = kwargs.get("inputs_embeds")
            places = self.model.image_places(input_ids if given is None else None, given)
            tiles = (places.sum(dim=-1) // self.config.img_seq_len).tolist()  # of each row
            images["pixel_values"] = repeat_groups(pixels, tiles, expand_size)
            if counts is not None:
                counts = torch.as_tensor(counts)
                ends = torch.tensor(tiles).cumsum(0)
                rows = torch.searchsorted(ends, counts.cpu().cumsum(0))  # of each image
                images["num_tiles"] = repeat_groups(counts, rows.bincount(minlength=len(tiles)).tolist(), expand_size)
        expand = super()._expand_inputs_for_generation
        input_ids, kwargs = expand(expand_size, is_encoder_decoder, input_ids, **kwargs)
        return input_ids, kwargs | {name: value for name, value in images.items() if value is not None}

    @staticmethod
    def create_masks_for_generate(
        attention_mask: Tensor | None, past_key_values: Cache | None, **kwargs: Any
    ) -> Tensor | dict[str, Any] | None:
        """As the language model's."""
        text = kwargs.pop("config").get_text_config()
        model = CAUSAL_MODELS[text.model_type]
        return model.create_masks_for_generate(attention_mask, past_key_values, config=text, **kwargs)


def repeat_groups(x: Tensor, sizes: list[int], times: int) -> Tensor:
    """Neighbours `[n, ...]` in groups of `sizes`, each group so many times."""
    return torch.cat([group for group in x.split(sizes) for _ in range(times)])


register_names("mcore_llava", *PREFIXES, *NORMS, *EXPERTS)
register_names("McoreLlavaModel", *NORMS, *EXPERTS)

McoreLlavaModel.register_for_auto_class("AutoModel")
McoreLlavaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
