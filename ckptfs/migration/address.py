"""Where a migration goes to or comes from: strings and JSON are parsed here, once, into typed addresses.

A URI as in QEMU's monitor (``file:/ckpt/vm1,offset=4k``) and QAPI's MigrationChannel list become the same
MigrateAddress, a union by transport. Only ``file`` and ``fd`` can be carried out; the others are understood,
so that they can be refused by name. Beside them there are objects of a store (``s3://BUCKET/KEY``), which QEMU does
not know. Rules and error texts: migration/migration.c, migration/file.c and
qapi/migration.json of QEMU 10.0.
"""

import json
import re
from dataclasses import dataclass
from errno import ENOENT
from typing import TypeVar, cast

from ckptfs.errors import CommandError
from ckptfs.migration.size import SIZE_MAX, parse_size

FILE_OFFSET_MAX = (1 << 63) - 1

_FDSET = "/dev/fdset/"
_LIBVIRT = "libvirt:"
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(:[0-9]+)?|\[[0-9A-Fa-f:.]+\](:[0-9]+)?")
_SOCKET_TYPES = {"tcp": "inet", "unix": "unix", "vsock": "vsock"}


@dataclass(frozen=True)
class FileMigrationArgs:
    """A file and the byte in it where the stream starts; both directions use it.

    Raises CommandError for a name that no file can have, and an offset that no file can reach.
    """

    filename: str
    offset: int = 0

    def __post_init__(self) -> None:
        if not self.filename:
            raise CommandError("the file name is empty", ENOENT)
        if not _encodable(self.filename) or "\0" in self.filename:
            raise CommandError(f"file name {self.filename!r} holds a character that no file name can have")
        if not 0 <= self.offset <= FILE_OFFSET_MAX:
            raise CommandError(f"offset {self.offset} of {self.filename!r} is outside of any file")
        if self.filename.startswith(_FDSET) and self.fdset_id is None:
            raise CommandError(f"Could not parse fdset {self.filename}")

    @property
    def fdset_id(self) -> int | None:
        """N of ``/dev/fdset/N``: descriptors handed in from outside stand for the file. None for a path."""
        match = re.fullmatch(rf"{_FDSET} *\+?0*([0-9]{{1,10}})", self.filename)
        return int(match[1]) if match and int(match[1]) < 1 << 31 else None


@dataclass(frozen=True)
class FdAddress:
    """``fd:NAME``: an inherited descriptor, by its number or by the name it was handed in under."""

    name: str


@dataclass(frozen=True)
class ObjectAddress:
    """``s3://BUCKET/KEY``, ``gs://``, ``az://CONTAINER/KEY``, or ``https://HOST/PATH``: an object of a store.

    Raises CommandError for one that names no object, or has a secret in it: everybody sees what is mounted.
    """

    url: str

    def __post_init__(self) -> None:
        scheme, _, rest = self.url.partition("://")
        self._refuse_secrets(rest)
        if not self.bucket or not self.key or self.key.endswith("/"):
            form = "//HOST/PATH" if scheme in WEB else "//BUCKET/KEY"
            raise CommandError(f"{self.url}: names no object: expected {scheme}:{form}")
        if not _HOST.fullmatch(self.bucket):
            raise CommandError(f"{self.url}: no bucket has that name, and no host")
        if any(part in ("", ".", "..") for part in self.key.split("/")):
            raise CommandError(f"{self.url}: a part of its path is empty, '.' or '..'")
        if not self.url.isprintable():
            raise CommandError(f"{self.url!r}: holds a character that no name of an object can have")

    def _refuse_secrets(self, rest: str) -> None:
        if "@" in self.bucket or (self.scheme in WEB and ("?" in rest or "#" in rest)):
            raise CommandError(
                f"{self.scheme}://...: a URL with a user, a password or a query may hold a secret, and everybody "
                "sees what is mounted: give one without"
            )

    @property
    def scheme(self) -> str:
        """``s3``, ``gs``, ``az``, ``https`` or ``http``."""
        return self.url.partition("://")[0]

    @property
    def bucket(self) -> str:
        """The bucket or container; the host, with its port, of an ``https``."""
        return self.url.partition("://")[2].partition("/")[0]

    @property
    def key(self) -> str:
        """The object's name in it, without a ``/`` in front."""
        return self.url.partition("://")[2].partition("/")[2]

    def beside(self, suffix: str) -> "ObjectAddress":
        """The object whose name has ``suffix`` behind this one's."""
        return ObjectAddress(self.url + suffix)


WEB = ("https", "http")
"""The schemes of web servers, which are for reading alone."""


@dataclass(frozen=True)
class SocketAddress:
    """``tcp:``, ``unix:`` or ``vsock:``; ``type`` is QAPI's: inet, unix, vsock."""

    type: str
    address: str


