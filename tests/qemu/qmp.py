"""QMP over a connected socket: the tests' own client, so that they don't lean on the code that they test."""

import contextlib
import itertools
import json
from collections.abc import Iterator
from typing import Any

import trio


class QmpError(Exception):
    """QEMU refused a command; the text is the command and QEMU's description."""


class Qmp:
    """One QMP session on `stream`; `greet` comes first. One task at a time may use it."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.events: list[dict[str, Any]] = []
        """Events that no `wait_event` has taken yet, oldest first."""
        self._stream = stream
        self._received = b""
        self._ids = itertools.count()

    async def greet(self) -> None:
        """Read QEMU's greeting and leave negotiation mode."""
        await self._message()
        await self.execute("qmp_capabilities")

    async def execute(self, command: str, **arguments: Any) -> Any:
        """Run `command` and return its result; `_` in the arguments' names stands for `-`."""
        number = next(self._ids)
        request = {
            "execute": command,
            "arguments": {name.replace("_", "-"): value for name, value in arguments.items()},
            "id": number,
        }
        with _gone_is_eof():
            await self._stream.send_all(json.dumps(request).encode() + b"\n")
        while True:
            message = await self._message()
            if "event" in message:
                self.events.append(message)
            elif message.get("id") == number:  # others answer a command whose caller was cancelled
                break
        if "error" in message:
            raise QmpError(f"{command}: {message['error']['desc']}")
        return message["return"]

    async def wait_event(self, name: str) -> dict[str, Any]:
        """Take and return the data of the oldest event `name`, waiting for it if there is none."""
        data: dict[str, Any] = (await self._take_event(name)).get("data", {})
        return data

    async def wait_event_time(self, name: str) -> float:
        """The same, but return when it came, in seconds."""
        at = (await self._take_event(name))["timestamp"]
        return float(at["seconds"] + at["microseconds"] / 1e6)

    async def _take_event(self, name: str) -> dict[str, Any]:
        while True:
            for index, event in enumerate(self.events):
                if event["event"] == name:
                    return self.events.pop(index)
            message = await self._message()
            if "event" in message:
                self.events.append(message)

    def forget_events(self, name: str) -> None:
        """Drop the events `name` that came before the last reply and that nobody took."""
        self.events = [event for event in self.events if event["event"] != name]

    async def _message(self) -> dict[str, Any]:
        while b"\n" not in self._received:
            with _gone_is_eof():
                data = await self._stream.receive_some()
            if not data:
                raise EOFError("QEMU closed its QMP socket")
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message


@contextlib.contextmanager
def _gone_is_eof() -> Iterator[None]:
    try:
        yield
    except trio.BrokenResourceError as error:
        raise EOFError("QEMU closed its QMP socket") from error
