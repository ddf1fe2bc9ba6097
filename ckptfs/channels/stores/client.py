"""One object of a store, asked for through obstore: what it is now, and parts of one version of it.

Every answer, and every attempt to get one, ends before a read of RAM has to (`BACKING_DEADLINE`). Methods block.
"""

import contextlib
import errno
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from ckptfs.channels.stores import credentials
from ckptfs.channels.stores.errors import explain
from ckptfs.channels.version import NOTHING, ObjectVersion, Version
from ckptfs.errors import CommandError, StateError, StorageError
from ckptfs.migration.address import WEB, ObjectAddress
from ckptfs.migration.store import StoreOptions

if TYPE_CHECKING:
    from obstore.store import ObjectStore

REQUEST_DEADLINE = 10.0
"""Seconds for one request and its answer."""

_RETRIES = 3
_RETRY_DEADLINE = 30.0
"""Seconds after which none is begun any more."""


class ObjectGoneError(StorageError):
    """The version of the object that was wanted is not there any more, and never will be."""


class Object:
    """The object at ``address``; nothing is asked before one of its methods is."""

    def __init__(self, address: ObjectAddress, options: StoreOptions) -> None:
        """Raises StorageError without credentials, or without the packages that all this needs."""
        self.address = address
        self.url = address.url
        self.options = options
        self._store = _open_store(address, options)
        self._path = unquote(address.key) if address.scheme in WEB else address.key

    def find(self) -> Version:
        """What is there now; `NOTHING` if that is nothing.

        Raises StorageError where the bucket is missing, or the server can't say which version it has.
        """
        import obstore

        try:
            with self._in_words(FileNotFoundError):
                meta = obstore.head(self._store, self._path)
        except FileNotFoundError:
            self._refuse_missing_bucket()
            return NOTHING
        etag = meta["e_tag"]
        if not etag or etag.startswith("W/"):
            raise StorageError(
                f"{self.url}: the server tells no version of the file (no strong ETag), so that pages of two could "
                "be mixed: download it, and mount the copy",
                errno.EINVAL,
            )
        version = meta["version"]
        return ObjectVersion(etag, meta["size"], None if version == "null" else version)

    def _refuse_missing_bucket(self) -> None:
        """An answer to HEAD has no room for a reason; one to GET has."""
        import obstore

        try:
            obstore.get(self._store, self._path)
        except FileNotFoundError as error:
            if "<Code>NoSuchBucket</Code>" in str(error):
                raise explain(self.url, error) from None

    def get(self, version: ObjectVersion, start: int, stop: int) -> memoryview:
        """Return bytes [start, stop) of this version, and of no other.

        Raises ObjectGoneError if it is gone, StorageError.
        """
        import obstore
        from obstore.exceptions import PreconditionError

        options: Any = {"range": (start, stop), "if_match": version.etag}
        if version.version is not None:
            options["version"] = version.version
        try:
            with self._in_words(PreconditionError, FileNotFoundError):
                answer = obstore.get(self._store, self._path, options=options)
                data = memoryview(answer.bytes())
        except PreconditionError:
            raise ObjectGoneError(f"{self.url}: was overwritten since it was mounted") from None
        except FileNotFoundError:
            raise ObjectGoneError(f"{self.url}: was removed since it was mounted") from None
        if answer.meta["e_tag"] != version.etag or len(data) != stop - start:
            raise StorageError(f"{self.url}: the store sent other bytes than those that it was asked for")
        return data

    def put(self, data: bytes, expected: Version) -> ObjectVersion:
        """Replace what is there by ``data`` (small: one request), if that is ``expected``. StateError if not."""
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        mode: Any = "create"
        if isinstance(expected, ObjectVersion):
            mode = {"e_tag": expected.etag}
            if expected.version is not None:
                mode["version"] = expected.version
        try:
            with self._in_words(AlreadyExistsError, PreconditionError):
                answer = obstore.put(self._store, self._path, data, mode=mode, use_multipart=False)
        except (AlreadyExistsError, PreconditionError):
            raise StateError(f"{self.url}: was written by somebody else just now", errno.ESTALE) from None
        return ObjectVersion(answer["e_tag"] or "", len(data), answer["version"])

    def put_parts(self, parts: Iterator[bytes], part_size: int) -> str | None:
        """Replace what is there by all ``parts``, one after another, when the last has come; return the new ETag.

        An error that ``parts`` raises ends it, and nothing is left behind.
        """
        import obstore

        with self._in_words():
            return obstore.put(self._store, self._path, parts, chunk_size=part_size, max_concurrency=4)["e_tag"]

    @contextlib.contextmanager
    def _in_words(self, *told: type[Exception]) -> Iterator[None]:
        """Turn errors of obstore into ours, but for those that the caller can tell himself."""
        from obstore.exceptions import BaseError

        try:
            yield
        except told:
            raise
        except (BaseError, FileNotFoundError) as error:
            raise explain(self.url, error) from None
        except BaseException as error:
            if type(error).__name__ == "PanicException":  # of Rust: a class that can't be named, and no Exception
                raise StorageError(f"{self.url}: obstore has failed: {error}") from None
            raise


def _open_store(address: ObjectAddress, options: StoreOptions) -> "ObjectStore":
    try:
        from obstore.store import AzureStore, GCSStore, HTTPStore, S3Store
    except ImportError:
        raise StorageError(
            f"{address.url}: objects need more packages: pip install 'ckptfs[remote]'", errno.ENOSYS
        ) from None
    deadline = timedelta(seconds=REQUEST_DEADLINE)
    how: Any = {
        "client_options": {"timeout": deadline, "connect_timeout": deadline / 2},
        "retry_config": {"max_retries": _RETRIES, "retry_timeout": timedelta(seconds=_RETRY_DEADLINE)},
    }
    endpoint = credentials.endpoint(options.endpoint) if address.scheme == "s3" else options.endpoint
    if (endpoint or address.url).startswith("http://"):
        how["client_options"]["allow_http"] = True
    match address.scheme:
        case "s3":
            if not credentials.in_environment():
                how["credential_provider"] = credentials.aws_credential_provider(address.url)
            if endpoint is not None:
                how["endpoint"] = endpoint
            return S3Store(address.bucket, region=credentials.region(options.region), **how)
        case "az":
            if endpoint is not None:
                how["endpoint"] = endpoint
            return AzureStore(address.bucket, **how)
    if options.endpoint is not None:
        raise CommandError(f"{address.url}: endpoint= is for s3:// and az://")
    if address.scheme == "gs":
        return GCSStore(address.bucket, **how)
    return HTTPStore.from_url(f"{address.scheme}://{address.bucket}", **how)
