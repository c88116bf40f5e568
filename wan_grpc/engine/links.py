"""TCP connections between hosts, both ends of which have proven that they know the same secret.

Knows sockets and the proof. Does not know what is said afterwards, and encrypts none of it.
"""

import hashlib
import hmac
import os
import secrets
import socket
import stat
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

LEAST_SECRET_BYTES: Final = 16
PATIENCE_S: Final = 10.0
"""For the whole of a proof, so that nobody can hold a connection open without knowing the secret."""
_DIAL_FOR_S: Final = 30.0
_DIAL_PAUSE_S: Final = 0.2
_GREETING: Final = b"wan-grpc joins 1"
_NONCE_BYTES: Final = 32
_PROOF_BYTES: Final = hashlib.sha256().digest_size
_REFUSED: Final = bytes(_PROOF_BYTES)
_MOST_SECRET_BYTES: Final = 4096
# A host that vanishes without a word is missed after half a minute, whether something is on its way to it or nothing.
_KEEPALIVE: Final = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 30_000}


class RefusedError(Exception):
    """The other end does not know the secret, or is something else altogether."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where a socket listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def read_secret(path: Path) -> bytes:
    """The secret in a file, without the line's end.

    Raises:
        ValueError: it is too short to be one, or everybody can read it.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & stat.S_IRWXO:
            raise ValueError(f"{path}: everybody on this host has access to it; `chmod o= {path}` mends that")
        secret = file.read(_MOST_SECRET_BYTES + 1).rstrip(b"\r\n")
    if not LEAST_SECRET_BYTES <= len(secret) <= _MOST_SECRET_BYTES:
        raise ValueError(f"{path}: must hold {LEAST_SECRET_BYTES} to {_MOST_SECRET_BYTES} bytes")
    return secret


def listen(at: Endpoint) -> socket.socket:
    """A socket that takes connections.

    Raises:
        OSError: the address cannot be had.
    """
    family, _, _, _, address = socket.getaddrinfo(at.host, at.port, type=socket.SOCK_STREAM)[0]
    return socket.create_server(address[:2], family=family, backlog=128)


def greet(accepted: socket.socket, secret: bytes, *, patience_s: float = PATIENCE_S) -> Connection:
    """The connection to whoever was accepted, once both have proven themselves. Closes it otherwise.

    Whoever dialled proves first, so that a stranger learns nothing that depends on the secret.

    Raises:
        RefusedError: it does not know the secret.
        OSError: it left, or took too long to show that it does.
    """
    try:
        talk = _Talk(accepted, patience_s)
        ours = secrets.token_bytes(_NONCE_BYTES)
        talk.say(_GREETING + ours)
        theirs, proof = talk.hear(_NONCE_BYTES), talk.hear(_PROOF_BYTES)
        if not hmac.compare_digest(proof, _proof(secret, b"dialled", ours, theirs)):
            talk.say(_REFUSED)
            raise RefusedError("it does not know the secret")
        talk.say(_proof(secret, b"accepted", ours, theirs))
    except BaseException:
        accepted.close()
        raise
    return _connection(accepted)


def dial(to: Endpoint, secret: bytes, *, patience_s: float = PATIENCE_S) -> Connection:
    """A connection to whoever listens at `to` and knows the secret, too.

    Raises:
        RefusedError: it does not, or does not take ours.
        OSError: nobody can be reached there, or not for long enough.
    """
    dialled = socket.create_connection((to.host, to.port), timeout=patience_s)
    try:
        talk = _Talk(dialled, patience_s)
        if talk.hear(len(_GREETING)) != _GREETING:
            raise RefusedError(f"what listens at {to} is no wan-grpc server of this kind")
        theirs, ours = talk.hear(_NONCE_BYTES), secrets.token_bytes(_NONCE_BYTES)
        talk.say(ours + _proof(secret, b"dialled", theirs, ours))
        answer = talk.hear(_PROOF_BYTES)
        if answer == _REFUSED:
            raise RefusedError(f"the server at {to} knows another secret")
        if not hmac.compare_digest(answer, _proof(secret, b"accepted", theirs, ours)):
            raise RefusedError(f"what listens at {to} does not know the secret")
    except BaseException:
        dialled.close()
        raise
    return _connection(dialled)


def keep_dialling(to: Endpoint, secret: bytes, *, for_s: float = _DIAL_FOR_S) -> Connection:
    """As `dial`, for those to whom a connection that breaks off would be the end: for so long they try again."""
    until = time.monotonic() + for_s
    while True:
        try:
            return dial(to, secret)
        except OSError:
            if time.monotonic() >= until:
                raise
        time.sleep(_DIAL_PAUSE_S)


def own_address(link: Connection) -> str:
    """The address of this host from which the other end is reached."""
    with _socket_of(link) as own:
        return str(own.getsockname()[0])


def hang_up(link: Connection) -> None:
    """End a connection, also for a thread that waits at it. It is still to be closed."""
    try:
        with _socket_of(link) as own:
            own.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # nobody is there any more


class _Talk:
    """A socket before anything is known of the other end: so many bytes each way, until a moment at the latest."""

    def __init__(self, own: socket.socket, patience_s: float) -> None:
        self._socket = own
        self._until = time.monotonic() + patience_s

    def say(self, data: bytes) -> None:
        self._hurry()
        self._socket.sendall(data)

    def hear(self, num_bytes: int) -> bytes:
        data = b""
        while len(data) < num_bytes:
            self._hurry()
            more = self._socket.recv(num_bytes - len(data))
            if not more:
                raise ConnectionResetError("the other end left before it had proven that it knows the secret")
            data += more
        return data

    def _hurry(self) -> None:
        self._socket.settimeout(max(self._until - time.monotonic(), 1e-3))


def _proof(secret: bytes, side: bytes, nonce_accepted: bytes, nonce_dialled: bytes) -> bytes:
    """What only those can say who know the secret, and each side in its own words, so that none is sent back."""
    return hmac.digest(secret, _GREETING + side + nonce_accepted + nonce_dialled, "sha256")


def _connection(own: socket.socket) -> Connection:
    own.settimeout(None)
    own.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    own.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):  # Linux has them all
            own.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return Connection(own.detach())


def _socket_of(link: Connection) -> socket.socket:
    return socket.socket(fileno=os.dup(link.fileno()))
