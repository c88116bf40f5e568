"""What one device computes: text, noise, denoising, decoding. Knows no ranks and no queue."""
