from tests.cli.conftest import run_ckptfs
from tests.mapped_ram.conftest import qemu_commands

__all__ = ["qemu_commands", "run_ckptfs"]
