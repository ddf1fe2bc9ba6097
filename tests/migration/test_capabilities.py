"""Capabilities: QEMU's order, defaults, refused combinations, and QEMU itself."""

import pytest

from ckptfs.errors import CommandError, StateError
from ckptfs.migration.capabilities import CAPABILITIES, MigrationCapabilities, find_capability, parse_state
from tests.migration.conftest import StockMonitor

ALL_OFF = MigrationCapabilities(events=False, multifd=False, mapped_ram=False)
WORKING = {"mapped-ram", "multifd", "x-ignore-shared", "validate-uuid", "events"}


def refusal(capabilities: MigrationCapabilities, name: str) -> str | None:
    try:
        capabilities.set(name, True)
    except CommandError as error:
        return str(error)
    return None


def test_names_and_order_are_those_of_stock_qemu(stock_monitor: StockMonitor) -> None:
    assert ALL_OFF.info() == stock_monitor.hmp("info migrate_capabilities")


def test_what_is_on_from_the_start() -> None:
    switched_on = {name for name in CAPABILITIES if MigrationCapabilities().get(name)}
    assert switched_on == {"events", "mapped-ram", "multifd"}


def stock_refusal(stock_monitor: StockMonitor, *names: str) -> str | None:
    states = [{"capability": name, "state": True} for name in names]
    error = stock_monitor.qmp_error("migrate-set-capabilities", capabilities=states)
    for name in reversed(names):
        off = [{"capability": name, "state": False}]
        stock_monitor.qmp("migrate-set-capabilities", capabilities=off)
    return error


SUPPORTED = [name for name, capability in CAPABILITIES.items() if not capability.unsupported]
UNSUPPORTED = [name for name, capability in CAPABILITIES.items() if capability.unsupported]


@pytest.mark.parametrize("one", SUPPORTED)
@pytest.mark.parametrize("other", SUPPORTED)
def test_what_works_here_goes_together_as_in_stock_qemu(stock_monitor: StockMonitor, one: str, other: str) -> None:
    assert ALL_OFF.set(one, True).set(other, True).get(one)
    assert stock_refusal(stock_monitor, one, other) is None


@pytest.mark.parametrize("supported", SUPPORTED)
@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_cannot_work_is_refused_in_stock_qemus_words_if_it_has_any(
    stock_monitor: StockMonitor, supported: str, name: str
) -> None:
    theirs = stock_refusal(stock_monitor, supported, name)
    if theirs is None or theirs.startswith("dirty-limit requires KVM"):
        theirs = f"capability '{name}' is not supported: {CAPABILITIES[name].unsupported}"
    assert refusal(ALL_OFF.set(supported, True), name) == theirs


@pytest.mark.parametrize("name", CAPABILITIES)
def test_each_works_or_says_why_not(name: str) -> None:
    capability = find_capability(name)
    reasons = [bool(capability.no_effect), bool(capability.unsupported), name in WORKING]
    assert reasons.count(True) == 1
    assert (refusal(ALL_OFF, name) is None) == (not capability.unsupported)
    assert ALL_OFF.set(name, False) == ALL_OFF


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("xbzrle", "Multifd is not compatible with xbzrle"),
        ("postcopy-ram", "Postcopy is not yet compatible with multifd"),
        ("background-snapshot", "Background-snapshot is not compatible with multifd"),
        ("postcopy-preempt", "Postcopy preempt requires postcopy-ram"),
        ("switchover-ack", "Capability 'switchover-ack' requires capability 'return-path'"),
        ("dirty-limit", "capability 'dirty-limit' is not supported: it needs KVM's dirty ring"),
    ],
)
def test_words(name: str, text: str) -> None:
    assert refusal(MigrationCapabilities(), name) == text


def test_without_multifd_mapped_ram_has_its_own_words(stock_monitor: StockMonitor) -> None:
    capabilities = MigrationCapabilities().set("multifd", False)
    for name in ("xbzrle", "postcopy-ram"):
        assert refusal(capabilities, name) == stock_refusal(stock_monitor, "mapped-ram", name)


def test_many_channels_into_a_file_need_mapped_ram() -> None:
    MigrationCapabilities().check_file_transport()
    ALL_OFF.check_file_transport()
    with pytest.raises(CommandError, match=r"^Migration requires multi-channel URIs \(e\.g\. tcp\)"):
        MigrationCapabilities().set("mapped-ram", False).check_file_transport()


def test_none_can_change_while_a_migration_runs() -> None:
    with pytest.raises(StateError, match="There's a migration process in progress: events can be switched after"):
        MigrationCapabilities().set("events", True, running=True)


def test_a_name_that_is_like_none_is_refused_with_where_all_are_listed() -> None:
    with pytest.raises(
        CommandError, match=r"^invalid parameter value: x \('info migrate_capabilities' lists all\)$"
    ):
        find_capability("x")


def test_an_unknown_name_is_refused_and_the_likely_one_named(stock_monitor: StockMonitor) -> None:
    with pytest.raises(CommandError) as caught:
        find_capability("mapped_ram")
    assert str(caught.value) == "invalid parameter value: mapped_ram (did you mean mapped-ram?)"
    printed = stock_monitor.hmp("migrate_set_capability mapped_ram on")
    assert printed == "Error: invalid parameter value: mapped_ram\n"


def test_a_state_is_on_or_off(stock_monitor: StockMonitor) -> None:
    assert parse_state("on")
    assert not parse_state("off")
    for text in ("ON", "1", "yes", ""):
        with pytest.raises(CommandError) as caught:
            parse_state(text)
        assert stock_monitor.hmp(f"migrate_set_capability events {text}").startswith(f"{caught.value}\n")
