"""HTTP/1.1 over kept connections, as a transport for httpx's asynchronous client.

A member is asked for every token, so what a request costs here counts. On one core, with 32 requests in flight and an
answer of 5 kB, a request took 2.1 ms of processor time with httpx's own asynchronous connections, 1.1 ms with its
synchronous client in 32 threads, and 0.3 to 0.4 ms like this. The protocol itself is h11's, which httpx uses as well.
"""

from __future__ import annotations

import asyncio
import ssl
from contextlib import suppress

import h11
import httpx

_READ = 1 << 16


class HttpTransport(httpx.AsyncBaseTransport):
    """Connections to one server, `most` at once; further requests wait for one, first come first served.

    The extension "anew" of a response tells whether a connection was made for it; that of a request, that none which
    was kept may be used. tls: what certificates are verified with. Raises httpx.TransportError.
    """

    def __init__(self, most: int, tls: ssl.SSLContext | None) -> None:
        self._room = asyncio.Semaphore(most)
        self._tls = tls
        self._idle: list[_Connection] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request and return the whole answer to it."""
        limits = request.extensions["timeout"]
        async with self._room:
            one = None if request.extensions.get("anew") else self._kept()
            anew = one is None
            if one is None:
                one = await self._connect(request.url, limits["connect"])
            keep = False
            try:
                async with asyncio.timeout(limits["read"]):
                    status, headers, content = await one.exchange(request)
                keep = one.reusable
            except TimeoutError as error:
                raise httpx.ReadTimeout(f"no answer within {limits['read']:g} seconds", request=request) from error
            except (OSError, h11.ProtocolError) as error:
                raise httpx.RemoteProtocolError(str(error) or type(error).__name__, request=request) from error
            finally:
                if keep:
                    self._idle.append(one)
                else:
                    one.close()
        return httpx.Response(status, headers=headers, content=content, extensions={"anew": anew})

    async def aclose(self) -> None:
        """Close the connections that wait."""
        for one in self._idle:
            one.close()
        self._idle.clear()
        await asyncio.sleep(0)  # closing is done by the loop

    def _kept(self) -> _Connection | None:
        """Return the connection that was used last and is still open."""
        while self._idle:
            one = self._idle.pop()
            if not one.gone:
                return one
            one.close()
        return None

    async def _connect(self, url: httpx.URL, seconds: float) -> _Connection:
        secure = url.scheme == "https"
        port = url.port or (443 if secure else 80)
        try:
            async with asyncio.timeout(seconds):
                reader, writer = await asyncio.open_connection(url.host, port, ssl=self._tls if secure else None)
        except TimeoutError as error:
            raise httpx.ConnectTimeout(f"no connection within {seconds:g} seconds") from error
        except OSError as error:  # also what is wrong with a certificate
            raise httpx.ConnectError(str(error) or type(error).__name__) from error
        return _Connection(reader, writer)


class _Connection:
    """One connection: one request at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._http = h11.Connection(h11.CLIENT)

    @property
    def gone(self) -> bool:
        """Whether the server has closed it."""
        return self._reader.at_eof() or self._writer.is_closing()

    @property
    def reusable(self) -> bool:
        """Whether another request can be sent."""
        return self._http.our_state is h11.IDLE

    def close(self) -> None:
        with suppress(OSError, RuntimeError):  # the loop may have ended before
            self._writer.close()

    async def exchange(self, request: httpx.Request) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
        """Send a request; return status, headers and body of the answer."""
        http, writer = self._http, self._writer
        head = h11.Request(method=request.method, target=request.url.raw_path, headers=request.headers.raw)
        data = [http.send(head), http.send(h11.Data(data=request.content)), http.send(h11.EndOfMessage())]
        writer.write(b"".join(one for one in data if one))
        await writer.drain()
        answer: h11.Response | None = None
        body: list[bytes] = []
        while True:
            event = http.next_event()
            if event is h11.NEED_DATA:
                http.receive_data(await self._reader.read(_READ))
            elif isinstance(event, h11.Response):
                answer = event
            elif isinstance(event, h11.Data):
                body.append(bytes(event.data))
            elif isinstance(event, h11.EndOfMessage):
                break
            elif not isinstance(event, h11.InformationalResponse):
                raise ConnectionError("the server closed the connection")
        if answer is None:
            raise ConnectionError("the server sent no answer")
        if http.our_state is h11.DONE and http.their_state is h11.DONE:
            http.start_next_cycle()
        return answer.status_code, answer.headers.raw_items(), b"".join(body)
