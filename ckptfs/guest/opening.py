"""Opening a checkpoint to restore from, wherever it is."""

import contextlib
import os

from ckptfs.channels.backing_file import BackingFile, OpenedFile
from ckptfs.channels.descriptors import Descriptors, describe_address
from ckptfs.channels.identity import Identity
from ckptfs.channels.opened import open_regular
from ckptfs.channels.stores.object_file import open_object
from ckptfs.errors import CheckpointError, CommandError, StorageError
from ckptfs.guest.base import Base, BaseOptions
from ckptfs.migration.address import FileMigrationArgs, ObjectAddress, SeekableAddress
from ckptfs.migration.store import StoreOptions


def open_checkpoint(
    address: SeekableAddress,
    identity: Identity,
    descriptors: Descriptors,
    options: BaseOptions,
    store: StoreOptions,
    forbidden_device: int = -1,
) -> Base:
    """Open and check the checkpoint at ``address``, whose path is absolute, as ``identity`` may (blocking).

    Raises CheckpointError, naming the file and the byte, for a file that is none; CommandError for one that lies on
    the mount itself; StorageError for something that is no regular file, can't be read, or if no handed descriptor
    fits.
    """
    name = describe_address(address)
    try:
        with contextlib.ExitStack() as undo:
            file = descriptors.open(address, os.O_RDONLY)
            if isinstance(address, ObjectAddress):
                identity.refuse_stranger(name)
                file = open_object(address, store)
            elif file is None:
                assert isinstance(address, FileMigrationArgs)
                file = _open_path(address.filename, identity, forbidden_device)
            undo.callback(file.close)
            base = Base(name, file, address.offset if isinstance(address, FileMigrationArgs) else 0, options)
            undo.pop_all()
    except CheckpointError as error:
        raise error.of_file(name) from None
    except OSError as error:  # whatever name it has may be that of a descriptor
        raise StorageError(f"{name}: {error.strerror}", error.errno) from error
    return base


def _open_path(path: str, identity: Identity, forbidden_device: int) -> BackingFile:
    with contextlib.ExitStack() as undo:
        with identity.assumed():
            fd = open_regular(path)
        undo.callback(os.close, fd)
        if os.fstat(fd).st_dev == forbidden_device:
            raise CommandError(f"{path}: lies on this mount")
        undo.pop_all()
    return OpenedFile(fd, os.O_RDONLY)
