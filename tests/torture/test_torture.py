"""Each torture for a few seconds; `make torture` runs them for as long as one likes."""

from pathlib import Path
from random import SystemRandom

import pytest

from tests.mount.harness import adopt_orphans
from tests.torture.__main__ import TORTURES
from tests.torture.frame import FAULTS, run_round

SECONDS = 10.0


@pytest.mark.parametrize("name", TORTURES)
def test_a_short_torture(name: str, tmp_path: Path) -> None:
    adopt_orphans()
    seed = SystemRandom().getrandbits(24)
    this = run_round(TORTURES[name], tmp_path, seed, SECONDS)
    assert not [this.notes for fault in FAULTS if this.counts[fault]], f"seed {seed}"
