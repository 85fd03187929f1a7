"""Words and images to what a LLaVA takes: each `<image>` in the text is repeated once for each place it takes there."""

from __future__ import annotations

from typing import Any

from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import MultiModalData, ProcessorMixin

IMAGE_TOKEN = "<image>"


class McoreLlavaProcessor(ProcessorMixin):
    """A tokenizer and an image processor together.

    Called with `text`, an image token in it where an image goes, and `images` in the order of their tokens (one,
    several, or a list of them for each text), it makes `input_ids` and `attention_mask` `[b, s]` and, where there are
    images, `pixel_values` `[tiles, 3, h, w]`. A `ValueError` says that there are more images than image tokens, or
    fewer, or that truncation cut some of their places off.

    Args:
        image_seq_length: places a tile takes (`McoreLlavaConfig.img_seq_len`).
        image_token: what stands for an image in the text; the model's `image_token_id`.
        image_tags: text before and after each image (Megatron's `--image-tag-type`), such as `<img>` and `</img>`.
        use_tile_tags: whether the model is to be told each image's tiles, since it puts a tag in front of each.
    """

    attributes = ["image_processor", "tokenizer"]  # noqa: RUF012

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        image_seq_length: int = 576,
        image_token: str = IMAGE_TOKEN,
        image_tags: list[str] | None = None,
        use_tile_tags: bool = False,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)
        self.image_seq_length = image_seq_length
        self.image_token = image_token
        self.image_tags = image_tags
        self.use_tile_tags = use_tile_tags
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        if self.image_token_id is None or self.image_token_id == tokenizer.unk_token_id:
            raise ValueError(
                f"the tokenizer has no token {image_token!r}: add it as Megatron does, "
                f"tokenizer.add_tokens([{image_token!r}], special_tokens=True)"
            )

    @property
    def unused_input_names(self) -> list[str]:
        """What the image processor says and the model does not ask."""
        return [] if self.use_tile_tags else ["num_tiles"]

    def prepare_inputs_layout(self, images: Any = None, text: Any = None, **kwargs: Any) -> Any:
        """As transformers', with None for lists without an image."""
        images, *rest = super().prepare_inputs_layout(images=images, text=text, **kwargs)
        return None if rows(images) and not sum(rows(images)) else images, *rest

    def validate_inputs(self, images: Any = None, text: Any = None, **kwargs: Any) -> None:
        """As many image tokens as images, and in each row where images come row by row."""
        if text is None:
            raise ValueError(f"there is no text: give one with {self.image_token!r} where an image is to go")
        wanted, given = [each.count(self.image_token) for each in text], rows(images)
        if given != wanted if len(given) > 1 else sum(given) != sum(wanted):
            there, tokens = (", ".join(map(str, counts or [0])) for counts in (given, wanted))
            raise ValueError(
                f"{self.image_token!r} tokens in the prompts should be the same as the number of images, and in each "
                f"prompt where they come in lists: there are {there} images for {tokens} tokens"
            )

    def replace_image_token(self, image_inputs: Any, image_idx: int, **kwargs: Any) -> str:
        """The token repeated for all places of the image's tiles, between its tags."""
        before, after = self.image_tags or ("", "")
        return before + self.image_token * (int(image_inputs["num_tiles"][image_idx]) * self.image_seq_length) + after

    def _get_num_multimodal_tokens(self, image_sizes: list[list[int]] | None = None, **kwargs: Any) -> MultiModalData:
        """Tiles and places of images of these sizes (height, width), for serving engines."""
        if image_sizes is None:
            return MultiModalData()
        count = self.image_processor.get_number_of_image_patches
        tiles = [count(height, width, kwargs) for height, width in image_sizes]
        return MultiModalData(
            num_image_tokens=[number * self.image_seq_length for number in tiles], num_image_patches=tiles
        )


def rows(images: Any) -> list[int]:
    """How many images each text has, or in one number all of them; nothing where there are none."""
    if images is None:
        return []
    if isinstance(images, (list, tuple)) and any(isinstance(row, (list, tuple)) for row in images):
        return [len(row) for row in images]
    return [len(make_flat_list_of_images(images))]


McoreLlavaProcessor.register_for_auto_class("AutoProcessor")
