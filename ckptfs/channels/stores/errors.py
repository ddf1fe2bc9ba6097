"""What went wrong at a store, in words that hold no secret: what it answered is never shown as it came.

An answer to a wrong signature may repeat the key and what was signed. So of all it says, its status and the code of
its error count (Amazon S3 API Reference, error responses).
"""

import errno
import re

from ckptfs.errors import StorageError

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w{1,64})</Code>")

_WORDS = {
    "NoSuchBucket": (errno.ENOENT, "there is no such bucket"),
    "NoSuchKey": (errno.ENOENT, "there is no such object"),
    "InvalidAccessKeyId": (errno.EACCES, "the store does not know the access key (AWS_ACCESS_KEY_ID, AWS_PROFILE)"),
    "SignatureDoesNotMatch": (errno.EACCES, "the secret key does not fit the access key (AWS_SECRET_ACCESS_KEY)"),
    "ExpiredToken": (errno.EACCES, "the credentials have expired"),
    "RequestTimeTooSkewed": (errno.EACCES, "this host's clock is wrong: the store takes no requests from it"),
    "EntityTooSmall": (errno.EINVAL, "the store wants larger parts: mount with a larger part_size="),
    "QuotaExceeded": (errno.EDQUOT, "the quota is used up"),
}
"""By the code of an S3 error."""

_BY_STATUS = {
    301: (errno.EINVAL, "the bucket is in another region: mount with region="),
    401: (errno.EACCES, "the store wants credentials"),
    403: (errno.EACCES, "the store refuses these credentials: a wrong key, or no right to do this here"),
    404: (errno.ENOENT, "there is no such object"),
    412: (errno.ESTALE, "the object has changed"),
    507: (errno.ENOSPC, "the store is full"),
}


def explain(url: str, error: BaseException) -> StorageError:
    """The same of an error of obstore: what happened to ``url``, by its class, status and code."""
    from obstore import exceptions

    text = str(error)
    status, code = _STATUS.search(text), _CODE.search(text)
    if status is not None:
        return explain_answer(url, int(status[1]), code and code[1])
    if isinstance(error, exceptions.NotSupportedError):
        return StorageError(f"{url}: the server can't send a part of a file (it knows no ranges)")
    if "kind: Timeout" in text or "operation timed out" in text:
        return StorageError(f"{url}: the store gives no answer")
    if "kind: Connect" in text:
        return StorageError(f"{url}: the store can't be reached")
    if "kind: Interrupted" in text or "IncompleteMessage" in text:
        return StorageError(f"{url}: the connection to the store broke")
    if isinstance(error, exceptions.UnauthenticatedError):
        return StorageError(f"{url}: the store wants credentials", errno.EACCES)
    return StorageError(f"{url}: the store's answer is of no use ({type(error).__name__})")


def explain_answer(url: str, status: int, code: str | None) -> StorageError:
    """The same of an answer's HTTP status, and its error's code, if it has one."""
    number, words = _WORDS.get(code or "") or _BY_STATUS.get(status, (errno.EIO, "the store refuses this"))
    return StorageError(f"{url}: {words} ({code or status})", number)
