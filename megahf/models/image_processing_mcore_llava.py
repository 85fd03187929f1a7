"""Images as Megatron's LLaVA sees them: cut into tiles by their shape, resized, and normalised as its encoder wants.

Follows examples/multimodal/image_processing.py of Megatron-LM, whose tiles are InternVL's, with Pillow's own resampling
and not another library's, so pixels are the same to the bit.
"""

from __future__ import annotations

from typing import Any, ClassVar

from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_transforms import to_pil_image
from transformers.image_utils import infer_channel_dimension_format, to_numpy_array
from transformers.processing_utils import ImagesKwargs
from transformers.utils import requires_backends

from .vision_kinds import CLIP

DEEP = ("I", "F")  # modes of Pillow's with more than eight bits a channel start like this: RGB would clip them
FIXED = {"do_convert_rgb": True, "do_center_crop": False, "do_pad": False}


class McoreLlavaImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """What a call, or the processor, may be told beside what every image processor is."""

    use_tiling: bool | None
    max_num_tiles: int | None
    use_thumbnail: bool | None
    use_area_weighted_aspect_ratio: bool | None


class McoreLlavaImageProcessor(PilBackend):
    """Images of any size to `pixel_values` `[tiles of all images, 3, h, w]` and `num_tiles` `[images]`.

    Images may be of Pillow, arrays, tensors, addresses; one, several, or lists of them. Any of these settings may be
    another for one call.

    Args:
        size: `height` and `width` of a tile, in pixels.
        image_mean, image_std: of red, green and blue, where 1 is white (`vision_kinds.STATISTICS`).
        use_tiling: cut an image into up to `max_num_tiles` squares, laid out as its shape asks.
        use_thumbnail: and add the whole image as the last one, where there are several.
        use_area_weighted_aspect_ratio: choose the layout by its number of pixels, too.

    Raises:
        ImportError: Pillow is not installed.
        ValueError: an image without pixels, or of a kind that eight bits a channel do not hold; a setting of
            transformers' that this processor does not have.
    """

    valid_kwargs = McoreLlavaImageProcessorKwargs
    model_input_names: ClassVar[list[str]] = ["pixel_values", "num_tiles"]
    do_convert_rgb = do_resize = do_rescale = do_normalize = True
    resample = 3  # Image.BICUBIC, whose filter widens where it shrinks
    size: ClassVar[dict[str, int]] = {"height": 336, "width": 336}
    image_mean, image_std = CLIP
    use_tiling = use_thumbnail = use_area_weighted_aspect_ratio = False
    max_num_tiles = 1

    def __init__(self, **settings: Any) -> None:
        requires_backends(self, ["vision"])  # else a processor says that it is no image processor
        super().__init__(**settings)

    def process_image(self, image: Any, input_data_format: Any = None, **asked: Any) -> Any:
        """An image of Pillow's in red, green and blue; what is transparent is as if it were not."""
        if not hasattr(image, "convert"):
            if 0 in image.shape:
                raise ValueError(f"an image has the shape {tuple(image.shape)}: it must have at least one pixel")
            array = to_numpy_array(image)
            order = input_data_format or infer_channel_dimension_format(array, num_channels=(1, 3, 4))
            image = to_pil_image(array, input_data_format=order)
        if image.mode.startswith(DEEP):
            raise ValueError(
                f"an image has the mode {image.mode!r}, more than eight bits a channel: scale it to 0..255 and convert "
                f"it to 'L' or 'RGB' first"
            )
        if 0 in image.size:
            raise ValueError(f"an image has {image.size[0]} x {image.size[1]} pixels: it must have at least one")
        return image.convert("RGB")

    def _preprocess(self, images: list[Any], return_tensors: Any = None, **asked: Any) -> BatchFeature:
        """The tiles of images of Pillow's; `asked` has every setting."""
        if other := {name: asked[name] for name, value in FIXED.items() if bool(asked[name]) is not value}:
            raise ValueError(f"{other}: images here are in red, green and blue, and neither cropped nor padded")
        tiles = [self.tiles(image, **asked) for image in images]
        pixels = [self.normalised(tile, **asked) for cut in tiles for tile in cut]
        data = {"pixel_values": pixels, "num_tiles": [len(cut) for cut in tiles]}
        return BatchFeature(data, tensor_type=return_tensors)

    def tiles(self, image: Any, **asked: Any) -> list[Any]:
        """The image as one tile, or row by row as the grid of tiles whose shape is nearest to its own."""
        width, height = asked["size"]["width"], asked["size"]["height"]
        if not asked["use_tiling"]:
            return [resized(image, width, height, **asked)]
        if width != height:
            raise ValueError(f"tiles are squares, but size is {width} x {height}: use_tiling must be false with it")
        columns, rows = layout(*image.size, **asked)
        whole = resized(image, columns * width, rows * width, **asked)
        corners = [(column * width, row * width) for row in range(rows) for column in range(columns)]
        cut = [whole.crop((left, top, left + width, top + width)) for left, top in corners]
        return [*cut, resized(image, width, width, **asked)] if asked["use_thumbnail"] and len(cut) > 1 else cut

    def normalised(self, tile: Any, **asked: Any) -> Any:
        """An array `[3, h, w]` of float32, about 0 and 1 wide over many images."""
        pixels = to_numpy_array(tile).transpose(2, 0, 1)  # [3, h, w]
        if asked["do_rescale"]:
            pixels = self.rescale(pixels, asked["rescale_factor"])
        return self.normalize(pixels, asked["image_mean"], asked["image_std"]) if asked["do_normalize"] else pixels

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict[str, Any] | None = None) -> int:
        """Tiles of an image of so many pixels, the thumbnail included."""
        asked = {name: getattr(self, name) for name in McoreLlavaImageProcessorKwargs.__annotations__}
        asked |= {name: value for name, value in (images_kwargs or {}).items() if value is not None}
        if not asked["use_tiling"]:
            return 1
        columns, rows = layout(width, height, **asked)
        return columns * rows + (columns * rows > 1 and asked["use_thumbnail"])


