"""Connecting to a machine's monitor, wherever it is."""

from contextlib import AbstractAsyncContextManager

from ckptfs.channels.identity import Identity
from ckptfs.migration.address import LibvirtDomain, MonitorAddress
from ckptfs.qemu import monitor


def connected_to(address: MonitorAddress, identity: Identity) -> AbstractAsyncContextManager[monitor.Monitor]:
    """A connection as ``identity`` may have it; raises QemuError if no QEMU answers there."""
    if isinstance(address, LibvirtDomain):
        from ckptfs.qemu import libvirt  # needs an extra of the package

        return libvirt.connected(address, identity)
    return monitor.connected(address.path, identity)
