"""Promise: where images stand, what counts in the loss and RADIO's positions are megatron-core's own.

Its functions run here on stand-ins for its models, without ranks; whole ones are in megatron/test_llava_checkpoints.py.
"""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tiny_llava import IMAGE, pixels, tiny_llava, tiny_vision_config
from torch import Tensor

from megahf.models.vision_radio import RADIOViTModel

pytest.importorskip("megatron.core")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.models.multimodal.llava_model import LLaVAModel
    from megatron.core.models.vision import radio

TILES = [2, 1, 1, 3]  # of each image
# A row with two images, the first in front; one whose images touch; text alone. 0 is a word like any other.
IDS = torch.tensor([[IMAGE, 3, 4, IMAGE, 5, 6], [7, 8, IMAGE, IMAGE, 9, 0], [10, 11, 12, 13, 14, 15]])


def expanded(ids: Tensor, places: int) -> tuple[Tensor, Tensor]:
    """The image token once for each place, rows filled up on the right; and the mask."""
    counts = iter(TILES)
    rows = [
        torch.tensor([t for token in row for t in [token] * (next(counts) * places if token == IMAGE else 1)])
        for row in ids.tolist()
    ]
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), mask


def test_images_stand_and_count_where_megatron_has_them() -> None:
    model = tiny_llava()
    language, places = model.model.language_model, model.config.img_seq_len
    labels = F.pad(IDS[:, 1:], (0, 1), value=-100)  # Megatron's are shifted
    with torch.no_grad():
        features = model.get_image_features(pixels(7)).pooler_output  # [t, places, h]
        words = language.embedding.word_embeddings(IDS.masked_fill(IDS == IMAGE, 0))
    stand_in = SimpleNamespace(
        add_decoder=True,
        pre_process=True,
        post_process=True,
        img_seq_len=places,
        context_parallel_lm=1,
        _language_is_pipeline_parallel=False,
        _language_max_sequence_length=4096,
    )
    embeddings, targets, counts = LLaVAModel._preprocess_data(
        stand_in,
        features.transpose(0, 1),
        words,
        IDS,
        (labels != -100).float(),
        labels,
        use_inference_kv_cache=False,
        inference_context=None,
        image_token_index=IMAGE,
        num_image_tiles=torch.tensor(TILES, dtype=torch.int32),
    )

    seen = []
    language.register_forward_pre_hook(lambda module, given: seen.append(given[4]))
    ids, mask = expanded(IDS, places)
    own = ids.masked_fill(mask == 0, -100)
    with torch.no_grad():
        out = model(ids, attention_mask=mask, pixel_values=pixels(7), num_tiles=TILES, labels=own)
    filled = mask.bool()
    assert torch.equal(seen[0][filled], embeddings.transpose(0, 1)[filled])
    losses = F.cross_entropy(out.logits.transpose(1, 2), targets, reduction="none")
    torch.testing.assert_close(out.loss, (losses * counts).sum() / counts.sum())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("size", [(8, 8), (4, 4), (4, 6), (7, 3)])
def test_radios_positions_are_megatrons(size: tuple[int, int], training: bool) -> None:
    model = RADIOViTModel(tiny_vision_config("radio")).train(training)
    stand_in = SimpleNamespace(
        max_num_rows=8, max_num_cols=8, position_embeddings=model.position_embeddings, has_cpe=True, training=training
    )
    torch.manual_seed(3)
    expected = radio.RADIOViTModel._get_pos_embeddings(stand_in, 2, size)
    torch.manual_seed(3)
    assert torch.equal(model.positions(*size, 2), expected)


def test_radios_positions_have_newer_options() -> None:
    size, table = (6, 3), torch.randn(1, 24, 8, 8, generator=torch.Generator().manual_seed(4))

    def found(**options: bool) -> Tensor:
        config = tiny_vision_config("radio", interpolate_align_corners=False, **options)
        model = RADIOViTModel(config).eval()
        model.position_embeddings.data = table.flatten(2).transpose(1, 2)
        return model.positions(*size, 2).transpose(1, 2).unflatten(2, size)

    def resized(table: Tensor, *size: int) -> Tensor:
        return F.interpolate(table, size, mode="bilinear", align_corners=False)

    torch.testing.assert_close(found(), resized(table, 6, 6)[..., :3])
    torch.testing.assert_close(found(interpolate_only_cpe=True), resized(table, *size))
    torch.testing.assert_close(found(cpe_aspect_ratio_select=True), resized(table[..., :4], *size))
    torch.testing.assert_close(found(has_cpe=False), table[..., :6, :3])