@dataclass(frozen=True)
class ExecAddress:
    """``exec:COMMAND``; ``args`` is what would be run."""

    args: tuple[str, ...]


@dataclass(frozen=True)
class RdmaAddress:
    """``rdma:HOST:PORT``."""

    address: str


MigrateAddress = FileMigrationArgs | FdAddress | ObjectAddress | SocketAddress | ExecAddress | RdmaAddress
SeekableAddress = FileMigrationArgs | FdAddress | ObjectAddress


@dataclass(frozen=True)
class QMPSocket:
    """A QMP socket of QEMU's own: ``-qmp unix:PATH``."""

    path: str

    def __str__(self) -> str:
        return self.path


@dataclass(frozen=True)
class LibvirtDomain:
    """A domain, by what `virsh list` calls it or its UUID, whose monitor libvirt has; ``uri`` None: its default."""

    name: str
    uri: str | None = None

    def __str__(self) -> str:
        return f"{_LIBVIRT}{self.name}"


MonitorAddress = QMPSocket | LibvirtDomain


def parse_monitor(text: str, uri: str | None = None) -> MonitorAddress:
    """``SOCKET`` or ``libvirt:NAME``: where a machine's monitor is; ``uri`` is that of libvirt.

    Raises CommandError for an empty name. A socket whose path begins like that needs ``./``.
    """
    if not text.startswith(_LIBVIRT):
        return QMPSocket(text)
    name = text.removeprefix(_LIBVIRT)
    if not name or name.startswith("/"):
        raise CommandError(f"{text!r}: expects a domain's name or UUID, as in libvirt:vm1; URIs go to libvirt_uri=")
    return LibvirtDomain(name, uri)


def seekable_file(address: MigrateAddress) -> SeekableAddress:
    """The address if pages can be put at their place in it, as mapped-ram needs.

    Raises CommandError naming the transport otherwise.
    """
    match address:
        case FileMigrationArgs() | FdAddress() | ObjectAddress():
            return address
        case SocketAddress():
            transport = "socket"
        case ExecAddress():
            transport = "exec"
        case RdmaAddress():
            transport = "rdma"
    raise CommandError(
        f"transport '{transport}' is not supported: a checkpoint needs a seekable file (file: or fd:)"
    )


def parse_uri(uri: str) -> MigrateAddress:
    """``file:PATH[,offset=SIZE]`` and QEMU's other URIs (migrate_uri_parse, file_parse_offset).

    The first ``,offset=`` splits; nothing is escaped. Raises CommandError in QEMU's words.
    """
    hint = f" (did you mean file:{uri}?)" if uri.startswith(("/", "./", "../")) else ""
    return _parse_uri(uri, hint)


def parse_target(text: str) -> MigrateAddress:
    """A URI, or a plain path: what is mounted, or saved to. A relative path with a colon needs ``./``."""
    if not _SCHEME.match(text):
        return FileMigrationArgs(text)
    return _parse_uri(text, f" (if it is the name of a file, write ./{text})")


def _parse_uri(uri: str, hint: str) -> MigrateAddress:
    """``hint`` is what to say of a scheme that does not exist."""
    scheme, colon, rest = uri.partition(":")
    match scheme if colon else "":
        case "file":
            path, comma, size = rest.partition(",offset=")
            return FileMigrationArgs(path, _parse_offset(size) if comma else 0)
        case "fd":
            if not rest:
                raise CommandError("invalid file descriptor address")
            return FdAddress(rest)
        case "s3" | "gs" | "az" | "https" | "http" if rest.startswith("//"):
            return ObjectAddress(uri)
        case "tcp" | "unix" | "vsock":
            return SocketAddress(_SOCKET_TYPES[scheme], rest)
        case "exec":
            return ExecAddress(("/bin/sh", "-c", rest))
        case "rdma":
            return RdmaAddress(rest)
    raise CommandError(f"unknown migration protocol: {uri}{hint}")


