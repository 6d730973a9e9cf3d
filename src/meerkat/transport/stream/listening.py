"""A gRPC server on an event loop in one thread of its own, for any number of streams."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import grpc  # type: ignore[import-untyped]

from meerkat.errors import RecipeError
from meerkat.transport.stream.certificates import Identity
from meerkat.transport.stream.invitation import METHOD, SERVICE, is_loopback, split_address

__all__ = ["FLUSH", "Listener", "limits"]

FLUSH = 2.0
"""Seconds in which waiting frames are still sent when a stream or the server is closed."""
_METADATA = 8 * 1024


class Listener:
    """Accepts streams and runs a handler for each.

    Args:
        serve: The handler of one stream, for a bidirectional method of gRPC.
        listen: host:port; port 0 takes a free one.
        identity: The server's certificate and key; None for plain text.
        options: gRPC's.

    Raises:
        RecipeError: It cannot listen there, or not in plain text.
    """

    def __init__(
        self,
        serve: Callable[[Any, Any], Awaitable[None]],
        listen: str,
        identity: Identity | None,
        options: list[tuple[str, int]],
    ):
        _check_listen(listen, identity is None)
        self._serve, self._options = serve, options
        self.loop = asyncio.new_event_loop()
        self._stopping = asyncio.Event()
        self._started: Future[int] = Future()
        self._thread = threading.Thread(target=self._run, args=(listen, identity), daemon=True)
        self._thread.start()
        try:
            self.port = self._started.result()
        except RuntimeError:
            self._thread.join()
            raise RecipeError(
                f"network.listen: cannot listen on {listen}; is the port taken, or the address "
                "not one of this machine?"
            ) from None

    def stop(self) -> None:
        """Accept no more streams, wait for the open ones to end, and free the port."""
        with suppress(RuntimeError):  # the loop is closed: stopped before
            self.loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(3 * FLUSH)

    def _run(self, listen: str, identity: Identity | None) -> None:
        with asyncio.Runner(loop_factory=lambda: self.loop) as runner:
            runner.run(self._main(listen, identity))

    async def _main(self, listen: str, identity: Identity | None) -> None:
        server = grpc.aio.server(options=self._options)
        method = grpc.stream_stream_rpc_method_handler(self._serve)
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE, {METHOD: method}),)
        )
        try:
            if identity is None:
                port = server.add_insecure_port(listen)
            else:
                pair = (identity.key, identity.certificate)
                port = server.add_secure_port(listen, grpc.ssl_server_credentials([pair]))
            await server.start()
        except Exception as error:
            self._started.set_exception(RuntimeError(str(error)))
            return
        self._started.set_result(port)
        await self._stopping.wait()
        await server.stop(FLUSH)


def limits(largest_frame: int, keepalive: float, timeout: float) -> list[tuple[str, int]]:
    """Options of gRPC that limit a client's memory here and end connections that are broken."""
    return [
        ("grpc.max_receive_message_length", largest_frame),
        ("grpc.max_send_message_length", -1),
        # No compression: a small compressed frame could expand to a large one.
        ("grpc.compression_enabled_algorithms_bitset", 1),
        ("grpc.max_metadata_size", _METADATA),
        ("grpc.absolute_max_metadata_size", _METADATA),
        ("grpc.max_concurrent_streams", 8),
        # Two servers on one port would each get some of the clients.
        ("grpc.so_reuseport", 0),
        # The receive window of a stream stays at 64 KiB, also on a fast network.
        ("grpc.http2.bdp_probe", 0),
        # Connections without a handshake or without a stream are closed soon.
        ("grpc.server_handshake_timeout_ms", 10_000),
        ("grpc.max_connection_idle_ms", 60_000),
        ("grpc.keepalive_time_ms", round(1000 * keepalive)),
        ("grpc.keepalive_timeout_ms", round(1000 * timeout)),
        # Without this one a ping has a timeout of a minute, whatever the one above is.
        ("grpc.http2.ping_timeout_ms", round(1000 * timeout)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", round(min(5000, 500 * keepalive))),
    ]


def _check_listen(listen: str, insecure: bool) -> None:
    try:
        host, _ = split_address(listen)
    except ValueError as error:
        raise RecipeError(f"network.listen: {error}") from None
    if insecure and not is_loopback(host):
        raise RecipeError(
            f"network.insecure: plain text is for loopback only, and network.listen is {listen}; "
            "use 127.0.0.1:0, or leave network.insecure out"
        )
