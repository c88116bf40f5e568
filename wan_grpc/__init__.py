"""wan-grpc: the Wan2.2 video-generation models as a gRPC microservice."""

__version__ = "0.1.0"
