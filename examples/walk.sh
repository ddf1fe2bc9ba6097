#!/bin/bash
# The walk of README.md: a block of RAM, a save, a look into the checkpoint, a restore. No QEMU, no root.
set -euo pipefail
cd "$(mktemp -d)"
trap '! mountpoint --quiet vm1 || umount vm1; rm -rf "$PWD"' EXIT

mkdir vm1
mount.ckptfs vm1.ckpt vm1 -o ram=pc.ram:64M    # a new guest's RAM: 64 MiB of zeros
echo "hello, RAM" | dd of=vm1/ram/pc.ram bs=1 seek=1M conv=notrunc status=none
echo save > vm1/ctl                            # 0: vm1.ckpt is complete and on the disk
cat vm1/ctl                                    # ok saved vm1.ckpt: 1 page, 16383 zero, ...
umount vm1                                     # the daemon ends, and with it what was not saved

ckptfs info vm1.ckpt                           # blocks, pages, devices, whether it is complete
mount.ckptfs vm1.ckpt vm1                      # at once: nothing of RAM has been read yet
od -A d -c -j 1M -N 16 vm1/ram/pc.ram          # RAM is files: od, grep, cmp, dd, mmap ...
grep --text --only-matching --byte-offset "hello, RAM" vm1/ram/pc.ram
grep pages vm1/status                          # one page was read from the checkpoint
echo "bye" | dd of=vm1/ram/pc.ram conv=notrunc status=none
echo "save ./vm1.next" > vm1/ctl               # the checkpoint it came from stays as it is
echo restore > vm1/ctl                         # all of it into memory: no file is needed any more
umount vm1
