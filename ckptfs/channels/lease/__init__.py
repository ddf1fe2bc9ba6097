"""Leases of checkpoints (`-o exclusive`): a lock file or lock object beside one, and the task that keeps it."""
