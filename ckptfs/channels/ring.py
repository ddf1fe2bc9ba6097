"""Reads that the kernel carries out without a thread of ours: io_uring(7).

A thread costs a small read more than the disk does: it is woken, waits for the GIL, and wakes trio. Here the
kernel's own workers read (IOSQE_ASYNC), so that whoever submits waits for nothing, however silent the storage is.

The kernel and we write to the same memory without a lock. Python has no memory barriers, so there are rings only
where the processor keeps loads and stores in order. Elsewhere, and where a sandbox or the kernel has none, threads
read.
"""

import ctypes
import errno
import logging
import mmap
import os
import struct
from collections.abc import Callable
from typing import NamedTuple

import trio

log = logging.getLogger(__name__)

_IO_URING_SETUP, _IO_URING_ENTER, _IO_URING_REGISTER = 425, 426, 427
_REGISTER_IOWQ_MAX_WORKERS = 19
_OP_READ = 22
_IOSQE_ASYNC = 1 << 4
_OFF_SQES = 0x10000000

_SQE_LENGTH = 64
_SQE = struct.Struct("=BBHiQQIIQ")  # the first 40 bytes; the others stay 0
_CQE = struct.Struct("=QiI")

_ENTRIES = 512  # and room for twice as many results, more than anybody has channels
_WORKERS = 1024
"""More than anybody has channels, too: the kernel starts one only when all others wait for the storage."""

_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.argtypes = [*[ctypes.c_long] * 5, ctypes.c_void_p, ctypes.c_long]
_syscall.restype = ctypes.c_long


def _call(number: int, a: int, b: int, c: int = 0, d: int = 0) -> int:
    result: int = _syscall(number, a, b, c, d, None, 0)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


class PlainRead(NamedTuple):
    """A read that fills ``buffer`` from ``file_offset`` on."""

    buffer: memoryview
    file_offset: int


class Ring:
    """The ring of a run of trio's; all methods are for its thread."""

    def __init__(self) -> None:
        """OSError where there is no such thing; `ring_of_this_run` is what others call."""
        if os.uname().machine != "x86_64":
            raise OSError(errno.ENOSYS, "no ring without memory barriers")
        params = (ctypes.c_uint32 * 30)()  # struct io_uring_params: the last 20 are where things are
        self._fd = _call(_IO_URING_SETUP, _ENTRIES, ctypes.addressof(params))
        try:
            workers = (ctypes.c_uint32 * 2)(_WORKERS, 0)
            _call(_IO_URING_REGISTER, self._fd, _REGISTER_IOWQ_MAX_WORKERS, ctypes.addressof(workers), 2)
            self._map(params[0], params[1], params[10:20], params[20:30])
        except BaseException:
            os.close(self._fd)
            raise
        self._under_way: dict[int, tuple[object, Callable[[int], object]]] = {}
        self._submitted = 0

    def _map(self, sq_entries: int, cq_entries: int, sq: list[int], cq: list[int]) -> None:
        """Map both queues (io_uring_setup(2)); requests take their places in turn, so the index is made once."""
        length = max(sq[6] + 4 * sq_entries, cq[5] + _CQE.size * cq_entries)
        self._ring = mmap.mmap(self._fd, length)
        self._sqes = mmap.mmap(self._fd, _SQE_LENGTH * sq_entries, offset=_OFF_SQES)
        self._words = memoryview(self._ring).cast("I")
        self._sq_tail, self._sq_mask = sq[1] // 4, sq_entries - 1
        self._cq_head, self._cq_tail, self._cq_mask = cq[0] // 4, cq[1] // 4, cq_entries - 1
        self._cqes = cq[5]
        for entry in range(sq_entries):
            self._words[sq[6] // 4 + entry] = entry

    def begin(self, fd: int, read: PlainRead, ended: Callable[[int], object]) -> None:
        """Have the kernel read, and ``ended`` called with what preadv(2) returns; minus an errno for an error.

        The buffer is kept until then. OSError if nothing was begun. In trio's thread, as is ``ended``.
        """
        kept = ctypes.c_char.from_buffer(read.buffer)
        number = self._submitted
        request = (
            _OP_READ,
            _IOSQE_ASYNC,
            0,
            fd,
            read.file_offset,
            ctypes.addressof(kept),
            len(read.buffer),
            0,
            number,
        )
        _SQE.pack_into(self._sqes, (number & self._sq_mask) * _SQE_LENGTH, *request)
        self._words[self._sq_tail] = (number + 1) & 0xFFFFFFFF
        try:
            _call(_IO_URING_ENTER, self._fd, 1)
        except OSError:  # the kernel has no memory for a request: it has taken none
            self._words[self._sq_tail] = number & 0xFFFFFFFF
            raise
        self._under_way[number] = kept, ended
        self._submitted = number + 1

    async def wait(self) -> None:
        """Tell of reads as they end, until trio ends."""
        try:
            while True:
                await trio.lowlevel.wait_readable(self._fd)
                self._harvest()
        finally:
            self._close()

    def _harvest(self) -> None:
        """Tell of all reads that have ended."""
        head = self._words[self._cq_head]
        while head != self._words[self._cq_tail]:
            number, result, _ = _CQE.unpack_from(self._ring, self._cqes + (head & self._cq_mask) * _CQE.size)
            head = (head + 1) & 0xFFFFFFFF
            self._words[self._cq_head] = head
            _, ended = self._under_way.pop(number)
            ended(result)

    def _close(self) -> None:
        """Close; but what the kernel is still to fill has to stay where it is."""
        if self._under_way:
            _LEFT_BEHIND.append(self)
            return
        self._words.release()
        self._ring.close()
        self._sqes.close()
        os.close(self._fd)


_LEFT_BEHIND: list[Ring] = []
_ring_of_run: trio.lowlevel.RunVar[Ring | None] = trio.lowlevel.RunVar("ring")


def ring_of_this_run() -> Ring | None:
    """Return the ring, made at the first time; None where there is none."""
    try:
        return _ring_of_run.get()
    except LookupError:
        pass
    ring: Ring | None = None
    try:
        ring = Ring()
        trio.lowlevel.spawn_system_task(ring.wait)
    except OSError as error:
        log.info("no io_uring here (%s): threads read", error.strerror)
    _ring_of_run.set(ring)
    return ring