def parse_migrate_json(text: str) -> MigrateAddress:
    """The address in a JSON text, in any form QEMU takes it in.

    These are ``{"execute": "migrate", "arguments": {...}}``, the arguments object alone (uri xor channels), and
    ``-incoming``'s single channel object. Raises CommandError, with QEMU's words where it has any.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique_members)
    except (ValueError, RecursionError) as error:
        raise CommandError(f"JSON parse error: {error}") from None
    if not isinstance(value, dict):
        raise CommandError("QMP input must be a JSON object")
    if "execute" in value:
        value = _command_arguments(value)
    if "channel-type" in value:
        return parse_channels({"channels": [value]})
    return parse_channels(value)


def parse_channels(arguments: dict[str, object]) -> MigrateAddress:
    """The arguments of QMP ``migrate`` or ``migrate-incoming``, as parsed JSON.

    ``detach`` and ``exit-on-error`` are taken and do nothing here, as QAPI says of the first.
    """
    members = _Members(arguments)
    uri = members.optional(str, "uri")
    channels = members.optional(list, "channels")
    members.optional(bool, "detach")
    members.optional(bool, "exit-on-error")
    if members.optional(bool, "resume"):
        raise CommandError("Cannot resume if there is no paused migration")
    addresses = [_channel(_Members(channel, f"channels[{i}]")) for i, channel in enumerate(channels or [])]
    members.nothing_left()
    if (uri is None) == (not addresses):
        raise CommandError("need either 'uri' or 'channels' argument")
    if uri is not None:
        return parse_uri(uri)
    if len(addresses) > 1:
        raise CommandError("Channel list has more than one main entry")
    return addresses[0]


def _command_arguments(command: dict[str, object]) -> dict[str, object]:
    members = _Members(command)
    name = members.required(str, "execute")
    if name not in ("migrate", "migrate-incoming"):
        raise CommandError(f"QMP command '{name}' is not 'migrate' or 'migrate-incoming'")
    arguments = members.optional(dict, "arguments")
    members.optional(object, "id")
    members.nothing_left()
    return arguments or {}


def _channel(members: "_Members") -> MigrateAddress:
    channel_type = members.required(str, "channel-type")
    if channel_type != "main":
        raise CommandError(f"Parameter 'channel-type' does not accept value '{channel_type}'")
    address = _address(_Members(members.required(object, "addr"), members.path("addr")))
    members.nothing_left()
    return address


def _address(members: "_Members") -> MigrateAddress:
    match members.required(str, "transport"):
        case "file":
            filename, offset = members.required(str, "filename"), members.required(int, "offset")
            members.nothing_left()
            return FileMigrationArgs(filename, offset)
        case "socket":
            return _socket_address(members)
        case "exec":
            args = members.required(list, "args")
            return ExecAddress(tuple(str(arg) for arg in args))
        case "rdma":
            return RdmaAddress(f"{members.required(str, 'host')}:{members.required(str, 'port')}")
        case transport:
            raise CommandError(f"Parameter 'transport' does not accept value '{transport}'")


def _socket_address(members: "_Members") -> MigrateAddress:
    """Optional members are not looked at: only type fd is ever carried out, and it has none."""
    match members.required(str, "type"):
        case "fd":
            name = members.required(str, "str")
            members.nothing_left()
            return FdAddress(name)
        case "inet":
            return SocketAddress("inet", f"{members.required(str, 'host')}:{members.required(str, 'port')}")
        case "unix":
            return SocketAddress("unix", members.required(str, "path"))
        case "vsock":
            return SocketAddress("vsock", f"{members.required(str, 'cid')}:{members.required(str, 'port')}")
        case type_:
            raise CommandError(f"Parameter 'type' does not accept value '{type_}'")


T = TypeVar("T")
_JSON_NAMES: dict[type, str] = {str: "string", bool: "boolean", list: "array", dict: "object"}


class _Members:
    """The members of a JSON object, taken one by one, with the errors of QEMU's input visitor."""

    def __init__(self, value: object, path: str = "") -> None:
        if not isinstance(value, dict):
            raise CommandError(f"Invalid parameter type for '{path}', expected: object")
        self._left = dict(value)
        self._path = path

    def path(self, name: str) -> str:
        return f"{self._path}.{name}" if self._path else name

    def required(self, kind: type[T], name: str) -> T:
        if name not in self._left:
            raise CommandError(f"Parameter '{self.path(name)}' is missing")
        return self._typed(kind, name)

    def optional(self, kind: type[T], name: str) -> T | None:
        return self._typed(kind, name) if name in self._left else None

    def nothing_left(self) -> None:
        for name in self._left:
            raise CommandError(f"Parameter '{self.path(name)}' is unexpected")

    def _typed(self, kind: type[T], name: str) -> T:
        value = self._left.pop(name)
        if kind is int:
            # QEMU wraps a negative number around; no file has that offset.
            if type(value) is not int or not 0 <= value <= SIZE_MAX:
                raise CommandError(f"Parameter '{self.path(name)}' expects uint64")
        elif not isinstance(value, kind):
            raise CommandError(f"Invalid parameter type for '{self.path(name)}', expected: {_JSON_NAMES[kind]}")
        return cast(T, value)


def _unique_members(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("duplicate key")
    return members


def _parse_offset(text: str) -> int:
    try:
        return parse_size(text)
    except CommandError as error:
        raise CommandError(f"file URI has bad offset {text}: {error}") from None


def _encodable(name: str) -> bool:
    try:
        name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True
