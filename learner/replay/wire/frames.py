"""What goes over the queue's connections: frames, the handshake before them, and TLS around both.

A *frame* is one pickled message with its arrays behind it, so that receiving it is one buffer whose
views the arrays are. Nothing is unpickled before the other side has shown that it has the key,
which only Ray's own, authenticated calls give away.
"""

import hmac
import os
import pickle
import socket
import ssl
import struct
import traceback
from typing import Any, NamedTuple, cast

import numpy as np

from configs.errors import one_line

HEAD = struct.Struct("<QQQ")  # number of the call, bytes after the head, how many buffers they are
NONCE = 32  # bytes
PROOF = 32
JOINED = 2**14  # bytes of a frame up to which it is one buffer
PIECED = 2**18  # bytes of an array from which on it is sent in its pieces
ON_THE_WAY = 2**20  # bytes that a connection within a machine takes before they are read
KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 6}  # as far as there are such
ALIGNED = 8  # bytes: where a buffer begins, for the arrays in it
PADDING = [bytes(count) for count in range(ALIGNED)]


class Address(NamedTuple):
    """Where the queue's process listens, and what a caller has to know."""

    host: str
    port: int
    local: str  # abstract name of a Unix socket on its machine; empty: none
    key: bytes


def pack(number: int, message: Any) -> list[Any]:
    """A call's message as buffers, to be sent together; its arrays are not copied unless all of it
    is small."""
    buffers: list[pickle.PickleBuffer] = []
    body: list[Any] = [b"", pickle.dumps(message, 5, buffer_callback=buffers.append)]
    sizes = [len(body[1])]
    body.append(PADDING[-sizes[0] % ALIGNED])
    for buffer in buffers:
        raw = buffer.raw()
        parts = raw.obj.parts if isinstance(raw.obj, _Standing) else [raw]
        sizes.append(sum([part.nbytes for part in parts]))
        body += [*parts, PADDING[-sizes[-1] % ALIGNED]]
    body[0] = struct.pack(f"<{len(sizes)}Q", *sizes)
    size = sum([-(-size // ALIGNED) * ALIGNED for size in sizes]) + len(body[0])
    frame = [HEAD.pack(number, size, len(sizes)), *body]
    return [b"".join(frame)] if size <= JOINED else [part for part in frame if len(part)]


def unpack(count: int, body: memoryview) -> Any:
    """The message of a frame of so many buffers; its arrays are views of `body`."""
    start, parts = 8 * count, []
    for size in struct.unpack_from(f"<{count}Q", body):
        parts.append(body[start : start + size])
        start += size + -size % ALIGNED
    return pickle.loads(parts[0], buffers=parts[1:])


def portable(error: Exception) -> Exception:
    """The error with its traceback as a note, or its words where it does not come through."""
    error.add_note("".join(traceback.format_exception(error)))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {one_line(str(error))}")
    return error


class Pieces:
    """A one-dimensional array in pieces, to be sent as they lie; where it arrives it is one."""

    def __init__(self, pieces: list[np.ndarray]) -> None:
        self.dtype = pieces[0].dtype
        self.parts = [np.ascontiguousarray(piece).data.cast("B") for piece in pieces]
        self.nbytes = sum(part.nbytes for part in self.parts)

    def __reduce_ex__(self, protocol: Any) -> Any:
        standing = np.empty(0, np.uint8).view(_Standing)
        standing.parts = self.parts
        return _whole, (self.dtype.str, self.nbytes, pickle.PickleBuffer(cast(Any, standing)))


class _Standing(np.ndarray):
    """No bytes, in the place of those that `pack` puts there."""

    parts: list[memoryview]


def _whole(dtype: str, size: int, buffer: Any) -> np.ndarray:
    whole = np.frombuffer(buffer, dtype)
    if whole.nbytes != size:
        raise ValueError("pieces of an array can be sent by frames only")
    return whole


def join(pieces: list[np.ndarray]) -> np.ndarray:
    """The pieces as one array; large ones remain pieces, and are one where they are received."""
    alike = all(piece.dtype == pieces[0].dtype for piece in pieces)
    if not alike or sum([piece.nbytes for piece in pieces]) < PIECED:
        return np.concatenate(pieces)
    return cast(np.ndarray, Pieces(pieces))


def proof(key: bytes, side: bytes, nonces: bytes) -> bytes:
    """What a side sends to show that it has the key: HMAC-SHA256 over both sides' nonces.

    side: b"caller" or b"queue", so that neither can send back what it was sent.
    """
    return hmac.digest(key, side + nonces, "sha256")


def set_options(connection: Any) -> None:
    """Within a machine, have the kernel take a put at once, of which it would keep 200 KB; between
    machines, have a peer noticed whose machine is gone, after some 90 s without a word."""
    if connection.family == socket.AF_UNIX:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, ON_THE_WAY)
        return
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEPALIVE.items():
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def tls(listens: bool) -> ssl.SSLContext | None:
    """Ray's own TLS, where `RAY_USE_TLS` has it on: both sides show a certificate of its CA.

    Names are not compared: whoever answers has to have the key as well.
    """
    if os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if listens else ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(os.environ["RAY_TLS_CA_CERT"])
    context.load_cert_chain(os.environ["RAY_TLS_SERVER_CERT"], os.environ["RAY_TLS_SERVER_KEY"])
    return context
