#!/bin/bash
# inspect.sh [CHECKPOINT CHECKPOINT]: looks into two checkpoints that stock QEMU saved: finds a string in the guest's
# memory, counts its pages of zeros, tells which pages differ. Without arguments it has QEMU save two of a small guest,
# from ordinary memory: no ckptfs is involved until they are mounted.
set -euo pipefail
examples=$(cd "$(dirname "$0")" && pwd)
files=()
for file in "$@"; do files+=("$(realpath "$file")"); done
work=$(mktemp -d)
cd "$work"

clean_up() {
    [[ -z ${qemu:-} ]] || kill "$qemu" 2>/dev/null || true
    for mount in first second; do ! mountpoint --quiet "$mount" || umount "$mount"; done
    rm -rf "$work"
}
trap clean_up EXIT

wait_for() { # wait_for FILE TEXT
    local tries=0
    until grep --text --quiet --no-messages "$2" "$1"; do
        if ((++tries > 1200)); then
            echo "QEMU has not said '$2'" >&2
            exit 1
        fi
        sleep 0.05
    done
}

save_two() {
    local kernel=$examples/../.cache/guest/vmlinuz name
    "$examples/small-guest" initrd
    mkfifo monitor
    qemu-system-x86_64 -accel tcg -m 128M -nodefaults -display none -serial file:serial -monitor stdio \
        -kernel "$kernel" -initrd initrd -append "console=ttyS0 quiet panic=-1" <monitor >said &
    qemu=$!
    exec 3>monitor
    echo "migrate_set_capability mapped-ram on" >&3
    echo "migrate_set_parameter max-bandwidth 0" >&3
    for name in 5 10; do
        wait_for serial "count $name"
        echo "migrate file:$work/at-$name" >&3 # returns when it is saved; QEMU leaves the guest stopped
        echo "info status" >&3
        wait_for said "postmigrate"
        : >said
        echo "cont" >&3
    done
    echo "quit" >&3
    wait "$qemu"
    qemu=
}

if ((${#files[@]} != 2)); then
    save_two
    files=("$work/at-5" "$work/at-10")
fi

mkdir first second
mount.ckptfs "${files[0]}" first -o ro
mount.ckptfs "${files[1]}" second -o ro

echo "its blocks:"
ls -s --block-size=1K first/ram # the size is what is stored of each

echo "strings in its memory:"
grep --text --only-matching --byte-offset 'The secret of this guest: [a-z]*' first/ram/pc.ram | sort -t: -k2 -u || true

echo "pages of zeros, of all pages:"
tr -d -c '\0' <first/pages/pc.ram | wc -c # one byte a page, 0 for zeros
wc -c <first/pages/pc.ram

echo "pages that differ between the two:"
(ckptfs diff first second || true) | sed -n 's/^pc.ram: \([0-9]*\) of .*/\1/p'
