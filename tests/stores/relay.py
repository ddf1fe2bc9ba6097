"""Between ckptfs and a store: counts what is asked for, and lets things go wrong on the way."""

import contextlib
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass

_REQUEST = re.compile(rb"(GET|HEAD|PUT|POST|DELETE) (\S+) HTTP/1\.1\r\n(.*?)\r\n\r\n", re.DOTALL)


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: str


class Relay:
    """Passes connections on to the server at `port`; `url` is its own. One request at a time has a connection."""

    def __init__(self, port: int, address: str = "127.0.0.1") -> None:
        self._port = port
        self._listener = socket.create_server((address, 0))
        self.url = f"http://{address}:{self._listener.getsockname()[1]}"
        self.requests: list[Request] = []
        self.meddle: Callable[[Request], bytes | None] = lambda request: None
        """What is answered to a request in the server's place, b"" for nothing at all; None: it decides."""
        threading.Thread(target=self._accept, daemon=True).start()

    def count(self, method: str, part: str = "") -> int:
        return sum(request.method == method and part in request.path for request in self.requests)

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        try:
            server = socket.create_connection(("127.0.0.1", self._port))
        except OSError:
            client.close()
            return
        threading.Thread(target=_pump, args=(server, client), daemon=True).start()
        with client, server:
            while data := _receive(client):
                match = _REQUEST.match(data)
                if match is not None:
                    request = Request(match[1].decode(), match[2].decode(), match[3].decode())
                    self.requests.append(request)
                    answer = self.meddle(request)
                    if answer is not None:
                        with contextlib.suppress(OSError):
                            client.sendall(answer)
                        return
                try:
                    server.sendall(data)
                except OSError:
                    return


def _pump(source: socket.socket, target: socket.socket) -> None:
    while data := _receive(source):
        try:
            target.sendall(data)
        except OSError:
            return
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_RDWR)


def _receive(source: socket.socket) -> bytes:
    try:
        return source.recv(1 << 18)
    except OSError:
        return b""
