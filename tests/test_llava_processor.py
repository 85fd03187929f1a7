"""Images and words reach a LLaVA as Megatron's own pipeline would hand them over, or are refused in words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import picture, tokenizer
from PIL import Image
from transformers import AutoProcessor
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # 5.17 has it hidden without torchvision

import megahf
from megahf.models.image_processing_mcore_llava import McoreLlavaImageProcessor, grid, widest_grid
from megahf.models.processing_mcore_llava import McoreLlavaProcessor
from megahf.models.vision_kinds import STATISTICS

SIDE = 28
TEMPLATE = (
    "{% for message in messages %}{{ message.role }} {% for part in message.content %}"
    "{{ '<image>' if part.type == 'image' else part.text }}{% endfor %} {% endfor %}"
)


def image_processor(**options: object) -> McoreLlavaImageProcessor:
    mean, std = STATISTICS["siglip"]
    size = {"height": SIDE, "width": SIDE}
    return McoreLlavaImageProcessor(**{"size": size, "image_mean": mean, "image_std": std, **options})


def processor(**options: object) -> McoreLlavaProcessor:
    tiling = {"use_tiling": True, "max_num_tiles": 4, "use_thumbnail": True}
    return McoreLlavaProcessor(image_processor(**tiling), tokenizer(), **{"image_seq_length": 3, **options})


def closest(aspect: float, most: int, width: int, height: int, side: int) -> tuple[int, int]:
    """What InternVL's data loader, which Megatron copied, answers; written out a second time."""
    ratios = {
        (i, j) for n in range(1, most + 1) for i in range(1, n + 1) for j in range(1, n + 1) if 1 <= i * j <= most
    }
    best, difference = (1, 1), float("inf")
    for ratio in sorted(ratios, key=lambda x: x[0] * x[1]):
        now = abs(aspect - ratio[0] / ratio[1])
        if now < difference:
            difference, best = now, ratio
        elif now == difference and width * height > 0.5 * side * side * ratio[0] * ratio[1]:
            best = ratio
    return best


@pytest.mark.parametrize("kind", STATISTICS)
def test_an_image_is_resized_and_normalised_as_its_encoder_wants(kind: str) -> None:
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in STATISTICS[kind])
    small = picture().resize((SIDE, SIDE), resample=Image.Resampling.BICUBIC)
    expected = (torch.from_numpy(np.array(small)).permute(2, 0, 1).float().div(255) - mean) / std
    made = image_processor(image_mean=STATISTICS[kind][0], image_std=STATISTICS[kind][1])
    got = made(picture(), return_tensors="pt")
    assert got["num_tiles"].tolist() == [1]
    torch.testing.assert_close(got["pixel_values"], expected[None], rtol=0, atol=1e-6)


@pytest.mark.parametrize("most", [1, 4, 6, 12])
def test_tiles_are_laid_out_as_megatrons(most: int) -> None:
    for width, height in [(100, 40), (40, 100), (1000, 400), (625, 1000), (50, 50), (500, 500), (90, 31), (28, 280)]:
        assert grid(width, height, most, SIDE) == closest(width / height, most, width, height, SIDE)


def test_large_images_get_more_tiles_where_their_area_counts() -> None:
    # Worked out with find_closest_area_weighted_aspect_ratio of Megatron's examples/multimodal/image_processing.py.
    for width, height, plain, weighted in [(60, 30, (2, 1), (2, 1)), (400, 410, (2, 2), (2, 3))]:
        assert grid(width, height, 6, SIDE) == plain
        assert widest_grid(width, height, 6, SIDE) == weighted
    assert widest_grid(400, 250, 6, SIDE) == (3, 2)
    for by_area, tiles in [(False, 4), (True, 6)]:
        made = image_processor(use_tiling=True, max_num_tiles=6, use_area_weighted_aspect_ratio=by_area)
        assert made.get_number_of_image_patches(410, 400) == tiles
        assert made(picture(400, 410))["num_tiles"] == [tiles]


