"""Megatron-core's image encoders: what RADIO and the others share, and those of CLIP's shape, SigLIP and InternViT too.

Sources: megatron/core/models/vision/clip_vit_model.py; which encoder has what is in `vision_kinds.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.output_capturing import capture_outputs

from .attention import Attention
from .configuration_mcore_llava import McoreVisionConfig
from .modeling_mcore import NORMS, McorePreTrainedModel, register_names
from .norm import build_norm
from .transformer_layer import TransformerLayer
from .vision_layers import HeadsRMSNorm, ScaledLayer, VisionBlock

if TYPE_CHECKING:
    from .configuration_mcore import McoreGPTConfig


class CLIPViTModel(McorePreTrainedModel):
    """An image encoder. Embedding: patches by a convolution, class tokens, a learned position for each token.

    CLIP, SigLIP and InternViT are this; RADIO embeds in another way, and shares the rest.
    """

    config_class = McoreVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules: ClassVar[list[str]] = ["TransformerLayer", "ScaledLayer"]
    _can_record_outputs: ClassVar[dict[str, Any]] = {
        "hidden_states": [TransformerLayer, ScaledLayer],
        "attentions": Attention,
    }
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = []
    _supports_context_parallel = False
    config: McoreVisionConfig
    class_token: nn.Parameter | None
    position_embeddings: Any  # a module here, a parameter in RADIO

    def __init__(self, config: McoreVisionConfig) -> None:
        super().__init__(config)
        shared, kind = cast("McoreGPTConfig", config), config.kind
        self.build_embedding(config)
        self.ln_pre = build_norm(shared, config.hidden_size) if kind.ln_pre else None
        self.decoder = VisionBlock(config)
        self.ln_post = build_norm(shared, config.hidden_size) if kind.ln_post else None
        self.post_init()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return False

    def build_embedding(self, config: McoreVisionConfig) -> None:
        """Makes what `embed` uses, which Megatron has beside the layers and not in a module of its own."""
        patch, tokens = config.patch_dim, cast(int, config.class_token_len)
        self.conv1 = nn.Conv2d(3, config.hidden_size, kernel_size=patch, stride=patch, bias=config.kind.patch_bias)
        self.position_embeddings = nn.Embedding(config.seq_length, config.hidden_size)
        self.class_token = nn.Parameter(torch.randn(1, tokens, config.hidden_size)) if tokens else None

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Images `[t, 3, img_h, img_w]` to tokens `[t, s, h]`, class tokens first."""
        hidden = self.conv1(pixel_values).flatten(2).transpose(1, 2)  # [t, patches, h]
        if self.class_token is not None:
            hidden = torch.cat((self.class_token.expand(len(hidden), -1, -1), hidden), dim=1)  # [t, s, h]
        return hidden + self.position_embeddings.weight

    @capture_outputs
    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutput:
        """Hidden states `[t, s, h]` of images `[t, 3, img_h, img_w]`, class tokens first.

        Raises:
            ValueError: images of another shape.
        """
        shape = (3, self.config.img_h, self.config.img_w)
        if pixel_values.dim() != 4 or tuple(pixel_values.shape[1:]) != shape:
            raise ValueError(
                f"pixel_values are {list(pixel_values.shape)}, but this {self.config.vision_model_type} encoder takes "
                f"[tiles, {', '.join(map(str, shape))}]: resize images to {shape[1]} x {shape[2]} pixels, as its image "
                f"processor does"
            )
        hidden = self.embed(pixel_values.to(self.dtype))  # [t, s, h]
        hidden = self.decoder(hidden if self.ln_pre is None else self.ln_pre(hidden), **kwargs)
        return BaseModelOutput(last_hidden_state=hidden if self.ln_post is None else self.ln_post(hidden))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Megatron's initialisation, with embeddings as narrow as other weights."""
        super()._init_weights(module)
        if isinstance(module, HeadsRMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, ScaledLayer):
            init.ones_(module.ls1)
            init.ones_(module.ls2)
        elif isinstance(module, CLIPViTModel) and module.class_token is not None:
            init.normal_(module.class_token, mean=0.0, std=self.config.init_method_std)


register_names("mcore_vision", *NORMS)
