"""Parameters: QEMU's defaults, ranges, units, words, and QEMU itself."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptfs.errors import CommandError, StateError
from ckptfs.migration.parameters import PARAMETERS, Kind, MigrationParameters, ZeroPageDetection, find_parameter
from ckptfs.migration.size import MiB
from tests.migration.conftest import StockMonitor

OURS = {"multifd-channels": "4", "direct-io": "on", "max-bandwidth": "0"}
"""Defaults that differ from QEMU's."""


def set_text(parameters: MigrationParameters, name: str, text: str, unit: int = 1) -> MigrationParameters:
    return parameters.set(name, find_parameter(name).parse(text, unit))


def test_names_and_defaults_are_those_of_stock_qemu(stock_monitor: StockMonitor) -> None:
    theirs = stock_monitor.qmp("query-migrate-parameters")
    assert set(theirs) == set(PARAMETERS)
    parameters = MigrationParameters()
    for name, value in theirs.items():
        if name not in OURS:
            assert getattr(parameters, find_parameter(name).field_name) == value, name
    assert {name: parameters.get(name) for name in OURS} == OURS


def test_info_is_that_of_stock_qemu(stock_monitor: StockMonitor) -> None:
    parameters = MigrationParameters()
    for name, text in {"max-bandwidth": "128", "multifd-channels": "2", "direct-io": "off"}.items():
        parameters = set_text(parameters, name, text, MiB)
    assert parameters.info() == stock_monitor.hmp("info migrate_parameters")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("multifd-channels", "0"),
        ("multifd-channels", "256"),
        ("multifd-channels", "-1"),
        ("multifd-channels", "x"),
        ("multifd-channels", "1.5"),
        ("multifd-channels", "1k"),
        ("multifd-channels", "08"),
        ("max-bandwidth", "1x"),
        ("max-bandwidth", "-1"),
        ("max-bandwidth", "8E"),
        ("max-bandwidth", "8388608T"),
        ("avail-switchover-bandwidth", "1x"),
        ("direct-io", "maybe"),
        ("direct-io", "1"),
        ("direct-io", "ON"),
        ("zero-page-detection", "foo"),
        ("multifd-compression", "foo"),
        ("mode", "x"),
        ("downtime-limit", "2000001"),
        ("downtime-limit", "-1"),
        ("cpu-throttle-initial", "100"),
        ("cpu-throttle-increment", "0"),
        ("max-cpu-throttle", "5"),
        ("max-cpu-throttle", "100"),
        ("throttle-trigger-threshold", "0"),
        ("throttle-trigger-threshold", "101"),
        ("cpu-throttle-tailslow", "q"),
        ("xbzrle-cache-size", "100"),
        ("xbzrle-cache-size", "4097"),
        ("announce-initial", "100001"),
        ("announce-max", "100001"),
        ("announce-rounds", "1001"),
        ("announce-step", "10001"),
        ("announce-step", "0"),
        ("multifd-zlib-level", "10"),
        ("multifd-zstd-level", "21"),
        ("multifd-qatzip-level", "10"),
        ("multifd-qatzip-level", "0"),
        ("vcpu-dirty-limit", "0"),
        ("x-checkpoint-delay", "-1"),
        ("x-checkpoint-delay", "4294967296"),
        ("max-postcopy-bandwidth", "16E"),
    ],
)
def test_a_value_is_refused_as_stock_qemu_does(stock_monitor: StockMonitor, name: str, text: str) -> None:
    with pytest.raises(CommandError) as caught:
        set_text(MigrationParameters(), name, text, MiB)
    assert stock_monitor.hmp(f"migrate_set_parameter {name} {text}") == f"Error: {caught.value}\n"


def test_one_range_error_of_stock_qemu_spells_the_name_with_dashes(stock_monitor: StockMonitor) -> None:
    with pytest.raises(CommandError) as caught:
        set_text(MigrationParameters(), "x-vcpu-dirty-limit-period", "1001")
    printed = stock_monitor.hmp("migrate_set_parameter x-vcpu-dirty-limit-period 1001")
    assert printed.replace("x-vcpu-dirty-limit-period", "x_vcpu_dirty_limit_period") == f"Error: {caught.value}\n"


