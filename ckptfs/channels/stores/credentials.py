"""Where keys come from: the environment, and AWS profiles (~/.aws). Never from what is mounted, nor from a network.

obstore reads the environment by itself; profiles, with all that they may say (SSO, roles, a program), botocore.
"""

import errno
import functools
import os
from typing import TYPE_CHECKING, Any

from ckptfs.errors import StorageError

if TYPE_CHECKING:
    from botocore.session import Session

NO_CREDENTIALS = "no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, for mount.ckptfs"


def in_environment() -> bool:
    """Whether there is a key of S3 in the environment."""
    return bool(os.environ.get("AWS_ACCESS_KEY_ID") and os.environ.get("AWS_SECRET_ACCESS_KEY"))


@functools.cache
def session() -> "Session":
    """The session of botocore. Nobody is asked for a key: the metadata service of a cloud may not be one."""
    import botocore.session

    found = botocore.session.get_session()
    found.get_component("credential_provider").remove("iam-role")
    return found


def aws_credential_provider(url: str) -> Any:
    """What gives obstore the keys of the profile, and new ones when they expire. StorageError if it has none."""
    credentials = aws_credentials(url)

    def provide() -> dict[str, Any]:
        keys = credentials.get_frozen_credentials()
        return {
            "access_key_id": keys.access_key,
            "secret_access_key": keys.secret_key,
            "token": keys.token,
            "expires_at": getattr(credentials, "_expiry_time", None),
        }

    return provide


def aws_credentials(url: str) -> Any:
    """Those of botocore; StorageError (EACCES), naming what is to be set, if there are none."""
    from botocore.exceptions import BotoCoreError

    try:
        credentials = session().get_credentials()
    except BotoCoreError as error:
        raise StorageError(f"{url}: the AWS profile can't be used: {error}", errno.EACCES) from None
    if credentials is None:
        raise StorageError(f"{url}: {NO_CREDENTIALS}", errno.EACCES)
    return credentials


def region(wanted: str | None) -> str:
    """The region to sign for: as mounted, of the environment, of the profile, or the one that S3 began with."""
    found = wanted or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if found is None and not in_environment():
        found = session().get_config_variable("region")
    return found or "us-east-1"


def endpoint(wanted: str | None) -> str | None:
    """The store's URL, as mounted or of the environment."""
    return wanted or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
