"""From what the image encoder makes of a tile to vectors that stand among those of words.

Sources: megatron/core/models/vision/multimodal_projector.py; `pixel_shuffle` (version 2) of multimodal/llava_model.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from torch import Tensor, nn

from .mlp import MLP

if TYPE_CHECKING:
    from .configuration_mcore import McoreGPTConfig
    from .configuration_mcore_llava import McoreLlavaConfig


class MultimodalProjector(nn.Module):
    """Drops class tokens and joins patches where configured; then an MLP, with a norm if it has one, or a matrix."""

    encoder: nn.Module

    def __init__(self, config: McoreLlavaConfig) -> None:
        super().__init__()
        self.dropped = config.vision_config.class_token_len if config.drop_vision_class_token else 0
        self.shuffles = config.pixel_shuffle
        channels, bias = config.projection_input_size, config.projection_add_bias_linear
        if config.vision_projection_type == "affine":
            self.encoder = nn.Linear(channels, config.hidden_size, bias=bias)
        else:
            fields = cast("McoreGPTConfig", config.projection)
            normed = config.projection_normalization is not None
            self.encoder = MLP(fields, config.projection_ffn_hidden_size, bias, normed, channels)

    def forward(self, hidden: Tensor) -> Tensor:
        """An encoder's tokens `[t, s, h_v]` to `[t, places, h]`."""
        hidden = hidden[:, self.dropped :]
        return self.encoder(pixel_shuffle(hidden) if self.shuffles else hidden)


def pixel_shuffle(hidden: Tensor) -> Tensor:
    """Two by two patches of a square become one: `[t, side side, h]` to `[t, side side / 4, 4 h]`, rows first."""
    tiles, patches, channels = hidden.shape
    half = int(patches**0.5) // 2
    square = hidden.view(tiles, half, 2, half, 2 * channels)  # [t, y, row of two, x, column of two | h]
    return square.transpose(2, 3).reshape(tiles, half * half, 4 * channels)
