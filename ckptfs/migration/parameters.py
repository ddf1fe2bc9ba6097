"""QEMU's migration parameters: names, defaults, ranges, units and errors (migration/options.c, 10.0).

`MigrationParameters` is the registry and a set of values at the same time: each field says what QEMU's monitor
knows of it. Three doors lead here (ctl, ``parameters/``, mount options), and all of them bring text. The
defaults are QEMU's but for multifd-channels, direct-io and max-bandwidth: what is saved here is a file.
"""

import re
from dataclasses import Field, dataclass, field, fields, replace
from enum import Enum, StrEnum
from typing import Any

from ckptfs.errors import CommandError, StateError, likely
from ckptfs.migration.size import OUT_OF_RANGE, SIZE_MAX, MiB, parse_size

ParameterValue = int | bool | str
"""What a parameter can be: a number, a switch, a word (of an enumeration or free)."""


class Kind(Enum):
    """How a value is written, and so what QEMU says of one that is not."""

    UINT8 = "uint8_t"
    UINT32 = "uint32_t"
    UINT64 = "uint64"
    SIZE = "size"
    BANDWIDTH = "bandwidth"
    """A size that counts MiB on QEMU's monitor, bytes elsewhere."""
    BOOL = "bool"
    ENUM = "enum"
    STRING = "string"


class ZeroPageDetection(StrEnum):
    """Who looks for zero pages: nobody, the task that reads pages, or the channels that write them."""

    NONE = "none"
    LEGACY = "legacy"
    MULTIFD = "multifd"


class MultiFDCompression(StrEnum):
    """Only ``none`` can be carried out: a page in a mapped-ram file lies at its place, in its size."""

    NONE = "none"
    ZLIB = "zlib"
    ZSTD = "zstd"
    QATZIP = "qatzip"
    QPL = "qpl"
    UADK = "uadk"


class MigMode(StrEnum):
    """Only ``normal`` can be carried out."""

    NORMAL = "normal"
    CPR_REBOOT = "cpr-reboot"
    CPR_TRANSFER = "cpr-transfer"


@dataclass(frozen=True)
class Parameter:
    """What is known of one parameter: what it means, or (``no_effect``) why it does nothing here."""

    name: str
    kind: Kind
    default: ParameterValue
    meaning: str = ""
    expects: str = ""
    """What QEMU says after the name when the value is out of range."""
    minimum: int = 0
    maximum: int = SIZE_MAX
    values: type[StrEnum] | None = None
    unit: str = ""
    listed: bool = True
    """Whether QEMU's ``info migrate_parameters`` shows it."""
    while_running: bool = False
    no_effect: str = ""

    @property
    def field_name(self) -> str:
        """The name as an attribute, and as QEMU's range errors spell it."""
        return self.name.replace("-", "_")

    def parse(self, text: str, bandwidth_unit: int = 1) -> ParameterValue:
        """The value that ``text`` means; `MiB` as ``bandwidth_unit`` on ctl. Raises CommandError."""
        match self.kind:
            case Kind.BOOL:
                return self._parse_bool(text)
            case Kind.ENUM:
                assert self.values is not None
                if text not in list(self.values):
                    raise CommandError(f"Parameter '{self.name}' does not accept value '{text}'")
                return self.values(text)
            case Kind.STRING:
                return text
            case Kind.BANDWIDTH:
                return self._parse_bandwidth(text, bandwidth_unit)
            case Kind.SIZE:
                return self._checked(self._parse_size(text))
            case Kind.UINT8 | Kind.UINT32 | Kind.UINT64:
                return self._checked(self._parse_integer(text))

    def format(self, value: ParameterValue) -> str:
        """The value as a file under parameters/ holds it; `parse` takes it back."""
        if isinstance(value, bool):
            return "on" if value else "off"
        return str(value)

    def _parse_bool(self, text: str) -> bool:
        if text in ("on", "yes", "true", "y"):
            return True
        if text in ("off", "no", "false", "n"):
            return False
        raise CommandError(f"Parameter '{self.name}' expects 'on' or 'off'")

    def _parse_bandwidth(self, text: str, unit: int) -> int:
        try:
            value = parse_size(text, unit)
        except CommandError:
            value = SIZE_MAX
        if value > SIZE_MAX // 2:
            raise CommandError(f"Invalid size {text}")
        return value

    def _parse_size(self, text: str) -> int:
        try:
            return parse_size(text)
        except CommandError as error:
            if str(error) == OUT_OF_RANGE:
                raise CommandError(f"Value '{text}' is out of range for parameter '{self.name}'") from None
            raise CommandError(
                f"Parameter '{self.name}' expects a non-negative number below 2^64"
                " (optional suffix k, M, G, T, P or E)"
            ) from None

    def _parse_integer(self, text: str) -> int:
        """As strtoull with base 0 does: 0x1f, 037 and 31 are the same."""
        match = re.fullmatch(r"[ \t]*([+-]?)(?:0[xX]([0-9a-fA-F]{1,16})|(0[0-7]{0,22})|([1-9][0-9]{0,19}))", text)
        if match is None:
            raise CommandError(f"Parameter '{self.name}' expects uint64")
        value = int(match[2] or "0", 16) or int(match[3] or "0", 8) or int(match[4] or "0")
        limit = {Kind.UINT8: 255, Kind.UINT32: (1 << 32) - 1}.get(self.kind, SIZE_MAX)
        if value > limit or (match[1] == "-" and value):
            raise CommandError(f"Parameter '{self.name}' expects {self.kind.value}")
        return value

    def _checked(self, value: int) -> int:
        if not self.minimum <= value <= self.maximum:
            raise CommandError(f"Parameter '{self.field_name}' {self.expects}")
        if self.name == "xbzrle-cache-size" and value.bit_count() != 1:
            raise CommandError(f"Parameter '{self.field_name}' {self.expects}")
        return value


