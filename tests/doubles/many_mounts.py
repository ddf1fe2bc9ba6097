"""Many mounts of one SPEC at once: `python -m tests.doubles.many_mounts TERM SPEC OPTIONS DIR...`.

A process for each, all forked when everything is imported. Prints JSON: exit code and words of each mount.ckptfs.
"""

import json
import os
import signal
import sys

from ckptfs.cli.mount import main
from ckptfs.namespace import lease
from tests.mount.harness import adopt_orphans


def begin(spec: str, options: str, directory: str, words: int) -> int:
    child = os.fork()
    if child:
        return child
    os.dup2(words, 2)
    signal.sigwait({signal.SIGUSR1})
    sys.argv = ["mount.ckptfs", spec, directory, "-o", options]
    os._exit(main())


if __name__ == "__main__":
    term, spec, options, *directories = sys.argv[1:]
    lease.TERM = float(term)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    words = [os.memfd_create("words") for _ in directories]
    children = [begin(spec, options, *each) for each in zip(directories, words, strict=True)]
    for child in children:
        os.kill(child, signal.SIGUSR1)
    adopt_orphans()
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    for _ in filter(None, codes):
        os.wait()  # for the daemon of each that was refused
    print(json.dumps([(code, os.pread(fd, 1 << 16, 0).decode()) for code, fd in zip(codes, words, strict=True)]))
