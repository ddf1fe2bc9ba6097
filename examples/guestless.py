#!/usr/bin/env python3
"""RAM without a guest: make a block, fill it through mmap, save, restore, compare. Needs no QEMU."""

import contextlib
import mmap
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

PAGE = 4096
LENGTH = 256 << 20


@contextlib.contextmanager
def mounted(spec: Path, *options: str) -> Iterator[Path]:
    """Mount SPEC on a directory of its own, for as long as this lasts."""
    with tempfile.TemporaryDirectory(prefix="ram-") as directory:
        arguments = [argument for option in options for argument in ("-o", option)]
        subprocess.run(["mount.ckptfs", spec, directory, *arguments], check=True)
        try:
            yield Path(directory)
        finally:
            subprocess.run(["umount", directory], check=True)


def status(mount: Path) -> dict[str, str]:
    """`key value`, one a line."""
    return dict(line.split(" ", 1) for line in (mount / "status").read_text().splitlines())


def main() -> None:
    """Tell the story on stdout."""
    content = os.urandom(64 << 20)
    with tempfile.TemporaryDirectory() as work:
        checkpoint = Path(work, "checkpoint")
        with mounted(checkpoint, f"ram=heap:{LENGTH}") as mount:
            with (mount / "ram/heap").open("r+b") as file, mmap.mmap(file.fileno(), 0) as heap:
                heap[LENGTH // 2 : LENGTH // 2 + len(content)] = content
                (mount / "ctl").write_text("save\n")  # mapped or not: what is in memory now is saved
                heap[LENGTH // 2 :] = bytes(LENGTH // 2)
            print((mount / "ctl").read_text(), end="")
        size = checkpoint.stat()
        print(f"the checkpoint is {size.st_size >> 20} MiB long and takes {size.st_blocks >> 11} MiB of disk")

        with mounted(checkpoint) as mount, (mount / "ram/heap").open("rb") as heap:
            assert heap.read(PAGE) == bytes(PAGE)
            print(f"one page of zeros was read: {status(mount)['read-pages']} pages came from the checkpoint")
            heap.seek(LENGTH // 2)
            assert heap.read(PAGE) == content[:PAGE]
            print(f"one page with data was read: {status(mount)['read-pages']}, as the kernel reads ahead")
            heap.seek(LENGTH // 2)
            assert heap.read(len(content)) == content
            assert not heap.read().strip(b"\0")
            print(f"all of it was read, and is as it was saved: {status(mount)['read-pages']}")


if __name__ == "__main__":
    main()