@pytest.mark.parametrize("name", ["downtime-limit", "announce-rounds", "max-postcopy-bandwidth"])
def test_no_size_is_refused_as_stock_qemu_does_but_in_one_line(stock_monitor: StockMonitor, name: str) -> None:
    with pytest.raises(CommandError) as caught:
        set_text(MigrationParameters(), name, "1x")
    printed = stock_monitor.hmp(f"migrate_set_parameter {name} 1x").splitlines()
    assert printed[0] == "Error: " + str(caught.value).split(" (")[0]


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("multifd-channels", "1", 1),
        ("multifd-channels", "255", 255),
        ("multifd-channels", "0x10", 16),
        ("multifd-channels", "010", 8),
        ("max-bandwidth", "100", 100 * MiB),
        ("max-bandwidth", "1.5", 3 * MiB // 2),
        ("max-bandwidth", "0", 0),
        ("max-bandwidth", "10b", 10),
        ("direct-io", "off", False),
        ("direct-io", "yes", True),
        ("zero-page-detection", "none", "none"),
        ("downtime-limit", "1k", 1024),
        ("xbzrle-cache-size", "4k", 4096),
        ("max-cpu-throttle", "20", 20),
    ],
)
def test_a_value_is_read_as_stock_qemu_does(
    stock_monitor: StockMonitor, name: str, text: str, value: int | str
) -> None:
    assert find_parameter(name).parse(text, MiB) == value
    assert stock_monitor.hmp(f"migrate_set_parameter {name} {text}") == ""
    assert stock_monitor.qmp("query-migrate-parameters")[name] == value


def test_a_bandwidth_counts_bytes_everywhere_but_on_the_monitor() -> None:
    assert find_parameter("max-bandwidth").parse("100") == 100


def test_a_name_that_is_like_none_is_refused_with_where_all_are_listed() -> None:
    with pytest.raises(CommandError, match=r"^invalid parameter value: x \('info migrate_parameters' lists all\)$"):
        find_parameter("x")


def test_an_unknown_name_is_refused_and_the_likely_one_named(stock_monitor: StockMonitor) -> None:
    with pytest.raises(CommandError) as caught:
        find_parameter("multifd_channels")
    assert str(caught.value) == "invalid parameter value: multifd_channels (did you mean multifd-channels?)"
    printed = stock_monitor.hmp("migrate_set_parameter multifd_channels 2")
    assert printed == "Error: invalid parameter value: multifd_channels\n"


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_value_is_read_back_from_its_text(name: str) -> None:
    parameters = MigrationParameters()
    assert set_text(parameters, name, parameters.get(name)).get(name) == parameters.get(name)


@given(st.sampled_from(list(PARAMETERS)), st.text() | st.from_regex(r"[0-9a-fx.kMG+-]*"))
def test_any_text_is_a_value_or_a_command_error(name: str, text: str) -> None:
    try:
        value = find_parameter(name).parse(text, MiB)
    except CommandError:
        return
    assert type(value) is type(find_parameter(name).default)


@pytest.mark.parametrize(
    ("name", "text"), [("multifd-compression", "zlib"), ("tls-creds", "x"), ("mode", "cpr-reboot")]
)
def test_what_cannot_be_carried_out_is_refused(name: str, text: str) -> None:
    with pytest.raises(CommandError):
        set_text(MigrationParameters(), name, text)


def test_what_has_no_meaning_here_keeps_its_value_and_says_so() -> None:
    assert set_text(MigrationParameters(), "announce-rounds", "7").announce_rounds == 7
    working = {name for name, parameter in PARAMETERS.items() if not parameter.no_effect}
    assert working == {
        "max-bandwidth",
        "multifd-channels",
        "multifd-compression",
        "zero-page-detection",
        "mode",
        "direct-io",
    }


def test_values_are_typed() -> None:
    parameters = set_text(MigrationParameters(), "zero-page-detection", "legacy")
    assert parameters.zero_page_detection is ZeroPageDetection.LEGACY
    with pytest.raises(TypeError):
        parameters.set("multifd-channels", "8")
    assert all(parameter.values for parameter in PARAMETERS.values() if parameter.kind is Kind.ENUM)


def test_only_direct_io_that_was_asked_for_is_required() -> None:
    parameters = MigrationParameters()
    assert (parameters.direct_io, parameters.direct_io_required) == (True, False)
    assert set_text(parameters, "direct-io", "on").direct_io_required
    assert not set_text(parameters, "direct-io", "off").direct_io_required


def test_while_a_migration_runs_only_two_can_change() -> None:
    for name, parameter in PARAMETERS.items():
        if name in ("max-bandwidth", "multifd-channels"):
            MigrationParameters().set(name, parameter.default, running=True)
        else:
            with pytest.raises(StateError, match="migration process in progress"):
                MigrationParameters().set(name, parameter.default, running=True)
