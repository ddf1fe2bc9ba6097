"""Object storage: S3 and its kin, Google's and Azure's, and web servers, as places of checkpoints.

Keeping objects is somebody else's task (docs/decisions/object-storage.md). What is here makes of one a backing file
that is fetched as it is read, and the target of a save. Nothing here is touched before the daemon has forked.
"""
