"""What a user would otherwise have to know: the mount's read-ahead and dirty limits (root only).

FUSE mounts start with a read-ahead of 128 KiB and may fill 1 % of memory with dirty pages, strictly held.
A cold sequential read is about three times faster with 1 MiB, the largest request that FUSE sends, and a VM that
dirties its RAM through mmap is not throttled with the limits of an ordinary block device
(Documentation/ABI/testing/sysfs-class-bdi; measured: docs/decisions/fuse-tuning.md).
"""

import os

BDI_SETTINGS = {"read_ahead_kb": "1024", "strict_limit": "0", "max_ratio": "100"}


def tune_backing_device(device: int) -> list[str]:
    """Set `BDI_SETTINGS` on the bdi of ``device`` (st_dev of the mount); return what could not be set."""
    folder = f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}"
    refused = []
    for name, value in BDI_SETTINGS.items():
        try:
            with open(f"{folder}/{name}", "w") as setting:
                setting.write(value)
        except OSError as error:
            refused.append(f"{name}={value} ({error.strerror})")
    return refused
