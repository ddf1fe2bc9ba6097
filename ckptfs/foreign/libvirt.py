"""libvirt's save images: a header and a domain's XML before a migration stream (src/qemu/qemu_saveimage.h, 11.3).

`virsh save`, managedsave and memory snapshots write them. All numbers are in the host's byte order::

    magic[16] version data_len was_running format cookieOffset unused[14]    92 bytes
    XML NUL [cookie NUL] padding                                             data_len bytes
    stream

``format`` says how the stream is packed, but a memory snapshot says sparse of a plain stream (11.3): what is there
counts. ``was_running`` counts too, as libvirt stops the guest first, and the stream says paused.

In a checkpoint of another kind the domain is an entry of the trailer, so that it can become a save image again.
"""

import json
import struct
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal
from xml.etree import ElementTree

from ckptfs.errors import CheckpointError
from ckptfs.mapped_ram.stream import MAGIC as STREAM_MAGIC
from ckptfs.mapped_ram.stream import Source
from ckptfs.mapped_ram.trailer import Depends, Entry, Trailer

MAGIC = b"LibvirtQemudSave"
HEADER_LENGTH = 92
MAX_DATA_LENGTH = 64 << 20

NAMESPACE = "urn:ckptfs"
"""Of the element ``mount`` in a domain's metadata: its ``path`` is where the domain's RAM is."""
_QEMU_NAMESPACE = "http://libvirt.org/schemas/domain/qemu/1.0"

RAW, SPARSE = 0, 6
FORMATS = ("raw", "gzip", "bzip2", "xz", "lzop", "zstd", "sparse")
"""By the number in the header."""
_UNPACKERS = {"gzip": "gzip -dc", "bzip2": "bzip2 -dc", "xz": "xz -dc", "lzop": "lzop -dc", "zstd": "zstd -dc"}

_VERSION = 2
_PADDING = 64 << 10
"""Room that libvirt leaves for another XML (virsh save-image-edit)."""


ElementTree.register_namespace("ckptfs", NAMESPACE)
ElementTree.register_namespace("qemu", _QEMU_NAMESPACE)


@dataclass(frozen=True)
class Domain:
    """A machine as libvirt knows it: its XML, and the cookie with what the XML does not say, if there is one."""

    ENTRY = "libvirt-domain"

    xml: str
    cookie: str | None = None

    @property
    def name(self) -> str | None:
        """What `virsh list` calls it; None if the XML can't be read."""
        root = self._tree()
        return None if root is None else root.findtext("name")

    def _tree(self) -> ElementTree.Element | None:
        try:
            return ElementTree.fromstring(self.xml)
        except ElementTree.ParseError:
            return None

    @classmethod
    def of(cls, trailer: Trailer) -> "Domain | None":
        """The one that a trailer remembers; None if it does not, or not in a way that is understood."""
        payload = trailer.get(cls.ENTRY)
        if payload is None:
            return None
        try:
            told = json.loads(payload)
            xml, cookie = told["xml"], told["cookie"]
        except (ValueError, RecursionError, KeyError, TypeError):
            return None
        if not isinstance(xml, str) or not isinstance(cookie, str | None) or "\0" in xml + (cookie or ""):
            return None
        return cls(xml, cookie)

    def entry(self) -> Entry:
        """The entry that remembers it; it is the same machine whatever happens to its memory."""
        payload = json.dumps({"xml": self.xml, "cookie": self.cookie}).encode("ascii")
        return Entry(self.ENTRY, payload, Depends.NOTHING)

    def settled(self) -> "Domain":
        """The same without an -incoming of its own: libvirt gives one to whatever it restores."""
        root = self._tree()
        if root is None or "-incoming" not in self.xml:
            return self
        for commandline in root.iter(f"{{{_QEMU_NAMESPACE}}}commandline"):
            words = list(commandline)
            for word, value in pairwise(words):
                if word.get("value") == "-incoming":
                    commandline.remove(word)
                    commandline.remove(value)
        return Domain(ElementTree.tostring(root, "unicode"), self.cookie)

    def on_mount(self, directory: str) -> "Domain":
        """The same with its RAM in shared files, which libvirt's hook has lie on the mount at ``directory``."""
        root = self._tree()
        if root is None:
            return self
        backing = _child(root, "memoryBacking")
        _child(backing, "source").attrib = {"type": "file"}
        _child(backing, "access").attrib = {"mode": "shared"}
        _child(_child(root, "metadata"), f"{{{NAMESPACE}}}mount").attrib = {"path": directory}
        return Domain(ElementTree.tostring(root, "unicode"), self.cookie)

    @property
    def data(self) -> bytes:
        """What comes between header and stream."""
        texts = [self.xml] if self.cookie is None else [self.xml, self.cookie]
        return b"".join(_encoded(text) for text in texts) + bytes(_PADDING)

    def head(self, *, was_running: bool, mapped_ram: bool) -> bytes:
        """What comes before the stream, in little-endian; its length depends on the domain alone."""
        data = self.data
        cookie_offset = 0 if self.cookie is None else len(_encoded(self.xml))
        number = SPARSE if mapped_ram else RAW
        return _packed("<", len(data), int(was_running), number, cookie_offset) + data


