"""RADIO, RADIO-g and C-RADIO-g: image encoders whose table of positions is fitted to the image.

Source: megatron/core/models/vision/radio.py.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_mcore_llava import McoreVisionConfig
from .vision import CLIPViTModel

SMALLEST_AREA = 0.1  # share of the table that training shows at least
WIDEST = 4 / 3  # width by height of the part that it shows


class RADIOViTModel(CLIPViTModel):
    """Patches by a matrix, positions fitted from a table for the largest image, class tokens without positions."""

    mask_token: nn.Parameter | None

    def build_embedding(self, config: McoreVisionConfig) -> None:
        patch, width, tokens = config.patch_dim, config.hidden_size, cast(int, config.class_token_len)
        self.table = (cast(int, config.max_img_h) // patch, cast(int, config.max_img_w) // patch)
        self.embedder = nn.Linear(3 * patch * patch, width, bias=config.kind.patch_bias)  # columns: channel | y | x
        self.position_embeddings = nn.Parameter(torch.zeros(1, self.table[0] * self.table[1], width))
        self.class_token = nn.Parameter(torch.randn(tokens, width)) if tokens else None
        self.mask_token = nn.Parameter(torch.zeros(1, width)) if config.kind.mask_token else None

    def embed(self, pixel_values: Tensor) -> Tensor:
        count, channels, height, width = pixel_values.shape
        patch = self.config.patch_dim
        rows, columns = height // patch, width // patch
        patches = pixel_values.reshape(count, channels, rows, patch, columns, patch).permute(0, 2, 4, 1, 3, 5)
        hidden = self.embedder(patches.reshape(count, rows * columns, -1))  # [t, patches, h]
        hidden = hidden + self.positions(rows, columns, count)
        if self.class_token is None:
            return hidden
        return torch.cat((self.class_token.expand(count, -1, -1), hidden), dim=1)  # [t, s, h]

    def positions(self, rows: int, columns: int, count: int) -> Tensor:
        """Positions `[1, rows columns, h]` for an image's patches; `[count, ...]` of random parts in training."""
        if (rows, columns) == self.table:
            return self.position_embeddings
        config, size = self.config, (rows, columns)
        grid = self.position_embeddings.unflatten(1, self.table).permute(0, 3, 1, 2)  # [1, h, table rows, columns]
        if config.cpe_aspect_ratio_select and not self.crops:
            grid = of_shape(grid, size)
        elif config.interpolate_only_cpe:
            grid = self.resize(grid, size)
        elif not config.has_cpe:
            grid = corner(grid, size)
        elif self.crops:
            grid = random_parts(grid, size, count)
        else:  # stretched to a square
            grid = corner(self.resize(grid, (max(size), max(size))), size)
        if grid.shape[-2:] != size:
            grid = self.resize(grid, size)
        return grid.flatten(2).transpose(1, 2)

    @property
    def crops(self) -> bool:
        """Whether positions are those of random parts of the table."""
        config = self.config
        return self.training and config.has_cpe and not (config.interpolate_only_cpe or config.force_cpe_eval_mode)

    def resize(self, grid: Tensor, size: tuple[int, int]) -> Tensor:
        """`[1, h, rows, columns]` interpolated to another size, in float32."""
        corners = self.config.interpolate_align_corners
        return F.interpolate(grid.float(), size, mode="bilinear", align_corners=corners).to(grid.dtype)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, RADIOViTModel):
            init.normal_(module.position_embeddings, mean=0.0, std=self.config.hidden_size**-0.5)
            if module.mask_token is not None:
                init.zeros_(module.mask_token)


def corner(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """The upper left corner of `[1, h, rows, columns]`, no larger than `size`."""
    return grid[..., : size[0], : size[1]]


def of_shape(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """The largest upper left corner of `[1, h, rows, columns]` with the proportions of `size`."""
    (height, width), (rows, columns) = grid.shape[-2:], size
    if columns < rows:
        return grid[..., : min(width, math.ceil(width * (columns / rows)))]
    return grid[..., : min(height, math.ceil(height * (rows / columns))), :]


def random_parts(grid: Tensor, size: tuple[int, int], count: int) -> Tensor:
    """Positions `[count, h, *size]` of as many random parts of the table `[1, h, rows, columns]`.

    A part covers from a tenth of the table to all of it, and is from 3:4 to 4:3 wide.
    """
    device = grid.device

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, 1, 1, device=device) * (high - low) + low

    scale = uniform(math.sqrt(SMALLEST_AREA), 1.0)
    aspect = torch.exp(uniform(-math.log(WIDEST), math.log(WIDEST)))
    extent = torch.stack((scale * aspect, scale / aspect), dim=-1).clamp(0, 1)  # [count, 1, 1, x | y]
    start = torch.rand(count, 1, 1, 2, device=device) * (1 - extent)
    y, x = (torch.linspace(0, 1, steps, device=device) for steps in size)
    places = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)  # [rows, columns, x | y], from 0 to 1
    places = (places * extent + start) * 2 - 1  # [count, rows, columns, x | y], from -1 to 1
    table = grid.float().expand(count, -1, -1, -1)
    return F.grid_sample(table, places, mode="bilinear", padding_mode="zeros", align_corners=True).to(grid.dtype)
