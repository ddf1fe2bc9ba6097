"""One libvirtd for all of these tests, and domains in it: `domain(NAME)` is gone when the test ends."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import run_ckptfs
from tests.libvirt.daemon import Domain, Libvirtd
from tests.mount.conftest import Mount, _adopt_orphans, public
from tests.mount.harness import Mounted
from tests.qemu.stepper import Stepper, build_stepper

NewDomain = Callable[..., Domain]

__all__ = ["_adopt_orphans", "public", "run_ckptfs"]


@pytest.fixture(scope="session")
def libvirtd(_adopt_orphans: None) -> Iterator[Libvirtd]:
    """A real libvirtd, for all tests of a session."""
    daemon = Libvirtd()
    daemon.start()
    yield daemon
    daemon.close()


@pytest.fixture(scope="session")
def stepper(libvirtd: Libvirtd) -> Stepper:
    """A guest that writes 512 KiB, again and again."""
    guest = build_stepper(libvirtd.directory, 512 << 10)
    guest.rom.chmod(0o644)
    return guest


@pytest.fixture
def domain(libvirtd: Libvirtd, stepper: Stepper) -> Iterator[NewDomain]:
    """`domain(NAME, ...)`: a domain that is defined, and not started."""
    with ExitStack() as stack:

        def new(name: str, **how: Any) -> Domain:
            made = Domain(libvirtd, name, stepper, **how)
            made.define()
            stack.callback(made.remove)
            return made

        yield new


@pytest.fixture
def mount(libvirtd: Libvirtd, tmp_path: Path) -> Iterator[Mount]:
    """`mount(SPEC, OPTION...)`: a new mount where libvirtd sees it; gone before its domains are."""
    with ExitStack() as stack:
        count = 0

        def new_mount(spec: str | Path, *options: str, **how: Any) -> Mounted:
            nonlocal count
            count += 1
            path = libvirtd.directory / f"mnt{count}"
            mounted = Mounted(spec, path, tmp_path / f"log{count}", *options, **how)
            stack.callback(mounted.clean_up)
            return mounted

        yield new_mount
