"""The options of a mount: ``-o a,b=c`` as mount(8), fstab and fusermount3 pass them on.

One table says what each takes and means; parameters and capabilities of migration are options too, from their own
registries. ``_`` and ``-`` are the same in a name. A comma inside a value is written ``\\,``.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from uuid import UUID

from ckptfs.errors import CommandError, likely
from ckptfs.migration.address import FILE_OFFSET_MAX, MonitorAddress, parse_monitor
from ckptfs.migration.capabilities import CAPABILITIES, MigrationCapabilities, parse_state
from ckptfs.migration.capture import CaptureOptions, Way
from ckptfs.migration.parameters import PARAMETERS, Kind, MigrationParameters
from ckptfs.migration.size import SIZE_RULE, MiB, parse_size_of
from ckptfs.migration.store import PART_SIZE_MAX, PART_SIZE_MIN, StoreOptions, parse_endpoint
from ckptfs.namespace.names import encode_name
from ckptfs.physical.memory_map import parse_entry


@dataclass
class MountOptions:
    """What a mount was asked to be. Sizes and offsets are in bytes."""

    ram: dict[str, int] = field(default_factory=dict)
    """RAM blocks of a fresh guest: used_length by idstr, in the order given."""
    read_only: bool = False
    qmp: MonitorAddress | None = None
    libvirt_uri: str | None = None
    prefetch: str = "off"
    """``off``, ``on``, or ``recorded``: what an earlier mount, or `ckptfs run --record`, has kept."""
    image_offset: int = 0
    parameters: MigrationParameters = field(default_factory=MigrationParameters)
    capabilities: MigrationCapabilities = field(default_factory=MigrationCapabilities)
    capture: Way = Way.AUTO
    capture_rounds: int = CaptureOptions.max_rounds
    backends: list[str] = field(default_factory=list)
    """Idstrs of the blocks that QEMU has as memory backends; empty: found by the default rule."""
    verify: bool = False
    """Whether what is read has to have the checksum that was saved with it."""
    views: bool = True
    map: list[str] = field(default_factory=list)
    """Where blocks are in the guest's physical memory, an entry ``ID@ADDRESS[+LENGTH][:OFFSET]`` each."""
    uuid: UUID | None = None
    """The guest's, for capability validate-uuid."""
    shared: dict[str, str] = field(default_factory=dict)
    """Path of the RAM file by the idstr of a block that the checkpoint leaves out."""
    fdset: dict[int, list[int]] = field(default_factory=dict)
    """Inherited descriptors by the id of their set."""
    fd: dict[str, int] = field(default_factory=dict)
    """Inherited descriptors by the NAME of ``fd:NAME``."""
    exclusive: bool = False
    """Whether nobody else may mount SPEC so while this mount is there."""
    store: StoreOptions = field(default_factory=StoreOptions)
    """How an object is reached and kept."""
    allow_other: bool = False
    uid: str | None = None
    gid: str | None = None
    """Owner and group of the files: a number, or a name that is still to be looked up."""
    umask: int = 0o077
    foreground: bool = False
    log: str | None = None
    """``syslog`` or the path of a file; None: standard error in the foreground, syslog in a daemon."""
    debug: bool = False


def parse_options(texts: Iterable[str], *, sloppy: bool = False) -> MountOptions:
    """The options of all ``-o`` arguments together; of an option that is given twice, the last one counts.

    Raises CommandError naming the option and the value; ``sloppy`` (mount -s) passes over unknown ones.
    """
    options = MountOptions()
    pairs = [pair for text in texts for pair in split_options(text)]
    if ("remount", None) in pairs:  # mount(8) adds what the mount has, and we need not know all of it
        raise CommandError("mount option 'remount': " + _REMOUNT)
    for name, value in pairs:
        if not _IGNORED.fullmatch(name) and not (sloppy and _setter(name) is None):
            _apply(options, name, value)
    _refuse_contradictions(options)
    return options


def split_options(text: str) -> list[tuple[str, str | None]]:
    """(name, value) for each option in ``text``; the value is None without a ``=``."""
    pairs = []
    for item in re.findall(r"(?:\\.|[^,\\]|\\$)+", text, re.DOTALL):
        plain = re.sub(r"\\([,\\])", r"\1", item)
        name, equals, value = plain.partition("=")
        pairs.append((name, value if equals else None))
    return pairs


