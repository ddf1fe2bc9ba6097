"""QEMU's migration capabilities: names, order, refused combinations (migrate_caps_check, 10.0).

`MigrationCapabilities` is the registry and a set of states at the same time. mapped-ram and multifd are on from
the start, as that is what a checkpoint is written with, and events: whoever opens that file wants them. QEMU's
own rules come first, in its order and words; then what cannot be carried out here is refused with the reason.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Any

from ckptfs.errors import CommandError, StateError, likely


@dataclass(frozen=True)
class Capability:
    """What is known of one capability: what it means, or why it has no meaning here.

    ``no_effect``: why it may be on and does nothing here. ``unsupported``: why it cannot be on.
    """

    name: str
    default: bool
    meaning: str = ""
    no_effect: str = ""
    unsupported: str = ""

    @property
    def field_name(self) -> str:
        """The name as an attribute."""
        return self.name.replace("-", "_")


def _capability(name: str, default: bool = False, **known: str) -> Any:
    return field(default=default, metadata={"capability": Capability(name, default, **known)})


_NO_SOCKET = "it is for sockets, a checkpoint is a file"
_ALWAYS_LAZY = "pages are always restored as they are read"
_NO_DISKS = "disks are not part of a checkpoint"


@dataclass(frozen=True)
class MigrationCapabilities:
    """On or off for each capability, in the order of ``info migrate_capabilities``; immutable."""

    xbzrle: bool = _capability("xbzrle", unsupported=_NO_SOCKET)
    rdma_pin_all: bool = _capability("rdma-pin-all", no_effect="there is no RDMA here")
    auto_converge: bool = _capability("auto-converge", no_effect="a save always converges")
    zero_blocks: bool = _capability("zero-blocks", no_effect=_NO_DISKS)
    events: bool = _capability("events", default=True, meaning="Tell of migrations in the file `events`.")
    postcopy_ram: bool = _capability("postcopy-ram", unsupported=_ALWAYS_LAZY)
    x_colo: bool = _capability("x-colo", unsupported="COLO needs a second machine")
    release_ram: bool = _capability("release-ram", no_effect="the guest goes on using its RAM after a save")
    return_path: bool = _capability("return-path", no_effect="a file does not answer")
    pause_before_switchover: bool = _capability(
        "pause-before-switchover", unsupported="there is no switchover: the guest stays where it is"
    )
    multifd: bool = _capability(
        "multifd",
        default=True,
        meaning="Write with several channels (parameter `multifd-channels`), and with O_DIRECT.",
    )
    dirty_bitmaps: bool = _capability("dirty-bitmaps", unsupported=_NO_DISKS)
    postcopy_blocktime: bool = _capability("postcopy-blocktime", no_effect="status reports waiting readers")
    late_block_activate: bool = _capability("late-block-activate", no_effect=_NO_DISKS)
    x_ignore_shared: bool = _capability(
        "x-ignore-shared",
        meaning="Leave out of a checkpoint the RAM that its base leaves out as well: it is in a file of its own"
        " (mount option `shared`).",
    )
    validate_uuid: bool = _capability(
        "validate-uuid",
        meaning="Keep the guest's UUID in the checkpoint, and refuse one with another UUID (mount option `uuid`).",
    )
    background_snapshot: bool = _capability(
        "background-snapshot",
        unsupported="it writes no bitmaps with mapped-ram, and a guest runs on during every save anyway",
    )
    zero_copy_send: bool = _capability("zero-copy-send", unsupported=_NO_SOCKET)
    postcopy_preempt: bool = _capability("postcopy-preempt", unsupported=_ALWAYS_LAZY)
    switchover_ack: bool = _capability("switchover-ack", unsupported="a file does not answer")
    dirty_limit: bool = _capability("dirty-limit", unsupported="it needs KVM's dirty ring")
    mapped_ram: bool = _capability(
        "mapped-ram",
        default=True,
        meaning="Give each page its place in the file. Off: a save writes a plain migration stream, which is read"
        " from its beginning to its end.",
    )

    def get(self, name: str) -> bool:
        """Whether the capability is on."""
        return bool(getattr(self, find_capability(name).field_name))

    def set(self, name: str, state: bool, *, running: bool = False) -> "MigrationCapabilities":
        """These states with one changed.

        Raises CommandError for an unknown or impossible capability or combination, and StateError while a
        migration is ``running``.
        """
        capability = find_capability(name)
        if running:
            raise StateError(f"There's a migration process in progress: {name} can be switched after it")
        changed = replace(self, **{capability.field_name: state})
        changed._check()
        if state and capability.unsupported:
            raise CommandError(f"capability '{name}' is not supported: {capability.unsupported}")
        return changed

    def check_file_transport(self) -> None:
        """Refuse what QEMU refuses of a save to ``file:``: many channels need a place for each page."""
        if self.multifd and not self.mapped_ram:
            raise CommandError(
                "Migration requires multi-channel URIs (e.g. tcp): switch multifd off, or mapped-ram on"
            )

    def info(self) -> str:
        """The text of ``info migrate_capabilities``."""
        return "".join(f"{name}: {format_state(self.get(name))}\n" for name in CAPABILITIES)

    def _check(self) -> None:
        for one, other, text in _INCOMPATIBLE:
            if self.get(one) and self.get(other):
                raise CommandError(text)
        for name, needed, text in _NEEDS:
            if self.get(name) and not self.get(needed):
                raise CommandError(text)


CAPABILITIES: dict[str, Capability] = {
    capability.name: capability
    for capability in (a_field.metadata["capability"] for a_field in fields(MigrationCapabilities))
}
"""All capabilities by name, in QEMU's order."""