def resized(image: Any, width: int, height: int, *, do_resize: bool, resample: int, **asked: Any) -> Any:
    """With Pillow's own filter.

    Raises:
        ValueError: the image has another size and is to keep it.
    """
    if image.size == (width, height):
        return image
    if not do_resize:
        sizes = f"{image.size[0]} x {image.size[1]} pixels, not {width} x {height}"
        raise ValueError(f"an image has {sizes}, and do_resize is False")
    return image.resize((width, height), resample=resample)


def layout(
    width: int, height: int, *, max_num_tiles: int, size: Any, use_area_weighted_aspect_ratio: bool, **asked: Any
) -> tuple[int, int]:
    """Columns and rows of tiles for an image of so many pixels."""
    rule = widest_grid if use_area_weighted_aspect_ratio else grid
    return rule(width, height, max_num_tiles, size["width"])


def grids(most: int) -> list[tuple[int, int]]:
    """Columns and rows of every layout of at most `most` tiles, those of few tiles first.

    Among those of as many tiles the order is a set's, as Megatron has it: pairs of numbers are always in the same.
    """
    pairs = {(i, j) for n in range(1, most + 1) for i in range(1, n + 1) for j in range(1, n + 1) if i * j <= most}
    return sorted(pairs, key=lambda pair: pair[0] * pair[1])


def grid(width: int, height: int, most: int, side: int) -> tuple[int, int]:
    """Columns and rows, of at most `most` tiles of `side` pixels, whose shape is nearest to the image's.

    Of equally near ones the later, if the image has more than half as many pixels as it.
    """
    best, nearest = (1, 1), float("inf")
    for columns, rows in grids(most):
        off = abs(width / height - columns / rows)
        if off < nearest or (off == nearest and width * height > 0.5 * side * side * columns * rows):
            best, nearest = (columns, rows), off
    return best


def widest_grid(width: int, height: int, most: int, side: int) -> tuple[int, int]:
    """As `grid`, where a layout counts by its shape times its pixels, up to 0.6 of the image's."""
    aspect, best, highest = width / height, (1, 1), float("-inf")
    for columns, rows in grids(most):
        shape = columns / rows
        share = min(columns * rows * side * side / (width * height), 0.6)
        if (score := share * min(shape / aspect, aspect / shape)) > highest:
            best, highest = (columns, rows), score
    return best


McoreLlavaImageProcessor.register_for_auto_class("AutoImageProcessor")
