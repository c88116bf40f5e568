import pytest
import torch

from tests import tiny_images
from tests.tiny_images import picture


@pytest.mark.parametrize("num_images", [1, 2])
@torch.no_grad()
def test_embeddings_are_those_of_diffusers(num_images: int) -> None:
    """Bit for bit what diffusers makes of a picture, or of two, that CLIP must shrink and crop; no other layer's."""
    theirs = tiny_images.make_i2v(tiny_images.CLIP)
    encoder = tiny_images.ours(theirs).image_encoder
    assert encoder is not None
    pictures = [picture(80, 48, seed) for seed in range(num_images)]
    embedding = encoder.encode([image.tobytes() for image in pictures], width=80, height=48)
    assert embedding.shape == (num_images, tiny_images.NUM_IMAGE_TOKENS, tiny_images.IMAGE_DIM)
    assert torch.equal(embedding, theirs.encode_image(pictures, torch.device("cpu")))
