from pathlib import Path

import pytest

from tests.mount.conftest import Mount


def test_relative_paths_are_meant_from_where_the_caller_stands(
    tmp_path: Path, mount: Mount, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mounted = mount("new", "ram=pc.ram:16M,qmp=sockets/qmp", "log=daemon.log")
    mounted.log = tmp_path / "daemon.log"
    mounted.ctl("save ram-only")
    assert (tmp_path / "new").exists()
    assert mounted.log.exists()
    assert mounted.status()["qmp"] == f"waiting {tmp_path}/sockets/qmp"
