"""Where a save to an object goes: a local file first, and from there into the store as one upload.

The guest has long gone on when the upload begins. Its completion publishes it: until then, and after any failure,
the former object is as it was. On S3 the completion is conditional (If-Match), so that what another host has
written since is not replaced; elsewhere the object is looked at just before it. What a dead daemon has left of an
upload is aborted by the next save of this host to the same name, from the record that is kept of each.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from ckptfs.channels.backing_file import BackingFile, DirectIO, OpenedFile, pread_exactly, pwrite_all
from ckptfs.channels.identity import Identity
from ckptfs.channels.stores import credentials
from ckptfs.channels.stores.client import REQUEST_DEADLINE, Object
from ckptfs.channels.stores.errors import explain_answer
from ckptfs.channels.stores.kept import unnamed_file, working_directory
from ckptfs.channels.version import ObjectVersion, Version
from ckptfs.errors import CommandError, StateError, StorageError
from ckptfs.foreign.libvirt import SaveImage
from ckptfs.foreign.sparse_tar import end_of_tar, is_tar, join_extents, sparse_head
from ckptfs.mapped_ram.stream import MAGIC
from ckptfs.migration.address import WEB, ObjectAddress
from ckptfs.migration.size import MiB
from ckptfs.migration.store import StoreOptions

PART_SIZE = 8 * MiB
PART_COUNT = 9000
"""Parts of one upload, of the 10,000 that S3 takes."""

_PARTS_AT_ONCE = 4
_HEAD_LENGTH = 512
_WAYS_OUT = "save elsewhere, or replace it with `save force`"


class ObjectTarget:
    """A local file on its way to an object."""

    def __init__(
        self, address: ObjectAddress, options: StoreOptions, identity: Identity, expected: Version | None
    ) -> None:
        """``expected``: replace this version of the object and no other; None: any that is a checkpoint.

        Raises CommandError for what must not be replaced, StateError (ESTALE) for another version, StorageError.
        """
        self.path = address.url
        identity.refuse_stranger(address.url)
        if address.scheme in WEB:
            raise CommandError(f"{address.url}: a web server takes no saves: save to a file or s3://", errno.EROFS)
        self.save_image: SaveImage | None = None
        self.published: Version | None = None
        self._options = options
        self._ended = False
        self._object = Object(address, options)
        self._former = self._object.find()
        if expected not in (None, self._former):
            raise self._changed()
        self._refuse_other_content()
        self._upload = _S3Upload(address, options) if address.scheme == "s3" else None
        if self._upload is not None:
            self._upload.abort_leftovers()
        self.file = OpenedFile(unnamed_file(), os.O_RDWR)

    def keep_prefix(self) -> None:
        """An object begins with its checkpoint."""

    def seal(self, file_offset: int, header: bytes) -> None:
        """Write the header; the upload decides."""
        pwrite_all(self.file.fd, header, file_offset)

    def reader(self) -> BackingFile | None:
        """The local file: all of the object is in it."""
        fd, _ = OpenedFile(self.file.fd, os.O_RDONLY).open_pages(DirectIO(False))
        return OpenedFile(fd, os.O_RDONLY)

    def publish(self, commit: Callable[[], None] = lambda: None, go_on: Callable[[], None] = lambda: None) -> None:
        """Upload it. ``go_on`` is called before each part, and may raise to give it up."""
        tar = _Tar(self.file.fd, self.path.rpartition("/")[2])
        part_size = self._options.part_size or _part_size(tar.length)
        send = self._send if self._upload is None else self._upload.send
        self.published = send(tar, part_size, self._former, commit, go_on, self._refuse_changed)
        found = self._object.find()
        if not isinstance(found, ObjectVersion) or found.length != tar.length:
            raise StorageError(f"{self.path}: was uploaded, but is not there as it was sent: save again")
        self.published = self.published or found
        self._close()

    def discard(self) -> None:
        """Give the local file up; of an upload that failed nothing is left."""
        if not self._ended:
            self._close()

    def _close(self) -> None:
        self._ended = True
        self.file.close()

    def _send(
        self,
        tar: "_Tar",
        part_size: int,
        former: Version,
        commit: Callable[[], None],
        go_on: Callable[[], None],
        refuse_changed: Callable[[], None],
    ) -> None:
        """Upload to a store that is not S3; which version it is then, a look tells."""

        def parts() -> Iterator[bytes]:
            for start in range(0, tar.length, part_size):
                go_on()
                yield tar.read(start, min(start + part_size, tar.length))
            with ThreadPoolExecutor(1) as thread:  # the store can't be asked in this one, which obstore waits in
                thread.submit(refuse_changed).result()
            commit()

        self._object.put_parts(parts(), part_size)

    def _refuse_changed(self) -> None:
        if self._object.find() != self._former:
            raise self._changed()

    def _changed(self) -> StateError:
        return StateError(
            f"{self.path}: somebody else has changed it since it was mounted or last saved: {_WAYS_OUT}",
            errno.ESTALE,
        )

    def _refuse_other_content(self) -> None:
        former = self._former
        if not isinstance(former, ObjectVersion) or not former.length:
            return
        head = bytes(self._object.get(former, 0, min(_HEAD_LENGTH, former.length)))
        if not is_tar(head) and not head.startswith(MAGIC.to_bytes(4)):
            raise CommandError(
                f"{self.path}: exists and holds no checkpoint; remove it or save to another name", errno.EEXIST
            )


def _part_size(length: int) -> int:
    return max(PART_SIZE, -(-length // PART_COUNT // MiB) * MiB)


class _Tar:
    """A file with holes as the tar that is uploaded; it is made while it is read."""

    def __init__(self, fd: int, name: str) -> None:
        self._fd = fd
        length = os.lseek(fd, 0, os.SEEK_END)
        self._head, self._map = sparse_head(name, length, join_extents(_extents(fd)), int(time.time()))
        self._data_end = len(self._head) + self._map.stored_length
        self._tail = end_of_tar(self._map.stored_length)
        self.length = self._data_end + len(self._tail)

    def read(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of the tar."""
        parts: list[bytes | bytearray] = [self._head[start:stop]]
        first, last = (min(max(x, len(self._head)), self._data_end) - len(self._head) for x in (start, stop))
        for begin, end in self._map.file_extents(first, last):
            data = bytearray(end - begin)
            pread_exactly(self._fd, memoryview(data), begin)
            parts.append(data)
        parts.append(self._tail[max(start - self._data_end, 0) : max(stop - self._data_end, 0)])
        return b"".join(parts)