def _apply(options: MountOptions, name: str, value: str | None) -> None:
    try:
        (_setter(name) or _refuse(name))(options, value)
    except CommandError as error:
        item = name if value is None else f"{name}={value}"
        raise CommandError(f"mount option '{item}': {error}", error.errno) from None


def _refuse_contradictions(options: MountOptions) -> None:
    if options.ram and options.read_only:
        raise CommandError("mount option 'ro': nobody could write to a new guest (ram=), or save it: leave out ro")
    if options.ram and options.shared:
        idstr, path = next(iter(options.shared.items()))
        raise CommandError(
            f"mount option 'shared={idstr}:{path}': it names RAM that a checkpoint leaves out, but a new guest"
            " (ram=) has no checkpoint: use one of the two"
        )


def _setter(name: str) -> "_Setter | None":
    key = name.replace("_", "-")
    if key in PARAMETERS:
        return _parameter(key)
    if key in CAPABILITIES:
        return _capability(key)
    return _SETTERS.get(key)


# ---- what an option takes ------------------------------------------------------------------------------

_Setter = Callable[[MountOptions, str | None], None]


def _refuse(name: str) -> _Setter:
    """A word that is no option."""

    def apply(options: MountOptions, value: str | None) -> None:
        if name == "offset":
            raise CommandError(f"mount(8) keeps it for loop devices: say image_offset={value or 'SIZE'}")
        known = [key.replace("-", "_") for key in (*_SETTERS, *PARAMETERS, *CAPABILITIES)]
        found = likely(name, known)
        raise CommandError("no such option" + (f" (did you mean {found}?)" if found else ""))

    return apply


def _parameter(name: str) -> _Setter:
    def apply(options: MountOptions, value: str | None) -> None:
        parameter = PARAMETERS[name]
        try:
            options.parameters = options.parameters.set(name, parameter.parse(_required(value)))
        except CommandError as error:
            if parameter.kind is not Kind.BANDWIDTH:
                raise
            raise CommandError(f"{error}: {SIZE_RULE}") from None  # QEMU's words alone don't say it

    return apply


def _capability(name: str) -> _Setter:
    def apply(options: MountOptions, value: str | None) -> None:
        options.capabilities = options.capabilities.set(name, parse_state(_required(value)))

    return apply


def _switch(attribute: str, state: bool = True) -> _Setter:
    """A word alone."""

    def apply(options: MountOptions, value: str | None) -> None:
        if value is not None:
            raise CommandError("takes no value")
        setattr(options, attribute, state)

    return apply


def _one(attribute: str, parse: Callable[[str], object]) -> _Setter:
    """``=VALUE``."""

    def apply(options: MountOptions, value: str | None) -> None:
        setattr(options, attribute, parse(_required(value)))

    return apply


def _of_store(attribute: str, parse: Callable[[str], object]) -> _Setter:
    """``=VALUE``, about objects."""

    def apply(options: MountOptions, value: str | None) -> None:
        setattr(options.store, attribute, parse(_required(value)))

    return apply


def _several(attribute: str) -> _Setter:
    """``=VALUE:VALUE``, and again for more."""

    def apply(options: MountOptions, value: str | None) -> None:
        getattr(options, attribute).extend(item for item in _required(value).split(":") if item)

    return apply


def _add_to_map(options: MountOptions, value: str | None) -> None:
    parse_entry(_required(value))
    options.map.append(_required(value))


def _entry(attribute: str, parse: Callable[[str], tuple[object, object]]) -> _Setter:
    """``=KEY:VALUE``, and again for more."""

    def apply(options: MountOptions, value: str | None) -> None:
        key, entry = parse(_required(value))
        entries = getattr(options, attribute)
        if key in entries:
            raise CommandError(f"'{key}' is given twice")
        entries[key] = entry

    return apply


def _required(value: str | None) -> str:
    if not value:
        raise CommandError("expects a value after '='")
    return value


def _parse_ram(text: str) -> tuple[str, int]:
    idstr, _, size = text.rpartition(":")
    if not idstr:
        raise CommandError("expects ID:SIZE, as in ram=pc.ram:1G")
    encode_name(idstr)
    used_length = _parse_file_size(size)
    if not used_length:
        raise CommandError("a block can't be empty: give it a size, as in ram=pc.ram:1G")
    return idstr, used_length


