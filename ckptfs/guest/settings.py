"""What migrations go by: parameters and capabilities as in QEMU, and what was handed in at the mount."""

from dataclasses import replace
from uuid import UUID

from ckptfs.channels.backing_file import DirectIO
from ckptfs.channels.descriptors import Descriptors
from ckptfs.guest.base import BaseOptions
from ckptfs.migration.address import LibvirtDomain, MonitorAddress
from ckptfs.migration.capabilities import MigrationCapabilities
from ckptfs.migration.capture import CaptureOptions
from ckptfs.migration.parameters import MigrationParameters, ParameterValue
from ckptfs.migration.store import StoreOptions


class Settings:
    """The settings of one guest; parameters and capabilities may change, the rest is fixed.

    ``uuid`` is what capability validate-uuid compares a checkpoint's with, and writes where the source has none;
    ``shared`` the files of RAM that checkpoints may leave out, by idstr; ``capture`` how a machine is captured
    whose RAM is its own; ``verify`` whether checksums are looked at; ``store`` how objects are reached and kept.
    """

    def __init__(
        self,
        parameters: MigrationParameters | None = None,
        capabilities: MigrationCapabilities | None = None,
        descriptors: Descriptors | None = None,
        uuid: UUID | None = None,
        shared: dict[str, str] | None = None,
        capture: CaptureOptions | None = None,
        *,
        verify: bool = False,
        libvirt_uri: str | None = None,
        store: StoreOptions | None = None,
    ) -> None:
        self._parameters = parameters or MigrationParameters()
        self._capabilities = capabilities or MigrationCapabilities()
        self._shared = shared or {}
        self.descriptors = descriptors or Descriptors()
        self.uuid = uuid
        self.capture = capture or CaptureOptions()
        self.verify = verify
        self._libvirt_uri = libvirt_uri
        self.store = store or StoreOptions()

    def located(self, address: MonitorAddress) -> MonitorAddress:
        """The same; of a domain, with the libvirt that it is to be looked for at."""
        return replace(address, uri=self._libvirt_uri) if isinstance(address, LibvirtDomain) else address

    @property
    def parameters(self) -> MigrationParameters:
        """As they are now; those of a running save may change too (max-bandwidth)."""
        return self._parameters

    @property
    def capabilities(self) -> MigrationCapabilities:
        """As they are now."""
        return self._capabilities

    def set_parameter(self, name: str, value: ParameterValue, *, running: bool = False) -> None:
        """Set one parameter, which not all may be while a migration is ``running``: StateError."""
        self._parameters = self._parameters.set(name, value, running=running)

    def set_capability(self, name: str, state: bool, *, running: bool = False) -> None:
        """Switch one capability, which none may be while a migration is ``running``: StateError."""
        self._capabilities = self._capabilities.set(name, state, running=running)

    def base_options(self) -> BaseOptions:
        """How a checkpoint is read."""
        uuid = self.uuid if self.capabilities.validate_uuid else None
        return BaseOptions(
            self.direct_io(), self.parameters.multifd_channels, self._shared, uuid=uuid, verify=self.verify
        )

    def direct_io(self) -> DirectIO:
        """As QEMU: without multifd it has no effect, so that it can't be required either."""
        return DirectIO(self.parameters.direct_io, self.parameters.direct_io_required and self.capabilities.multifd)