def _extents(fd: int) -> "np.ndarray[tuple[int, ...], np.dtype[np.int64]]":
    """What is stored of a file: rows (start, stop)."""
    rows: list[tuple[int, int]] = []
    position = 0
    while True:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return np.array(rows, np.int64).reshape(-1, 2)
            raise
        position = os.lseek(fd, start, os.SEEK_HOLE)
        rows.append((start, position))


class _S3Upload:
    """Multipart uploads to one object, through botocore."""

    def __init__(self, address: ObjectAddress, options: StoreOptions) -> None:
        from botocore.config import Config

        credentials.aws_credentials(address.url)
        endpoint = credentials.endpoint(options.endpoint)
        config = Config(
            connect_timeout=REQUEST_DEADLINE / 2,
            read_timeout=REQUEST_DEADLINE,
            retries={"mode": "standard", "total_max_attempts": 3},
            max_pool_connections=_PARTS_AT_ONCE,
            s3={"addressing_style": "auto" if endpoint is None else "path"},
        )
        region = credentials.region(options.region)
        self._client: Any = credentials.session().create_client("s3", region, endpoint_url=endpoint, config=config)
        self._url = address.url
        self._place = {"Bucket": address.bucket, "Key": address.key}
        digest = hashlib.sha256(f"{endpoint} {address.url}".encode(errors="surrogateescape")).hexdigest()
        self._prefix = f"upload-{digest[:32]}-"

    def send(
        self,
        tar: _Tar,
        part_size: int,
        former: Version,
        commit: Callable[[], None],
        go_on: Callable[[], None],
        refuse_changed: Callable[[], None],
    ) -> ObjectVersion:
        """Upload all of ``tar`` in the place of ``former``, or nothing; return what is there then.

        Raises StateError (ESTALE), StorageError.
        """
        token = secrets.token_hex(16)
        with self._in_words():
            begun = self._client.create_multipart_upload(**self._place, Metadata={"ckptfs-save": token})
        upload = {**self._place, "UploadId": begun["UploadId"]}
        record = self._keep_record(begun["UploadId"])
        try:

            def send_part(number: int) -> dict[str, Any]:
                go_on()
                start = (number - 1) * part_size
                data = tar.read(start, min(start + part_size, tar.length))
                answer = self._client.upload_part(**upload, PartNumber=number, Body=data)
                return {"PartNumber": number, "ETag": answer["ETag"]}

            with self._in_words():
                with ThreadPoolExecutor(_PARTS_AT_ONCE) as threads:
                    parts = list(threads.map(send_part, range(1, -(-tar.length // part_size) + 1)))
                refuse_changed()
                commit()
                done = self._complete(upload, parts, former, token)
        except BaseException:
            if self._abort(begun["UploadId"]):
                self._remove_record(record)
            os.close(record[1])
            raise
        self._remove_record(record)
        os.close(record[1])
        return ObjectVersion(done["ETag"], tar.length, done.get("VersionId"))

    def _complete(self, upload: dict[str, str], parts: list[Any], former: Version, token: str) -> dict[str, Any]:
        from botocore.exceptions import BotoCoreError, ClientError

        condition = {"IfMatch": former.etag} if isinstance(former, ObjectVersion) else {"IfNoneMatch": "*"}
        try:
            done: dict[str, Any] = self._client.complete_multipart_upload(
                **upload, MultipartUpload={"Parts": parts}, **condition
            )
        except (BotoCoreError, ClientError):
            found = self._find(token)  # the answer may have got lost, and the question been asked again
            if found is None:
                raise
            return found
        return done

    def _find(self, token: str) -> dict[str, Any] | None:
        """What is there, if it is of the save with this token."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            found: dict[str, Any] = self._client.head_object(**self._place)
        except (BotoCoreError, ClientError):
            return None
        return found if found["Metadata"].get("ckptfs-save") == token else None

    @contextlib.contextmanager
    def _in_words(self) -> Iterator[None]:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except ClientError as error:
            code = error.response["Error"].get("Code")
            status = error.response["ResponseMetadata"]["HTTPStatusCode"]
            if status in (409, 412):
                raise StateError(
                    f"{self._url}: was written by somebody else meanwhile: {_WAYS_OUT}", errno.ESTALE
                ) from None
            raise explain_answer(self._url, status, code) from None
        except BotoCoreError as error:
            raise StorageError(f"{self._url}: the store gives no answer ({type(error).__name__})") from None

    # ---- what is left of uploads -------------------------------------------------------------------

    def abort_leftovers(self) -> None:
        """Abort uploads to this object that a daemon of this host has begun, and not ended before it died."""
        directory = working_directory()
        for name in os.listdir(directory):
            if not name.startswith(self._prefix):
                continue
            with contextlib.suppress(OSError, ValueError):
                path = os.path.join(directory, name)
                fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if self._abort(json.loads(os.read(fd, 1 << 16))["upload"]):
                        os.unlink(path)
                finally:
                    os.close(fd)

    def _abort(self, upload_id: str) -> bool:
        """Abort an upload; return whether it is gone."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            self._client.abort_multipart_upload(**self._place, UploadId=upload_id)
        except ClientError as error:
            return bool(error.response["Error"].get("Code") == "NoSuchUpload")
        except BotoCoreError:
            return False
        return True

    def _keep_record(self, upload_id: str) -> tuple[str, int]:
        path = os.path.join(working_directory(), f"{self._prefix}{secrets.token_hex(6)}")
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(fd, json.dumps({"object": self._url, "upload": upload_id}).encode())
        return path, fd

    def _remove_record(self, record: tuple[str, int]) -> None:
        with contextlib.suppress(OSError):
            os.unlink(record[0])
