"""When the views of a checkpoint are found out anew."""

from pathlib import Path

import pytest

from ckptfs.fuse.view_files import ViewFiles
from ckptfs.guest import views
from ckptfs.guest.guest import Guest
from tests.doubles.checkpoints import open_base
from tests.doubles.migration_file import MigrationFile


async def test_what_was_seen_of_written_ram_is_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page tables of a machine that ran on are not those that its saved registers point to."""
    looks = []

    async def look(guest: Guest, *how: object) -> views.Views:
        looks.append(guest.has_written)
        return views.Views()

    monkeypatch.setattr("ckptfs.fuse.view_files.look", look)
    MigrationFile().write(tmp_path / "checkpoint")
    guest = Guest.incoming(open_base(tmp_path / "checkpoint"))
    files = ViewFiles(guest, [], [])
    await guest.write(guest.blocks["pc.ram"], 0, b"by the machine")
    for _ in range(2):
        await files.refresh()
    assert (looks, files.generation) == ([True], 1)
    await guest.reset()
    for _ in range(2):
        await files.refresh()
    assert (looks, files.generation) == ([True, False], 2)
    await guest.write(guest.blocks["pc.ram"], 0, b"by hand")
    await files.refresh()
    assert len(looks) == 2
    guest.close()
