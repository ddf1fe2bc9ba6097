"""What is known of the machine behind a mount."""

from pathlib import Path

import pytest

from ckptfs.channels.identity import Identity
from ckptfs.errors import QemuError
from ckptfs.guest.machine import Machine
from ckptfs.migration.address import QMPSocket


async def test_of_one_that_can_not_be_asked_nothing_is_known(tmp_path: Path) -> None:
    machine = Machine(QMPSocket(str(tmp_path / "qmp")), Identity.of_daemon(), "connected", "running")
    with pytest.raises(QemuError, match="No such file"):
        async with machine.monitor():
            pass
    assert (machine.state, machine.run_state) == ("lost", None)
