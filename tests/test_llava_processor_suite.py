"""Promise: transformers' own tests for processors and image processors pass on LLaVA's.

They come with the tests for models: tests/test_transformers_suite.py says what is fetched. What is skipped the suite
skips itself: sound and films, image processors in several backends, and templates that speak of tools.
"""

from __future__ import annotations

import base64
import io
import sys
import unittest
from types import ModuleType
from typing import Any, ClassVar
from unittest.mock import patch

from pictures import picture
from test_transformers_suite import SUITE
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megahf import McoreLlavaImageProcessor, McoreLlavaProcessor
from megahf.processors import CHATML, PRELUDE


def address() -> str:
    """An image as a text that stands for it, where the suite has the Hub's addresses."""
    file = io.BytesIO()
    picture().save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


# The suite's own way to files of the Hub, which its source distribution lacks.
FILES = ModuleType("fetch_hub_objects_for_ci")
vars(FILES)["url_to_local_path"] = lambda url: address()
with patch.dict(sys.modules, {FILES.__name__: FILES}), patch.object(sys, "path", [str(SUITE), *sys.path]):
    from transformers_tests.test_image_processing_common import ImageProcessingTester, ImageProcessingTestMixin
    from transformers_tests.test_processing_common import ProcessorTesterMixin

SETTINGS: dict[str, Any] = {
    "size": {"height": 28, "width": 28},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "use_tiling": False,
    "max_num_tiles": 4,
}


def tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte: what it decodes is what it was given, as one of the tests asks."""
    core = Tokenizer(models.BPE({char: number for number, char in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<|im_end|>")
    made.add_tokens(["<image>", "<|im_start|>", "<|im_end|>"], special_tokens=True)
    return made


class TestProcessor(ProcessorTesterMixin, unittest.TestCase):
    """The processor, with an image in two places."""

    processor_class = McoreLlavaProcessor

    def setUp(self) -> None:
        """Saving notes in a processor that its code goes along, loading does not, and the suite compares the two."""
        stays = patch.object(McoreLlavaProcessor, "_auto_class", None)
        stays.start()
        self.addCleanup(stays.stop)

    @classmethod
    def _setup_image_processor(cls) -> McoreLlavaImageProcessor:
        return McoreLlavaImageProcessor(**SETTINGS)

    @classmethod
    def _setup_tokenizer(cls) -> PreTrainedTokenizerFast:
        return tokenizer()

    @staticmethod
    def prepare_processor_dict() -> dict[str, Any]:
        return {"image_seq_length": 2, "chat_template": PRELUDE + CHATML}


class TestTiles(TestProcessor):
    """The processor, whose model is told each image's tiles."""

    # The suite takes an image for one row of pixels; here it has several.
    test_apply_chat_template_image_0 = test_apply_chat_template_image_1 = None

    @classmethod
    def _setup_image_processor(cls) -> McoreLlavaImageProcessor:
        return McoreLlavaImageProcessor(**{**SETTINGS, "use_tiling": True, "use_thumbnail": True})

    @staticmethod
    def prepare_processor_dict() -> dict[str, Any]:
        return {**TestProcessor.prepare_processor_dict(), "use_tile_tags": True, "image_tags": ["<img>", "</img>"]}


class Images(ImageProcessingTester):
    """The inputs that the suite asks for; attributes have the suite's names."""

    batch_size, num_channels, min_resolution, max_resolution = 7, 3, 20, 60
    size: ClassVar[dict[str, int]] = SETTINGS["size"]

    def __init__(self) -> None:
        pass  # which would look for the class by the name of this file's folder

    def prepare_image_processor_dict(self) -> dict[str, Any]:
        return SETTINGS


class TestImageProcessor(ImageProcessingTestMixin, unittest.TestCase):
    """The image processor."""

    image_processing_classes: ClassVar[dict[str, type]] = {"pil": McoreLlavaImageProcessor}
    image_processor_dict = SETTINGS
    test_cast_dtype = True
    # Pixels are Megatron's to the bit with Pillow's filter, which torchvision's is not.
    test_new_models_require_torchvision_backend = None

    def setUp(self) -> None:
        self.image_processor_tester = Images()

    def test_call_numpy_4_channels(self) -> None:
        """Megatron's encoders take three: four are made three, and are not left as they are."""
        images = self.image_processor_tester.prepare_image_inputs(num_channels=4, numpify=True)
        made = McoreLlavaImageProcessor(**SETTINGS)
        self.assertEqual(made(images, return_tensors="pt").pixel_values.shape, (7, 3, 28, 28))
        with self.assertRaisesRegex(ValueError, "images here are in red, green and blue"):
            made(images, do_convert_rgb=False)
