"""Makes one video on a server at 127.0.0.1:3000 and tells how far it is."""

from wan_grpc_client import Progress, generate

with generate("127.0.0.1:3000", "A red star moves right on a blue background", output="star.mp4") as generation:
    for event in generation:
        if isinstance(event, Progress):
            print(f"{event.stage} {event.step}/{event.total_steps}")
    video = generation.result()
print(video.path, video.size_bytes, video.sha256)
