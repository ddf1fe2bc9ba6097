#!/bin/bash
# The walk of README.md: a block of RAM, a save, a look into the checkpoint, a restore. No QEMU, no root.
set -euo pipefail
cd "$(mktemp -d)"
trap '! mountpoint --quiet vm1 || umount vm1; rm -rf "$PWD"' EXIT

mkdir vm1
mount.ckptfs vm1.ckpt vm1 -o ram=pc.ram:64M    # a new guest's RAM: 64 MiB of zeros
echo "hello, RAM" | dd of=vm1/ram/pc.ram bs=1 seek=1M conv=notrunc status=none
echo save > vm1/ctl                            # when it returns, vm1.ckpt is complete and on disk
cat vm1/ctl                                    # ok saved vm1.ckpt: 1 page, 16383 zero, ...
umount vm1                                     # ends the daemon; what was not saved is lost

ckptfs info vm1.ckpt                           # blocks, pages, devices, whether it is complete
ckptfs verify vm1.ckpt                         # is it still what was saved? Every 64 KiB has a checksum
mount.ckptfs vm1.ckpt vm1                      # at once: no RAM has been read yet
od -A d -c -j 1M -N 16 vm1/ram/pc.ram          # RAM is a file: use od, grep, cmp, dd, mmap ...
grep --text --only-matching --byte-offset "hello, RAM" vm1/ram/pc.ram
grep pages vm1/status                          # one page has been read from the checkpoint
echo "bye" | dd of=vm1/ram/pc.ram conv=notrunc status=none
echo "save ./vm1.next" > vm1/ctl               # the first checkpoint stays as it is
echo restore > vm1/ctl                         # load everything: the file is no longer needed
umount vm1
