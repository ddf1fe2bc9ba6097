"""SIZE: QEMU's table, and QEMU itself."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ckptfs.errors import CommandError
from ckptfs.migration.size import INVALID, OUT_OF_RANGE, SIZE_MAX, MiB, parse_size
from tests.migration.conftest import StockMonitor

SIZES = {
    "0": 0,
    "1": 1,
    "010": 10,
    "4k": 4096,
    "4K": 4096,
    "512b": 512,
    "1.5k": 1536,
    ".5k": 512,
    "1.k": 1024,
    "1.": 1,
    "1.0": 1,
    "1.0B": 1,
    "0x1001": 0x1001,
    "0X1b": 0x1B,
    "+0x5": 5,
    "+5": 5,
    " 5k": 5120,
    "\t5": 5,
    "8E": 1 << 63,
    "1.5E": 3 << 59,
    "18446744073709551615": SIZE_MAX,
    "00000000000000000000000000000001": 1,
    "0.99999999999999999999": 1,
    "0." + "0" * 400 + "1k": 0,
}
INVALIDS = [
    "",
    " ",
    "k",
    ".",
    "+",
    "-",
    "x",
    "1x",
    "1e3",
    "1.5",
    "1.5b",
    "0.5",
    "0x",
    "0x20M",
    "0x1.5",
    "5 k",
    "5k ",
    "5\n",
]
INVALIDS += ["1.k5", "1.-5k", "-.5k", "-0x5", "-5x", "16Ex", "inf", "nan", "0x1g", "٣", "1_0", "4k,x=1"]
INVALIDS += ["0." + "0" * 400 + "1", "9" * 5000 + "k"]
OUT_OF_RANGES = [
    "-0",
    "-5",
    "-.0",
    "16E",
    "18446744073709551616",
    "9" * 5000,
    "0x10000000000000000",
    "0x" + "f" * 5000,
]
OUT_OF_RANGES += ["18446744073709551615.5k", "15.9999999999999999999999E"]


@pytest.mark.parametrize(("text", "size"), SIZES.items())
def test_a_size(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("suffixes", "power"), [("bB", 0), ("kK", 1), ("mM", 2), ("gG", 3), ("tT", 4), ("pP", 5), ("eE", 6)]
)
def test_a_suffix(suffixes: str, power: int) -> None:
    for suffix in suffixes:
        assert parse_size(f"3{suffix}") == 3 << 10 * power


@pytest.mark.parametrize("text", INVALIDS)
def test_no_size(text: str) -> None:
    with pytest.raises(CommandError, match=f"^{INVALID}$"):
        parse_size(text)


@pytest.mark.parametrize("text", OUT_OF_RANGES)
def test_a_size_out_of_range(text: str) -> None:
    with pytest.raises(CommandError, match=f"^{OUT_OF_RANGE}$"):
        parse_size(text)


def test_the_default_unit_counts_without_a_suffix_only() -> None:
    assert parse_size("100", MiB) == 100 * MiB
    assert parse_size("1.5", MiB) == 3 * MiB // 2
    assert parse_size("0x20", MiB) == 32 * MiB
    assert parse_size("100b", MiB) == 100
    assert parse_size("1k", MiB) == 1024


@given(st.integers(0, SIZE_MAX), st.sampled_from(["{}", "{}b", "{:#x}", "00{}"]))
def test_every_number_is_read_back(number: int, form: str) -> None:
    assert parse_size(form.format(number)) == number


@given(st.text())
def test_any_text_is_a_size_or_a_command_error(text: str) -> None:
    try:
        assert 0 <= parse_size(text) <= SIZE_MAX
    except CommandError as error:
        assert str(error) in (INVALID, OUT_OF_RANGE)  # noqa: PT017 either way is right


NUMBER = st.from_regex(
    r"[ +-]?[0-9]{0,21}(\.[0-9]{0,30})?[bkKMgTPeEx ]?", fullmatch=True, alphabet=st.characters(codec="ascii")
)


@given(NUMBER | st.text("0123456789.xXabfkKmMgGtTpPeEB+- "))
@example("0." + "0" * 400 + "1k")
@example("99999999999999999999999k")
@settings(max_examples=300)
def test_as_stock_qemu_reads_it(stock_monitor: StockMonitor, text: str) -> None:
    name = "max-postcopy-bandwidth"  # a parameter that any size will do for
    printed = stock_monitor.hmp(f'migrate_set_parameter {name} "{text}"')
    try:
        size = parse_size(text)
    except CommandError as error:
        expected = {INVALID: "expects a non-negative number", OUT_OF_RANGE: "is out of range"}[str(error)]
        assert expected in printed
    else:
        assert printed == ""
        assert stock_monitor.qmp("query-migrate-parameters")[name] == size
