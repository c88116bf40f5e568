"""How a client connects: the options of its channel."""

from typing import Final

KEEPALIVE_S: Final = 30
"""Above the least interval of pings that servers allow (10 s by default), below what proxies take for idle (60 s)."""
_TIMEOUT_S: Final = 20

CHANNEL_OPTIONS: Final = (
    ("grpc.keepalive_time_ms", KEEPALIVE_S * 1000),
    ("grpc.keepalive_timeout_ms", _TIMEOUT_S * 1000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_reconnect_backoff_ms", 5000),
)
