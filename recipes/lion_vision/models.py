"""Two small networks for images of 8 x 8 grey pixels and ten classes."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ViT(nn.Module):
    """A vision transformer (arXiv 2010.11929): sixteen patches of 2 x 2, pre-norm layers, mean over patches."""

    def __init__(self, width: int = 48, layers: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, kernel_size=2, stride=2)
        self.places = nn.Parameter(torch.randn(1, 16, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 10))

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[images, 10]`` of ``[images, 1, 8, 8]``."""
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.places
        return self.head(self.layers(tokens).mean(1))


class Block(nn.Module):
    """Two convolutions beside a short cut (arXiv 1512.03385)."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, 1, 1, bias=False),
            nn.BatchNorm2d(after),
        )
        same = before == after and stride == 1
        self.past = nn.Identity() if same else nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """``[images, after, height / stride, width / stride]``."""
        return torch.relu(self.body(images) + self.past(images))


class ResNet(nn.Module):
    """Three blocks of 16, 32 and 32 channels, and the mean over what is left."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, 1, 1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            Block(16, 16, 1),
            Block(16, 32, 2),
            Block(32, 32, 1),
        )
        self.head = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[images, 10]`` of ``[images, 1, 8, 8]``."""
        return self.head(self.body(images).mean((2, 3)))


MODELS: dict[str, type[nn.Module]] = {"vit": ViT, "resnet": ResNet}