@dataclass(frozen=True)
class SaveImage:
    """What comes before the stream: ``kind`` is one of `FORMATS`, as the header has it."""

    domain: Domain
    was_running: bool
    kind: str
    stream_offset: int

    @property
    def run_state(self) -> Literal["running", "paused"]:
        """How the guest is to go on."""
        return "running" if self.was_running else "paused"


def read_save_image(source: Source, file_offset: int = 0) -> SaveImage | None:
    """What a file has before its stream, if that is libvirt's; None if it is not.

    Raises CheckpointError for a header that lies, and for a packed stream, with the command that unpacks it.
    """
    head = source.pread(file_offset, HEADER_LENGTH) if file_offset < source.length else b""
    if not head.startswith(MAGIC):
        return None
    order = min("<>", key=lambda order: struct.unpack_from(f"{order}I", head.ljust(20, b"\0"), len(MAGIC)))
    version, length, was_running, number, cookie_offset = struct.unpack_from(
        f"{order}5I", head.ljust(HEADER_LENGTH, b"\0"), len(MAGIC)
    )
    if version != _VERSION:
        raise CheckpointError(f"a save image of libvirt of version {version}, not {_VERSION}", file_offset)
    data = source.pread(file_offset + HEADER_LENGTH, length) if length <= MAX_DATA_LENGTH else b""
    if len(data) < length or not length:
        raise CheckpointError(f"a save image of libvirt with {length} bytes of XML: it was cut short", file_offset)
    cookie = _text(data[cookie_offset:]) if 0 < cookie_offset < length else None
    image = SaveImage(
        Domain(_text(data), cookie),
        bool(was_running),
        FORMATS[number] if number < len(FORMATS) else f"number {number}",
        file_offset + HEADER_LENGTH + length,
    )
    if source.pread(image.stream_offset, 4) != STREAM_MAGIC.to_bytes(4):
        raise CheckpointError(f"Not a migration stream: this is {_what(image)}", image.stream_offset)
    return image


def _what(image: SaveImage) -> str:
    if image.kind in ("raw", "sparse"):
        return f"a save image of libvirt ({image.kind}) that holds something else"
    unpacker, offset = _UNPACKERS.get(image.kind), image.stream_offset
    if unpacker is None:
        return f"a save image of libvirt, packed in a way that is not known here ({image.kind})"
    return (
        f"a save image of libvirt, packed ({image.kind}): unpack what is behind its header, as in "
        f"`(head -c {offset} FILE; tail -c +{offset + 1} FILE | {unpacker}) >UNPACKED`"
    )


def _child(parent: ElementTree.Element, name: str) -> ElementTree.Element:
    found = parent.find(name)
    return ElementTree.SubElement(parent, name) if found is None else found


def _packed(order: str, *fields: int) -> bytes:
    return struct.pack(f"{order}16s5I56x", MAGIC, _VERSION, *fields)


def _text(data: bytes) -> str:
    return data.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape") + b"\0"
