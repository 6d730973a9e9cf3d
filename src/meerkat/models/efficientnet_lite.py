"""EfficientNet-Lite: inverted residual blocks without squeeze-and-excitation, and ReLU6.

The network of Tan and Le (arXiv 1905.11946) in the variant for small devices. Names of parameters
are those of the published PyTorch weights, which load as they are.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import ImageClassifierOutput

__all__ = ["EfficientNetLite", "EfficientNetLiteConfig"]

_LITE0 = (
    # kernel, stride, expansion, width, repeats
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)


class EfficientNetLiteConfig(PreTrainedConfig):
    """Widths of an EfficientNet-Lite; those of Lite0 by default.

    Args:
        stages: (kernel, stride, expansion, width, repeats) of each run of blocks.
    """

    model_type = "efficientnet-lite"

    def __init__(
        self,
        stages: Any = _LITE0,
        stem_width: int = 32,
        head_width: int = 1280,
        batch_norm_epsilon: float = 1e-3,
        **others: Any,
    ):
        self.stages = [list(stage) for stage in stages]
        self.stem_width = stem_width
        self.head_width = head_width
        self.batch_norm_epsilon = batch_norm_epsilon
        super().__init__(**others)


class _SameConv2d(nn.Conv2d):
    """A convolution without bias whose output is as large as its input, by its stride.

    Where the padding is odd the greater part is right and below, as TensorFlow does it.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=False)

    def forward(self, input: Float[Tensor, "S c h w"]) -> Float[Tensor, "S o p q"]:
        kernel, stride = self.kernel_size[0], self.stride[0]
        if kernel == 1:
            return super().forward(input)
        missing = [
            max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in input.shape[-2:]
        ]
        high, wide = missing
        edges = (wide // 2, wide - wide // 2, high // 2, high - high // 2)
        return super().forward(pad(input, edges))


class _Block(nn.Module):
    """Widen, filter each channel by itself, narrow; and the input, where shapes allow."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int, epsilon: float
    ):
        super().__init__()
        wide = inputs * expansion
        if expansion != 1:
            self._expand_conv = _SameConv2d(inputs, wide, 1)
            self._bn0 = nn.BatchNorm2d(wide, epsilon)
        self._depthwise_conv = _SameConv2d(wide, wide, kernel, stride, groups=wide)
        self._bn1 = nn.BatchNorm2d(wide, epsilon)
        self._project_conv = _SameConv2d(wide, outputs, 1)
        self._bn2 = nn.BatchNorm2d(outputs, epsilon)
        self._activation = nn.ReLU6()
        self._adds = stride == 1 and inputs == outputs
        self._widens = expansion != 1

    def forward(self, inputs: Float[Tensor, "S c h w"]) -> Float[Tensor, "S o p q"]:
        x = inputs
        if self._widens:
            x = self._activation(self._bn0(self._expand_conv(x)))
        x = self._activation(self._bn1(self._depthwise_conv(x)))
        x = self._bn2(self._project_conv(x))
        return x + inputs if self._adds else x


class EfficientNetLite(PreTrainedModel):
    """Images (S, 3, height, width), normalised → logits of the classes."""

    config_class = EfficientNetLiteConfig
    main_input_name = "pixel_values"

    def __init__(self, config: EfficientNetLiteConfig):
        super().__init__(config)
        epsilon = config.batch_norm_epsilon
        self._conv_stem = _SameConv2d(3, config.stem_width, 3, 2)
        self._bn0 = nn.BatchNorm2d(config.stem_width, epsilon)
        self._blocks = nn.ModuleList()
        width = config.stem_width
        for kernel, stride, expansion, outputs, repeats in config.stages:
            for place in range(repeats):
                first = stride if place == 0 else 1
                self._blocks.append(_Block(width, outputs, kernel, first, expansion, epsilon))
                width = outputs
        self._conv_head = _SameConv2d(width, config.head_width, 1)
        self._bn1 = nn.BatchNorm2d(config.head_width, epsilon)
        self._fc = nn.Linear(config.head_width, int(config.num_labels or 0))
        self._activation = nn.ReLU6()
        self.post_init()

    def forward(
        self, pixel_values: Float[Tensor, "S 3 h w"], **unused: Any
    ) -> ImageClassifierOutput:
        x = self._activation(self._bn0(self._conv_stem(pixel_values)))
        for block in self._blocks:
            x = block(x)
        x = self._activation(self._bn1(self._conv_head(x)))
        return ImageClassifierOutput(logits=self._fc(x.mean((2, 3))))

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            outgoing = module.kernel_size[0] ** 2 * module.out_channels // module.groups
            nn.init.normal_(module.weight, std=(2 / outgoing) ** 0.5)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            nn.init.zeros_(module.bias)


AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig)
AutoModelForImageClassification.register(EfficientNetLiteConfig, EfficientNetLite)