def _parameter(name: str, kind: Kind, default: ParameterValue, **known: Any) -> Any:
    return field(default=default, metadata={"parameter": Parameter(name, kind, default, **known)})


_NO_NETWORK = "nothing is announced on a network here"
_NO_THROTTLE = "vCPUs are never slowed down: the guest runs on while a checkpoint is written"
_NO_TLS = "a file has no TLS"
_NO_POSTCOPY = "pages are always restored as they are read"
_NO_DOWNTIME = "the pause does not depend on the size of RAM"
_NO_COLO = "COLO needs a second machine"
_NO_COMPRESSION = "pages in a mapped-ram file are not compressed"
_NO_XBZRLE = "xbzrle is for networks"
_NO_DIRTY_LIMIT = "dirty-limit needs KVM's dirty ring"
_PERCENT = "expects an integer in the range of 1 to 99"


@dataclass(frozen=True)
class MigrationParameters:
    """One value for each parameter, in the order of ``info migrate_parameters``; immutable.

    ``explicit`` names those that somebody set: direct I/O that was asked for by name must not fall back.
    """

    announce_initial: int = _parameter(
        "announce-initial",
        Kind.SIZE,
        50,
        maximum=100000,
        expects="expects a value between 0 and 100000",
        unit="ms",
        no_effect=_NO_NETWORK,
    )
    announce_max: int = _parameter(
        "announce-max",
        Kind.SIZE,
        550,
        maximum=100000,
        expects="expects a value between 0 and 100000",
        unit="ms",
        no_effect=_NO_NETWORK,
    )
    announce_rounds: int = _parameter(
        "announce-rounds",
        Kind.SIZE,
        5,
        maximum=1000,
        expects="expects a value between 0 and 1000",
        no_effect=_NO_NETWORK,
    )
    announce_step: int = _parameter(
        "announce-step",
        Kind.SIZE,
        100,
        minimum=1,
        maximum=10000,
        expects="expects a value between 0 and 10000",
        unit="ms",
        no_effect=_NO_NETWORK,
    )
    throttle_trigger_threshold: int = _parameter(
        "throttle-trigger-threshold",
        Kind.UINT8,
        50,
        minimum=1,
        maximum=100,
        expects="expects an integer in the range of 1 to 100",
        no_effect=_NO_THROTTLE,
    )
    cpu_throttle_initial: int = _parameter(
        "cpu-throttle-initial", Kind.UINT8, 20, minimum=1, maximum=99, expects=_PERCENT, no_effect=_NO_THROTTLE
    )
    cpu_throttle_increment: int = _parameter(
        "cpu-throttle-increment", Kind.UINT8, 10, minimum=1, maximum=99, expects=_PERCENT, no_effect=_NO_THROTTLE
    )
    cpu_throttle_tailslow: bool = _parameter("cpu-throttle-tailslow", Kind.BOOL, False, no_effect=_NO_THROTTLE)
    max_cpu_throttle: int = _parameter(
        "max-cpu-throttle",
        Kind.UINT8,
        99,
        minimum=1,
        maximum=99,
        expects="expects an integer in the range of cpu_throttle_initial to 99",
        no_effect=_NO_THROTTLE,
    )
    tls_creds: str = _parameter("tls-creds", Kind.STRING, "", no_effect=_NO_TLS)
    tls_hostname: str = _parameter("tls-hostname", Kind.STRING, "", no_effect=_NO_TLS)
    max_bandwidth: int = _parameter(
        "max-bandwidth",
        Kind.BANDWIDTH,
        0,
        meaning="How fast a save may write; 0: as fast as it can. A change counts at once.",
        unit="bytes/second",
        while_running=True,
    )
    avail_switchover_bandwidth: int = _parameter(
        "avail-switchover-bandwidth", Kind.BANDWIDTH, 0, unit="bytes/second", no_effect=_NO_DOWNTIME
    )
    downtime_limit: int = _parameter(
        "downtime-limit",
        Kind.SIZE,
        300,
        maximum=2000000,
        expects="expects an integer in the range of 0 to (2000 * 1000) ms",
        unit="ms",
        no_effect=_NO_DOWNTIME,
    )
    x_checkpoint_delay: int = _parameter("x-checkpoint-delay", Kind.UINT32, 20000, unit="ms", no_effect=_NO_COLO)
    multifd_channels: int = _parameter(
        "multifd-channels",
        Kind.UINT8,
        4,
        meaning="How many channels read and write at the same time. A change counts for the next save or restore.",
        minimum=1,
        maximum=255,
        expects="expects a value between 1 and 255",
        while_running=True,
    )
    multifd_compression: MultiFDCompression = _parameter(  # noqa: RUF009 a field
        "multifd-compression",
        Kind.ENUM,
        MultiFDCompression.NONE,
        meaning="Only `none`: each page has its place in the file, in its full size.",
        values=MultiFDCompression,
    )
    multifd_zlib_level: int = _parameter(
        "multifd-zlib-level",
        Kind.UINT8,
        1,
        maximum=9,
        expects="expects a value between 0 and 9",
        listed=False,
        no_effect=_NO_COMPRESSION,
    )
    multifd_zstd_level: int = _parameter(
        "multifd-zstd-level",
        Kind.UINT8,
        1,
        maximum=20,
        expects="expects a value between 0 and 20",
        listed=False,
        no_effect=_NO_COMPRESSION,
    )
    multifd_qatzip_level: int = _parameter(
        "multifd-qatzip-level",
        Kind.UINT8,
        1,
        minimum=1,
        maximum=9,
        expects="expects a value between 1 and 9",
        listed=False,
        no_effect=_NO_COMPRESSION,
    )
    zero_page_detection: ZeroPageDetection = _parameter(  # noqa: RUF009 a field
        "zero-page-detection",
        Kind.ENUM,
        ZeroPageDetection.MULTIFD,
        meaning="Who looks for pages of zeros, which are not stored: `multifd` (the channels), `legacy` (whoever"
        " reads the pages), or `none` (nobody: they are stored).",
        values=ZeroPageDetection,
    )
    xbzrle_cache_size: int = _parameter(
        "xbzrle-cache-size",
        Kind.SIZE,
        64 * MiB,
        minimum=4096,
        expects="expects a power of two no less than the target page size",
        unit="bytes",
        no_effect=_NO_XBZRLE,
    )
    max_postcopy_bandwidth: int = _parameter("max-postcopy-bandwidth", Kind.SIZE, 0, no_effect=_NO_POSTCOPY)
    tls_authz: str = _parameter("tls-authz", Kind.STRING, "", no_effect=_NO_TLS)
    x_vcpu_dirty_limit_period: int = _parameter(
        "x-vcpu-dirty-limit-period",
        Kind.UINT64,
        1000,
        minimum=1,
        maximum=1000,
        expects="expects a value between 1 and 1000",
        unit="ms",
        no_effect=_NO_DIRTY_LIMIT,
    )
    vcpu_dirty_limit: int = _parameter(
        "vcpu-dirty-limit",
        Kind.UINT64,
        1,
        minimum=1,
        expects="must be greater than 1 MB/s",
        unit="MB/s",
        no_effect=_NO_DIRTY_LIMIT,
    )
    mode: MigMode = _parameter(  # noqa: RUF009 a field
        "mode", Kind.ENUM, MigMode.NORMAL, meaning="Only `normal`.", values=MigMode
    )
    direct_io: bool = _parameter(
        "direct-io",
        Kind.BOOL,
        True,
        meaning="Read and write checkpoints with O_DIRECT. By default where the file system can; if it was"
        " switched on by name, a save fails where it can't.",
    )
    explicit: frozenset[str] = frozenset()

    @property
    def direct_io_required(self) -> bool:
        """Whether direct I/O was switched on by name: then buffered I/O is no substitute."""
        return self.direct_io and "direct-io" in self.explicit

    def get(self, name: str) -> str:
        """The value of a parameter as text, as in parameters/NAME."""
        parameter = find_parameter(name)
        return parameter.format(getattr(self, parameter.field_name))

    def set(self, name: str, value: ParameterValue, *, running: bool = False) -> "MigrationParameters":
        """These values with one changed; ``value`` is what `Parameter.parse` made of a text.

        Raises CommandError for a value that does not go with the others or cannot be carried out, and
        StateError while a migration is ``running``, but for max-bandwidth (changes at once) and
        multifd-channels (for the next one).
        """
        parameter = find_parameter(name)
        if type(value) is not type(parameter.default):
            raise TypeError(f"{name} is a {type(parameter.default).__name__}, not {value!r}")
        if running and not parameter.while_running:
            raise StateError(f"There's a migration process in progress: {name} can be set after it")
        changes: dict[str, Any] = {parameter.field_name: value, "explicit": self.explicit | {name}}
        changed = replace(self, **changes)
        changed._check()
        return changed

    def info(self) -> str:
        """The text of ``info migrate_parameters``."""
        return "".join(
            f"{parameter.name}: {self._listed_value(parameter)}\n"
            for parameter in PARAMETERS.values()
            if parameter.listed
        )

    def _listed_value(self, parameter: Parameter) -> str:
        text = self.get(parameter.name)
        if parameter.kind is Kind.STRING:
            return f"'{text}'"
        return f"{text} {parameter.unit}" if parameter.unit else text

    def _check(self) -> None:
        if self.max_cpu_throttle < self.cpu_throttle_initial:
            raise CommandError(f"Parameter 'max_cpu_throttle' {PARAMETERS['max-cpu-throttle'].expects}")
        if self.multifd_compression is not MultiFDCompression.NONE or self.tls_creds:
            raise CommandError("Mapped-ram only available for non-compressed non-TLS multifd migration")
        if self.mode is not MigMode.NORMAL:
            raise CommandError(f"mode '{self.mode}' is not supported: a checkpoint is saved in mode 'normal'")


def _parameter_of(a_field: Field[Any]) -> Parameter | None:
    return a_field.metadata.get("parameter")


PARAMETERS: dict[str, Parameter] = {
    parameter.name: parameter for a_field in fields(MigrationParameters) if (parameter := _parameter_of(a_field))
}
"""All parameters by name, in QEMU's order."""


def find_parameter(name: str) -> Parameter:
    """The parameter of that name; raises CommandError, as QEMU does, and names the likely one."""
    if name not in PARAMETERS:
        found = likely(name, PARAMETERS)
        hint = f"did you mean {found}?" if found else "'info migrate_parameters' lists all"
        raise CommandError(f"invalid parameter value: {name} ({hint})")
    return PARAMETERS[name]
