#!/usr/bin/env python3
"""RAM without a guest: make a block, fill it through mmap, save, restore, compare. Needs no QEMU."""

import mmap
import os
import tempfile
from pathlib import Path

import ckptfs

PAGE = 4096
LENGTH = 256 << 20


def main() -> None:
    """Tell the story on stdout."""
    content = os.urandom(64 << 20)
    with tempfile.TemporaryDirectory() as work:
        checkpoint = Path(work, "checkpoint")
        with (
            ckptfs.mounted(checkpoint, ram=f"heap:{LENGTH}") as mount,
            (mount.path / "ram/heap").open("r+b") as file,
            mmap.mmap(file.fileno(), 0) as heap,
        ):
            heap[LENGTH // 2 : LENGTH // 2 + len(content)] = content
            print(mount.save())  # mapped or not: what is in memory now is saved
            heap[LENGTH // 2 :] = bytes(LENGTH // 2)
        size = checkpoint.stat()
        print(f"the checkpoint is {size.st_size >> 20} MiB long and takes {size.st_blocks >> 11} MiB of disk")

        with ckptfs.mounted(checkpoint) as mount, (mount.path / "ram/heap").open("rb") as heap:
            assert heap.read(PAGE) == bytes(PAGE)
            print(f"one page of zeros was read: {mount.status()['read-pages']} pages came from the checkpoint")
            heap.seek(LENGTH // 2)
            assert heap.read(PAGE) == content[:PAGE]
            print(f"one page with data was read: {mount.status()['read-pages']}, as the kernel reads ahead")
            heap.seek(LENGTH // 2)
            assert heap.read(len(content)) == content
            assert not heap.read().strip(b"\0")
            print(f"all of it was read, and is as it was saved: {mount.status()['read-pages']}")

        with ckptfs.open(checkpoint) as opened:  # without a mount
            heap = opened.blocks["heap"]
            assert heap.read(LENGTH // 2, len(content)) == content
            print(f"in the file, {heap.has_data().sum()} of {heap.page_count} pages hold data")


if __name__ == "__main__":
    main()
