"""status and status.json: stable, and safe whatever names and errors hold."""

import dataclasses
import json
from datetime import datetime, timedelta, timezone

from hypothesis import given
from hypothesis import strategies as st

from ckptfs.migration.query import MigrationStats, QueryMigrate
from ckptfs.migration.status import MigrationStatus
from ckptfs.namespace.names import decode_name
from ckptfs.namespace.status import (
    BadPage,
    BlockStatus,
    LastSave,
    MountState,
    Status,
    format_status,
    format_status_json,
)

IDLE = Status(
    version="1.0",
    pid=1234,
    spec="/ckpt/vm1",
    state=MountState.IDLE,
    direct_io="on",
    base="/ckpt/vm1",
    vmstate="ready",
    restored=False,
    writers="running",
    qmp="none",
    guest=None,
    capture=None,
    overlay_bytes=4096,
    set_aside_pages=0,
    waiting_readers=0,
    storage="ok",
    shared_use=None,
    time_to_first_byte=None,
    time_to_full=None,
    last_command="save",
    last_outcome="ok saved",
    last_save=LastSave(datetime(2026, 11, 25, 8, 30, tzinfo=timezone(timedelta(hours=1))), "/ckpt/vm1", 7),
    users=("qemu-system-x86 (1234, rw)", "dd (5, r)"),
    log="syslog",
    base_offset=0,
    base_machine="pc-i440fx-10.0",
    base_run_state="running",
    base_devices=("timer", "globalstate"),
    memory=("pc.ram",),
    blocks=(BlockStatus("pc.ram", 4096, 10, 1, 2, 3, 4), BlockStatus("/rom a", 4096, 5, 5, 0, 0, 0)),
)
SAVING = dataclasses.replace(
    IDLE,
    state=MountState.SAVING,
    migration=QueryMigrate(MigrationStatus.ACTIVE, total_time=5, ram=MigrationStats(total=40960, remaining=4096)),
    bad_page_count=1,
    bad_pages=(BadPage("/rom a", 3, "Input/output error"),),
)


def test_status() -> None:
    assert (
        format_status(IDLE)
        == """\
version 1.0
pid 1234
spec /ckpt/vm1
state idle
base /ckpt/vm1
base-offset 0
base-machine pc-i440fx-10.0
base-run-state running
vmstate ready
direct-io on
writers running
qmp none
guest none
capture none
users qemu-system-x86 (1234, rw), dd (5, r)
shared-use none
lease none
block-count 2
page-count 15
zero-pages 6
checkpoint-pages 2
read-pages 3
written-pages 4
restored no
overlay-bytes 4096
set-aside-pages 0
waiting-readers 0
storage ok
views none
views-missing none
time-to-first-byte none
time-to-full none
verify off
bad-page-count 0
last-command save
last-outcome ok saved
last-save 2026-11-25T07:30:00Z
last-save-to /ckpt/vm1
last-save-downtime 7
log syslog
status none
error-desc none
total-time none
setup-time none
downtime none
total none
transferred none
remaining none
normal none
duplicate none
mbps none
"""
    )


def test_keys_and_their_order_never_change() -> None:
    def keys(status: Status) -> list[str]:
        return [
            line.split(" ")[0] for line in format_status(status).splitlines() if not line.startswith("bad-page ")
        ]

    assert keys(IDLE) == keys(SAVING)


def test_a_migration_and_a_bad_page() -> None:
    lines = format_status(SAVING).splitlines()
    assert {"state saving", "status active", "total-time 5", "total 40960", "remaining 4096"} <= set(lines)
    assert lines[-1] == "bad-page %2From%20a 3 Input/output error"


def test_status_json() -> None:
    document = json.loads(format_status_json(SAVING))
    assert document["state"] == "saving"
    assert document["migration"]["ram"]["remaining"] == 4096
    assert document["blocks"][1]["idstr"] == "/rom a"
    assert document["blocks"][1]["file"] == "ram/%2From a"
    assert [block["backend"] for block in document["blocks"]] == [True, False]
    assert document["base-devices"] == ["timer", "globalstate"]
    assert document["bad-pages"] == [{"block": "/rom a", "page": 3, "error": "Input/output error"}]
    assert json.loads(format_status_json(IDLE))["migration"] == {}


texts = st.binary(min_size=1, max_size=40).map(lambda data: data.decode("utf-8", "surrogateescape"))


@given(texts, texts)
def test_names_and_errors_break_neither_line_nor_encoding(idstr: str, error: str) -> None:
    status = dataclasses.replace(
        IDLE,
        spec=error,
        last_outcome=error,
        blocks=(BlockStatus(idstr, 4096, 1, 1, 0, 0, 0),),
        bad_pages=(BadPage(idstr, 0, error),),
    )
    text = format_status(status)
    assert len(text.splitlines()) == len(format_status(IDLE).splitlines()) + 1
    text.encode()
    document = json.loads(format_status_json(status).encode())
    assert decode_name(document["blocks"][0]["file"].removeprefix("ram/").encode()) == idstr
