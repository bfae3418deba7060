"""Step 2: an encoder per modality, from tensors to a vector of features.

Each ends in a LayerNorm: a product of features that start small has small gradients. Without it one seed of three of
the fused model had not left the plateau at chance after 800 steps, at a learning rate of 4e-3.
"""

from __future__ import annotations

from torch import Tensor, nn


class ImageCNN(nn.Sequential):
    """Two convolutions and a projection: images (B, 1, 8, 8) to features (B, features)."""

    def __init__(self, features: int) -> None:
        super().__init__(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 2 * 2, features),
            nn.LayerNorm(features),
        )


class TextGRU(nn.Module):
    """A character GRU: left-padded codes (B, T) int64 to features (B, features), its state after the last letter."""

    def __init__(self, vocabulary: int, features: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 24, padding_idx=0)
        self.gru = nn.GRU(24, 64, batch_first=True)
        self.projection = nn.Sequential(nn.Linear(64, features), nn.LayerNorm(features))

    def forward(self, text: Tensor) -> Tensor:
        """Encode a batch of texts."""
        _, state = self.gru(self.embedding(text))
        return self.projection(state[-1])
