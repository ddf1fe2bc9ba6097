"""The commands: mount.ckptfs, which mount(8) calls, and ckptfs."""

import os

# Else numpy starts a thread for each processor, for matrices, which nobody has here: that takes a tenth of the time
# of a mount, and a daemon had better fork with one thread.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