def _background_snapshot_with(name: str) -> tuple[str, str, str]:
    return "background-snapshot", name, f"Background-snapshot is not compatible with {name}"


_INCOMPATIBLE = [
    ("postcopy-ram", "x-ignore-shared", "Postcopy is not compatible with ignore-shared"),
    ("postcopy-ram", "multifd", "Postcopy is not yet compatible with multifd"),
    *map(
        _background_snapshot_with,
        [
            "postcopy-ram",
            "dirty-bitmaps",
            "postcopy-blocktime",
            "late-block-activate",
            "return-path",
            "multifd",
            "pause-before-switchover",
            "auto-converge",
            "release-ram",
            "rdma-pin-all",
            "xbzrle",
            "x-colo",
            "validate-uuid",
            "zero-copy-send",
        ],
    ),
    (
        "zero-copy-send",
        "xbzrle",
        "Zero copy only available for non-compressed non-TLS multifd migration",
    ),
    (
        "dirty-limit",
        "auto-converge",
        "dirty-limit conflicts with auto-converge either of then available currently",
    ),
    ("multifd", "xbzrle", "Multifd is not compatible with xbzrle"),
    ("mapped-ram", "xbzrle", "Mapped-ram migration is incompatible with xbzrle"),
    ("mapped-ram", "postcopy-ram", "Mapped-ram migration is incompatible with postcopy"),
]
"""Capabilities that exclude each other, in the order in which QEMU looks."""

_NEEDS = [
    ("zero-copy-send", "multifd", "Zero copy only available for non-compressed non-TLS multifd migration"),
    ("postcopy-preempt", "postcopy-ram", "Postcopy preempt requires postcopy-ram"),
    ("switchover-ack", "return-path", "Capability 'switchover-ack' requires capability 'return-path'"),
]
"""Capabilities that need another one."""


def find_capability(name: str) -> Capability:
    """The capability of that name; raises CommandError, as QEMU does, and names the likely one."""
    if name not in CAPABILITIES:
        found = likely(name, CAPABILITIES)
        hint = f"did you mean {found}?" if found else "'info migrate_capabilities' lists all"
        raise CommandError(f"invalid parameter value: {name} ({hint})")
    return CAPABILITIES[name]


def parse_state(text: str) -> bool:
    """``on`` or ``off``."""
    if text not in ("on", "off"):
        raise CommandError("Expected 'on' or 'off'")
    return text == "on"


def format_state(state: bool) -> str:
    """``on`` or ``off``."""
    return "on" if state else "off"
