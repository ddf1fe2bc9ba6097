"""The units in mount-helpers/systemd, as systemd reads them."""

import shutil
import subprocess
from pathlib import Path

UNITS = Path(__file__).parents[2] / "mount-helpers" / "systemd"


def test_systemd_takes_the_units(tmp_path: Path) -> None:
    for unit in UNITS.iterdir():
        shutil.copy(unit, tmp_path / unit.name.replace("@", "@vm1"))
    result = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *sorted(tmp_path.iterdir())], capture_output=True, text=True
    )
    ours = [line for line in result.stderr.splitlines() if any(name.name in line for name in tmp_path.iterdir())]
    assert (result.returncode, ours) == (0, []), result.stderr