def _parse_file_size(text: str) -> int:
    size = parse_size_of("size", text)
    if size > FILE_OFFSET_MAX:
        raise CommandError(f"bad size '{text}': no file is that large")
    return size


def _parse_part_size(text: str) -> int:
    size = parse_size_of("size", text)
    if not PART_SIZE_MIN <= size <= PART_SIZE_MAX:
        raise CommandError(
            f"expects {PART_SIZE_MIN // MiB}M to {PART_SIZE_MAX // MiB}M: stores take no other parts"
        )
    return size


def _parse_uuid(text: str) -> UUID:
    if not re.fullmatch(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", text):
        raise CommandError("expects a UUID, as in uuid=550e8400-e29b-41d4-a716-446655440000")
    return UUID(text)


def _parse_shared(text: str) -> tuple[str, str]:
    idstr, _, path = text.partition(":/")  # an idstr may hold colons
    if not idstr or not path:
        raise CommandError("expects ID:PATH with an absolute path, as in shared=pc.ram:/dev/shm/vm1")
    return idstr, f"/{path}"


def _parse_fdset(text: str) -> tuple[int, list[int]]:
    set_id, *descriptors = (_parse_number(item) for item in text.split(":"))
    if not descriptors:
        raise CommandError("expects ID:FD[:FD...], as in fdset=1:5:6")
    return set_id, descriptors


def _parse_fd(text: str) -> tuple[str, int]:
    name, _, descriptor = text.rpartition(":")
    if not name:
        raise CommandError("expects NAME:FD, as in fd=checkpoint:5")
    return name, _parse_number(descriptor)


def _parse_way(text: str) -> Way:
    try:
        return Way(text)
    except ValueError:
        raise CommandError(f"expects {', '.join(Way)}") from None


def _parse_rounds(text: str) -> int:
    rounds = _parse_number(text)
    if not rounds:
        raise CommandError("expects a number, 1 or more")
    return rounds


def _parse_prefetch(text: str) -> str:
    if text not in ("on", "off", "recorded"):
        raise CommandError("expects on, off or recorded")
    return text


def _parse_number(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise CommandError(f"'{text}' is not a number")
    return int(text)


def _parse_id(text: str) -> str:
    if text.isdecimal() and (not text.isascii() or len(text) > 10 or int(text) >= (1 << 32) - 1):
        raise CommandError("expects a name, or a number below 4294967295")
    return text


def _parse_umask(text: str) -> int:
    if not re.fullmatch(r"0?[0-7]{1,3}", text):
        raise CommandError("expects an octal number up to 0777, as in umask=0027")
    return int(text, 8)


@dataclass(frozen=True)
class Option:
    """An option of the table: ``value`` is what it takes (nothing if empty), ``meaning`` is for help and manual."""

    name: str
    value: str
    meaning: str
    apply: _Setter


OPTIONS = (
    Option(
        "ram",
        "ID:SIZE",
        "Give a new guest a RAM block, as in ram=pc.ram:1G; repeat it for more. The first save creates SPEC.",
        _entry("ram", _parse_ram),
    ),
    Option("ro", "", "Read-only: nobody can write RAM or save it.", _switch("read_only")),
    Option("rw", "", "Undo ro.", _switch("read_only", False)),
    Option(
        "exclusive",
        "",
        "Take a lease on SPEC, in SPEC.lock beside it: another mount with exclusive is refused, on whatever host. A"
        " host that dies loses it after 30 s. A mount that loses it does not save to SPEC any more.",
        _switch("exclusive"),
    ),
    Option(
        "qmp",
        "SOCKET|libvirt:NAME",
        "The QMP socket, or libvirt's domain, of the QEMU that runs on this RAM. save then saves the whole machine"
        " while it runs."
        " Without ram= and without a file, its RAM may be anywhere.",
        _one("qmp", parse_monitor),
    ),
    Option(
        "libvirt_uri",
        "URI",
        "Where libvirt is, for qmp=libvirt:NAME (default: as for virsh).",
        _one("libvirt_uri", str),
    ),
    Option(
        "capture",
        "auto|snapshot|precopy",
        "How to save a machine whose RAM is not on this mount: by background-snapshot, by precopy, or (auto, the"
        " default) by the first of the two that QEMU can do.",
        _one("capture", _parse_way),
    ),
    Option(
        "capture_rounds",
        "N",
        "Pause the guest for the rest after N rounds of precopy (default: 10).",
        _one("capture_rounds", _parse_rounds),
    ),
    Option(
        "backends",
        "ID[:ID...]",
        "The RAM blocks that are QEMU's memory backends, if their names don't say so.",
        _several("backends"),
    ),
    Option(
        "verify",
        "on|off",
        "Fail with EIO when a page does not have the checksum that was saved with it (default: off).",
        _one("verify", parse_state),
    ),
    Option(
        "views", "on|off", "Show memory as debuggers open it, in views/ (default: on).", _one("views", parse_state)
    ),
    Option(
        "map",
        "ID@ADDRESS[+LENGTH][:OFFSET]",
        "Where a RAM block is in physical memory, for views/, as in map=dimm0@4G. Repeat it for more blocks.",
        _add_to_map,
    ),
    Option(
        "prefetch",
        "on|off|recorded",
        "on: restore everything in the background. recorded: first read what was recorded before (ctl: record)."
        " Default: off.",
        _one("prefetch", _parse_prefetch),
    ),
    Option(
        "image_offset",
        "SIZE",
        "Where in the file the checkpoint begins; the same as file:PATH,offset=SIZE.",
        _one("image_offset", _parse_file_size),
    ),
    Option(
        "shared",
        "ID:PATH",
        "The file with the RAM of a block that the checkpoint leaves out (x-ignore-shared). Repeat it for more"
        " blocks.",
        _entry("shared", _parse_shared),
    ),
    Option("uuid", "UUID", "The guest's UUID, for capability validate-uuid.", _one("uuid", _parse_uuid)),
    Option(
        "fdset",
        "ID:FD[:FD...]",
        "The inherited file descriptors behind file:/dev/fdset/ID.",
        _entry("fdset", _parse_fdset),
    ),
    Option("fd", "NAME:FD", "The inherited file descriptor behind fd:NAME.", _entry("fd", _parse_fd)),
    Option(
        "cache",
        "DIR",
        "Keep what is fetched of an object in DIR, for all mounts of it (default: until the mount ends).",
        _of_store("cache", str),
    ),
    Option(
        "cache_size",
        "SIZE",
        "How much DIR of cache= may hold; the oldest goes (default: no limit).",
        _of_store("cache_size", _parse_file_size),
    ),
    Option(
        "endpoint",
        "URL",
        "Where the store of s3:// is, if not at Amazon (default: AWS_ENDPOINT_URL).",
        _of_store("endpoint", parse_endpoint),
    ),
    Option("region", "NAME", "The store's region (default: AWS_REGION).", _of_store("region", str)),
    Option(
        "part_size",
        "SIZE",
        "Size of the parts in which an object is uploaded (default: 8M, or what makes it 9000 parts).",
        _of_store("part_size", _parse_part_size),
    ),
    Option(
        "allow_other",
        "",
        "Let other users in, as far as uid, gid and umask permit. Without root, this needs user_allow_other in"
        " /etc/fuse.conf.",
        _switch("allow_other"),
    ),
    Option("uid", "USER", "Owner of the files, by name or number (default: you).", _one("uid", _parse_id)),
    Option(
        "gid",
        "GROUP",
        "Group of the files, by name or number (default: yours).",
        _one("gid", _parse_id),
    ),
    Option(
        "umask", "OCTAL", "The permissions that nobody gets, in octal (default: 0077).", _one("umask", _parse_umask)
    ),
    Option(
        "log",
        "syslog|FILE",
        "Where to log (default: syslog; standard error with foreground). SIGHUP opens FILE again.",
        _one("log", str),
    ),
    Option("debug", "", "Log more.", _switch("debug")),
    Option("foreground", "", "Stay in the foreground.", _switch("foreground")),
)
"""All options of ours but those of the registries, in the order of the manual."""

_SETTERS = {option.name.replace("_", "-"): option.apply for option in OPTIONS}

_REMOUNT = (
    "a mount can't be remounted: write to its ctl, parameters/ and capabilities/ instead, or `umount` it and mount"
    " it again"
)

_IGNORED = re.compile(
    "(no)?(auto|users?|owner|group|exec|suid|dev|atime|diratime|relatime|strictatime|lazytime|mand)"
    "|nofail|a?sync|dirsync|silent|loud|defaults|_netdev|comment|[xX]-.*"
)
"""Words for mount(8), systemd and udev: every helper gets them, and drops them."""
