"""Input images as embeddings, for checkpoints that bring a CLIP vision model.

Knows how diffusers prepares and encodes an image. Does not know what attends to the embeddings.
"""

from collections.abc import Sequence

import torch
from PIL import Image
from transformers import BaseImageProcessor, CLIPVisionModel


class ImageEncoder:
    """CLIP's vision model on one device."""

    def __init__(self, processor: BaseImageProcessor, model: CLIPVisionModel) -> None:
        self.processor = processor
        self.model = model

    @torch.no_grad()
    def encode(self, images: Sequence[bytes], *, width: int, height: int) -> torch.Tensor:
        """[n, num_patches + 1, image_dim]: the second last layer's view of each image, RGB24 of `width` x `height`."""
        pictures = [Image.frombytes("RGB", (width, height), image) for image in images]
        prepared = self.processor(images=pictures, return_tensors="pt").to(self.model.device)
        states = self.model(**prepared, output_hidden_states=True).hidden_states
        assert states is not None, "hidden states were asked for"
        embedding: torch.Tensor = states[-2]
        return embedding
