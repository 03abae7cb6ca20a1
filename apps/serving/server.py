"""Runs uvicorn with patience that ends and an end that cuts nobody off."""

import asyncio
import functools
import logging
import os
import socket

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

GRACE_SECONDS = 25.0  # from being told to stop to the end; orchestrators kill after 30
ANSWER_SECONDS = 4.0  # of these, the last, for what is given up to be told so
LINGER_SECONDS = 2.0  # for a request that is on its way on a connection that seems idle
CLOSE = (b"connection", b"close")

log = logging.getLogger(__name__)


class PatientProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, with an end to waiting.

    A connection without a whole request head in time is closed, and so is one whose client takes
    nothing for so long. When the server stops, idle connections are closed a moment later, after
    what was on its way has been answered: closing at once would reset them.
    """

    def __init__(self, *args, header_seconds: float, send_seconds: float, **kwargs):
        super().__init__(*args, **kwargs)
        self.header_seconds = header_seconds
        self.send_seconds = send_seconds
        self.is_last = False  # no request after the next

    @classmethod
    def within(cls, header_seconds: float, send_seconds: float):
        """Returns what uvicorn takes as `http`."""
        return functools.partial(cls, header_seconds=header_seconds, send_seconds=send_seconds)

    def connection_made(self, transport):
        super().connection_made(transport)
        self._give_up = None
        self._arm(self.header_seconds)

    def connection_lost(self, exc):
        super().connection_lost(exc)
        self._calm()

    def handle_events(self):
        super().handle_events()
        self._say_last()

    def on_response_complete(self):
        super().on_response_complete()
        self._arm(LINGER_SECONDS if self.is_last else self.header_seconds)

    def pause_writing(self):
        super().pause_writing()
        self._give_up = self.loop.call_later(self.send_seconds, self._abort)

    def resume_writing(self):
        super().resume_writing()
        self._calm()

    def shutdown(self):
        self.is_last = True
        self._say_last()
        self._arm(LINGER_SECONDS)

    def _say_last(self):
        cycle = self.cycle
        if self.is_last and cycle is not None and not cycle.response_started:
            if CLOSE not in cycle.default_headers:
                cycle.default_headers = [*cycle.default_headers, CLOSE]

    def _calm(self):
        if self._give_up is not None:
            self._give_up.cancel()
            self._give_up = None

    def _abort(self):
        log.info("a client took nothing for %g seconds: given up", self.send_seconds)
        self.transport.abort()

    def _arm(self, seconds: float):
        self.loop.call_later(seconds, self._close_if_idle, self.cycle)

    def _close_if_idle(self, cycle):
        idle = cycle is None or cycle.response_complete
        if self.cycle is cycle and idle and not self.transport.is_closing():
            log.debug("no request in time: connection closed")
            self.transport.close()
            self.loop.call_later(self.send_seconds, self.transport.abort)  # unless all is taken


class GracefulServer(uvicorn.Server):
    """Stops in three steps: it accepts no more connections, answers, and gives up what is left.

    Args:
        config: uvicorn's; its `timeout_graceful_shutdown` is what the steps take together.
        endpoint: has `stop`, after which new requests are refused, and `give_up`, after which
            those under way are.
    """

    def __init__(self, config: uvicorn.Config, endpoint):
        super().__init__(config)
        self.endpoint = endpoint

    async def shutdown(self, sockets: list[socket.socket] | None = None):
        self.endpoint.stop()
        await self._stop_accepting()
        left = max(0.0, self.config.timeout_graceful_shutdown - ANSWER_SECONDS)
        timer = asyncio.get_running_loop().call_later(left, self.endpoint.give_up)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()

    async def _stop_accepting(self):
        """Closes the listening sockets, and takes over the connections that wait in them.

        Those were made already, and closing a socket resets what nobody has accepted.
        """
        loop = asyncio.get_running_loop()
        listening = [each for server in self.servers for each in server.sockets]
        for each in listening:
            loop.remove_reader(each.fileno())
        for _ in range(3):
            await asyncio.sleep(0)  # what the loop has accepted gets its protocol
        waiting = [connection for each in listening for connection in _accept_all(each)]
        for server in self.servers:
            server.close()
        for connection in waiting:
            await loop.connect_accepted_socket(self._protocol, connection)

    def _protocol(self) -> asyncio.Protocol:
        return self.config.http_protocol_class(
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
        )


def _accept_all(listening) -> list[socket.socket]:
    accepted = []
    with socket.socket(fileno=os.dup(listening.fileno())) as own:
        own.setblocking(False)
        while True:
            try:
                connection, _ = own.accept()
            except OSError:  # there are no more, or too many files are open
                return accepted
            connection.setblocking(False)
            accepted.append(connection)


def make_server(app, *, host: str, port: int, limits, grace: float = GRACE_SECONDS, **options):
    """Returns a server for an application of `create_app`; options as for `uvicorn.Config`."""
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=PatientProtocol.within(limits.header_seconds, limits.send_seconds),
        ws="none",
        timeout_graceful_shutdown=grace,
        proxy_headers=False,
        server_header=False,
        **options,
    )
    return GracefulServer(config, app.state.endpoint)
