"""Has umount(8) call /sbin/umount.fuse.ckptfs, which returns when the daemon has ended.

For a plain `umount DIR` of root's, umount(8) asks statfs(2) alone for the type, and that is "fuse" for all of them,
unless the mount is in /run/mount/utab (lookup_umount_fs_by_statfs, libmount/src/context_umount.c, util-linux 2.38).
So it is put there by libmount itself, with an option of the kind that only user space reads.
"""

import ctypes
import os

_HELPER = "/sbin/umount.fuse.ckptfs"
_OPTIONS = b"x-ckptfs"


def register(source: str, mountpoint: str) -> bool:
    """Put the mount into utab, where there is a helper; return whether it is there (blocking)."""
    if os.geteuid() != 0 or not os.path.exists(_HELPER):
        return False
    try:
        libmount = _libmount()
    except OSError:
        return False
    fs = ctypes.c_void_p(libmount.mnt_new_fs())
    try:
        libmount.mnt_fs_set_source(fs, os.fsencode(source))
        libmount.mnt_fs_set_target(fs, os.fsencode(mountpoint))
        libmount.mnt_fs_set_fstype(fs, b"fuse.ckptfs")
        libmount.mnt_fs_set_options(fs, _OPTIONS)
        return _update(libmount, None, fs)
    finally:
        libmount.mnt_unref_fs(fs)


def unregister(mountpoint: str) -> None:
    """Take it out again, if umount(8) has not done so (blocking)."""
    _update(_libmount(), os.fsencode(mountpoint), None)


def _libmount() -> ctypes.CDLL:
    libmount = ctypes.CDLL("libmount.so.1")
    libmount.mnt_new_fs.restype = libmount.mnt_new_update.restype = ctypes.c_void_p
    return libmount


def _update(libmount: ctypes.CDLL, target: bytes | None, fs: ctypes.c_void_p | None) -> bool:
    """Change utab: add ``fs``, or remove ``target`` (mnt_update_set_fs, mnt_update_table)."""
    update = ctypes.c_void_p(libmount.mnt_new_update())
    try:
        if libmount.mnt_update_set_fs(update, ctypes.c_ulong(0), target, fs) != 0:
            return False
        return bool(libmount.mnt_update_table(update, None) == 0)
    finally:
        libmount.mnt_free_update(update)