def test_tiles_go_row_by_row_and_the_thumbnail_comes_last() -> None:
    made = image_processor(use_tiling=True, max_num_tiles=4, use_thumbnail=True)
    image = picture(2 * SIDE, 2 * SIDE)
    got = made(image, return_tensors="np")["pixel_values"]
    assert len(got) == 5
    whole = np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 255 * 2 - 1
    for number, tile in enumerate(got[:4]):
        row, column = divmod(number, 2)
        part = whole[:, row * SIDE : (row + 1) * SIDE, column * SIDE : (column + 1) * SIDE]
        np.testing.assert_allclose(tile, part, atol=1e-6)
    plain = image_processor()(image, return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(got[4:], plain)
    assert made.get_number_of_image_patches(2 * SIDE, 2 * SIDE) == 5
    assert made.get_number_of_image_patches(SIDE, SIDE) == 1


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK"])
def test_images_of_eight_bits_are_made_rgb(mode: str) -> None:
    image = picture(mode=mode)
    got = image_processor()(image, return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(got, image_processor()(image.convert("RGB"), return_tensors="np")["pixel_values"])


def test_arrays_and_tensors_are_images_too() -> None:
    expected = image_processor()(picture(), return_tensors="np")["pixel_values"]
    array = np.asarray(picture())
    for image in (array, array.transpose(2, 0, 1), torch.from_numpy(array.copy())):
        np.testing.assert_array_equal(image_processor()([image], return_tensors="np")["pixel_values"], expected)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (Image.new("I;16", (5, 5)), r"mode 'I;16', more than eight bits.*scale it"),
        (Image.new("F", (5, 5)), r"mode 'F', more than eight bits"),
        (np.zeros((3, 0, 5), dtype=np.uint8), r"shape \(3, 0, 5\)"),
    ],
)
def test_images_that_eight_bits_do_not_hold_are_refused(image: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        image_processor()([image])


def test_a_call_may_say_other_settings_but_none_that_would_do_nothing() -> None:
    made, image = image_processor(), picture(SIDE, SIDE)
    assert made(image, size=14, return_tensors="pt")["pixel_values"].shape == (1, 3, 14, 14)
    plain = made(image, do_normalize=False, do_rescale=False, return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(plain, np.asarray(image).transpose(2, 0, 1))
    with pytest.raises(ValueError, match=r"'do_pad': True.*neither cropped nor padded"):
        made(image, do_pad=True)
    with pytest.raises(ValueError, match=r"50 x 40 pixels, not 28 x 28, and do_resize is False"):
        made(picture(), do_resize=False)
    with pytest.raises(TypeError, match="banana"):
        made(image, banana=True)


def test_lists_without_an_image_are_no_images() -> None:
    got = processor()(images=[[], []], text=["what is this ?", "what is this ?"])
    assert set(got) == {"input_ids", "attention_mask"}


def test_places_of_images_are_marked_for_whom_asks() -> None:
    got = processor()(images=picture(SIDE, SIDE), text="what <image> is", return_mm_token_type_ids=True)
    assert got["mm_token_type_ids"] == [[0, 1, 1, 1, 0]]


def test_tiles_must_be_squares() -> None:
    with pytest.raises(ValueError, match="tiles are squares, but size is 42 x 28"):
        image_processor(size={"height": 28, "width": 42}, use_tiling=True)(picture())


def test_an_image_token_is_repeated_for_every_place_of_every_tile() -> None:
    got = processor()(images=[picture(2 * SIDE, SIDE), picture(SIDE, SIDE)], text="<image> and <image> what")
    ids, image = got["input_ids"][0], processor().image_token_id
    assert ids.count(image) == (3 + 1) * 3  # two tiles and a thumbnail, and one tile
    assert ids.index(processor().tokenizer.convert_tokens_to_ids("and")) == 3 * 3
    assert len(got["pixel_values"]) == 4
    assert "num_tiles" not in got


def test_tags_stand_around_an_image_and_tiles_are_told_where_they_are_tagged() -> None:
    made = processor(image_tags=["<img>", "</img>"], use_tile_tags=True)
    got = made(images=picture(2 * SIDE, SIDE), text="<image> what", return_tensors="pt")
    before, after = made.tokenizer.convert_tokens_to_ids(["<img>", "</img>"])
    ids = got["input_ids"][0].tolist()
    assert [ids[0], ids[10]] == [before, after] and set(ids[1:10]) == {made.image_token_id}
    assert got["num_tiles"].tolist() == [3]


def test_rows_are_padded_and_images_may_come_row_by_row() -> None:
    rows = [[picture(SIDE, SIDE)], []]
    got = processor()(images=rows, text=["<image> what", "what is this ?"], padding=True, return_tensors="pt")
    assert got["attention_mask"].sum(dim=1).tolist() == [4, 4]
    assert got["pixel_values"].shape == (1, 3, SIDE, SIDE)


@pytest.mark.parametrize(
    ("images", "text", "words"),
    [
        ([picture()], "what", "'<image>' tokens in the prompts .* 1 images for 0 tokens"),
        (None, "<image> what", "0 images for 1 tokens"),
        ([[picture()], []], ["what", "<image> what"], "1, 0 images for 0, 1 tokens"),
    ],
)
def test_images_and_their_tokens_are_as_many(images: object, text: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        processor()(images=images, text=text)


def test_truncation_that_cuts_an_image_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`image` token count .*ids=\[2\] and text=\[3\].*increase `max_length`"):
        processor()(images=picture(SIDE, SIDE), text="<image> what", truncation=True, max_length=2)


def test_a_tokenizer_without_the_image_token_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no token '<picture>': add it as Megatron does"):
        processor(image_token="<picture>")


def test_a_conversation_becomes_inputs() -> None:
    made = processor(chat_template=TEMPLATE)
    message = [{"type": "image", "image": picture(SIDE, SIDE)}, {"type": "text", "text": " what is this ?"}]
    got = made.apply_chat_template(
        [{"role": "user", "content": message}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    words = made.tokenizer.convert_ids_to_tokens(got["input_ids"][0])
    assert words == ["user", *["<image>"] * 3, "what", "is", "this", "?"]
    assert got["pixel_values"].shape == (1, 3, SIDE, SIDE)


def test_it_is_saved_and_loaded_with_all_it_was_made_with(tmp_path: Path) -> None:
    made = processor(image_tags=["<img>", "</img>"], use_tile_tags=True, chat_template=TEMPLATE)
    made.save_pretrained(tmp_path)
    megahf.register()
    loaded = AutoProcessor.from_pretrained(tmp_path)  # by megahf's own code, with none of the folder's trusted
    assert (type(loaded), type(loaded.image_processor)) == (McoreLlavaProcessor, McoreLlavaImageProcessor)
    assert loaded.chat_template == TEMPLATE
    given = {"images": picture(2 * SIDE, SIDE), "text": "<image> what", "return_tensors": "pt"}
    for name, tensor in made(**given).items():
        torch.testing.assert_close(loaded(**given)[name], tensor, rtol=0, atol=0)


def test_the_image_processor_alone_is_found_in_what_a_processor_saved(tmp_path: Path) -> None:
    processor().save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    assert loaded(picture(2 * SIDE, SIDE))["num_tiles"] == [3]
