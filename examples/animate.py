"""Makes a video from the picture star.png, on a server of an image-to-video model at 127.0.0.1:3000."""

from wan_grpc_client import generate

with generate("127.0.0.1:3000", "The star moves to the right", image="star.png", output="right.mp4") as generation:
    video = generation.result()
print(video.path, f"{video.resolved.width}x{video.resolved.height}", video.warnings)
