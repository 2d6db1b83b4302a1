"""The differences of object stores: Google Cloud Storage (gs://) and S3 with all stores that speak its protocol (s3://).

`buckets` has the paths, which are alike. Settings come from the places where the libraries look for them: for s3:// these are
AWS_ENDPOINT_URL, AWS_REGION, AWS_PROFILE, AWS_ACCESS_KEY_ID and so on, ~/.aws, and the role of the machine.
"""

import asyncio
import base64
import functools
import hashlib
import logging
import os
import re
from typing import Any, ClassVar

import fsspec

CONNECT_SECONDS = 20.0  # until a request is tried again, six times in all
READ_SECONDS = 60.0  # likewise
ATTEMPTS = 6
AWS_HOST = re.compile(r"https?://[^/]*\.amazonaws\.com(\.cn)?/?")
# Of botocore's names for how it found the keys: TensorStore's name for the same.
CREDENTIALS = {
    "env": "environment",
    "shared-credentials-file": "profile",
    "config-file": "profile",
    "iam-role": "imds",
    "container-role": "ecs",
}


class Store:
    """An object store.

    Attributes:
      scheme: the beginning of its addresses.
      title: its name in words.
      library: the fsspec file system that must be installed.
      access: what to do when it refuses this user.
    """

    scheme: ClassVar[str]
    title: ClassVar[str]
    library: ClassVar[str]
    access: ClassVar[str]

    def configure(self) -> None:
        """Sets timeouts and silences loggers, for all users of the library in this process."""
        raise NotImplementedError

    def file_system(self) -> Any:
        """Returns the file system, the same that Orbax and JAX use."""
        raise NotImplementedError

    def require_bucket(self, bucket: str) -> None:
        """Asks for a bucket. Raises: what the library raises if there is none or this user cannot read it."""
        raise NotImplementedError

    def upload(self, file: str, address: str) -> None:
        """Writes the content of a local file to an object."""
        self.file_system().put_file(file, address)

    def md5(self, address: str) -> str:
        """Returns the MD5 of an object in base64, as the store holds it; "" if it holds none. Raises: FileNotFoundError."""
        raise NotImplementedError

    def version(self, info: dict[str, Any]) -> Any:
        """Returns what changes when an object is written, from its metadata."""
        raise NotImplementedError

    def is_denied(self, error: Exception) -> bool:
        """Returns whether an error is one of credentials or permissions."""
        raise NotImplementedError

    def exists_already(self, error: Exception) -> bool:
        """Returns whether an object that must be new was not written because there is one."""
        return isinstance(error, FileExistsError)


class GoogleStorage(Store):
    """Google Cloud Storage, through gcsfs."""

    scheme, title, library = "gs://", "Google Cloud Storage", "gcsfs"
    access = "log in (gcloud auth application-default login) or ask its owner"

    def configure(self) -> None:
        """Sets timeouts, silences the logger, and disables the cache of listings."""
        _configure_gcsfs()

    def file_system(self) -> Any:
        """Returns the file system as Orbax opens it, so that both share one."""
        return fsspec.filesystem("gcs", finalize_on_close=True)

    def require_bucket(self, bucket: str) -> None:
        """Lists one object."""
        self.file_system().call("GET", "b/{}/o", bucket, maxResults=1)

    def md5(self, address: str) -> str:
        """Returns the MD5 of an object, which objects that were composed of others have not."""
        return self.file_system().info(address).get("md5Hash", "")

    def version(self, info: dict[str, Any]) -> Any:
        """Returns the generation."""
        return int(info["generation"])

    def is_denied(self, error: Exception) -> bool:
        """Returns whether it is status 401 or 403, or an error of Google's login."""
        denied = getattr(error, "code", None) in (401, 403) or str(error).startswith("Forbidden")
        return denied or type(error).__module__.startswith("google.auth")


class S3(Store):
    """Amazon S3 and compatible stores (AWS_ENDPOINT_URL), through s3fs.

    The store's ETag of an object is the MD5 of its content only if the object was written by one request and is not encrypted
    with keys of KMS or of the user. Files that are uploaded carry their MD5 as metadata.
    """

    scheme, title, library = "s3://", "an S3 store", "s3fs"
    access = "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or log in (aws configure, aws sso login), or ask its owner"

    def configure(self) -> None:
        """Sets timeouts and attempts, and disables the cache of listings."""
        _configure_s3fs()

    def file_system(self) -> Any:
        """Returns the file system as etils opens it, so that Orbax and JAX share it."""
        return fsspec.filesystem("s3")

    def require_bucket(self, bucket: str) -> None:
        """Lists one object."""
        self.file_system().call_s3("list_objects_v2", Bucket=bucket, MaxKeys=1)

    def upload(self, file: str, address: str) -> None:
        """Writes a local file's content to an object, with its MD5: large files go up in parts, whose ETag is none."""
        with open(file, "rb") as content:
            digest = hashlib.file_digest(content, lambda: hashlib.md5(usedforsecurity=False)).digest()
        metadata = {"md5": base64.b64encode(digest).decode()}
        self.file_system().put_file(file, address, Metadata=metadata)

    def md5(self, address: str) -> str:
        """Returns the MD5 that was uploaded with an object, or its ETag where that is one."""
        bucket, _, key = address.removeprefix(self.scheme).partition("/")
        head = self.file_system().call_s3("head_object", Bucket=bucket, Key=key)
        if uploaded := head.get("Metadata", {}).get("md5"):
            return uploaded
        tag = head.get("ETag", "").strip('"')
        encrypted = head.get("ServerSideEncryption", "AES256") != "AES256" or "SSECustomerAlgorithm" in head
        if encrypted or not re.fullmatch("[0-9a-f]{32}", tag):
            return ""
        return base64.b64encode(bytes.fromhex(tag)).decode()

    def version(self, info: dict[str, Any]) -> Any:
        """Returns the ETag."""
        return info["ETag"]

    def is_denied(self, error: Exception) -> bool:
        """Returns whether it is status 401 or 403, or there are no credentials."""
        kind, status = type(error), _response(error).get("ResponseMetadata", {}).get("HTTPStatusCode")
        in_search = kind.__module__ == "botocore.exceptions" and bool(
            re.search("Credential|Token|SSO|Prof", kind.__name__)
        )
        return isinstance(error, PermissionError) or status in (401, 403) or in_search

    def exists_already(self, error: Exception) -> bool:
        """Returns whether the condition of the request failed, also by a write at the same moment."""
        code = _response(error).get("Error", {}).get("Code")
        return isinstance(error, FileExistsError) or code in ("PreconditionFailed", "ConditionalRequestConflict", "412")

    def tensorstore_driver(self) -> dict[str, Any]:
        """Returns the settings of TensorStore's s3 driver that lead to the same store with the same keys as s3fs."""
        files = self.file_system()
        files.connect()
        driver: dict[str, Any] = {"driver": "s3"}
        endpoint = files.s3.meta.endpoint_url
        if not AWS_HOST.fullmatch(endpoint):  # there, TensorStore asks for the region of a bucket
            driver |= {"endpoint": endpoint, "aws_region": files.s3.meta.region_name or "us-east-1"}
        credentials = asyncio.run_coroutine_threadsafe(files.session.get_credentials(), files.loop).result()
        if known := CREDENTIALS.get(getattr(credentials, "method", "")):
            driver["aws_credentials"] = {"type": known}
            if known == "profile" and "AWS_PROFILE" in os.environ:
                driver["aws_credentials"]["profile"] = os.environ["AWS_PROFILE"]
        return driver


def _response(error: Exception) -> dict[str, Any]:
    """The store's answer, which s3fs has made an error of."""
    return getattr(error.__cause__, "response", None) or {}


STORES: dict[str, Store] = {store.scheme: store for store in (GoogleStorage(), S3())}


@functools.cache
def _configure_gcsfs() -> None:
    import aiohttp  # a dependency of gcsfs

    logging.getLogger("gcsfs").setLevel(logging.CRITICAL + 1)  # it logs what it raises
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
    # Listings are not cached: other processes write there, and so do other libraries in this one.
    fsspec.config.conf.setdefault("gcs", {"use_listings_cache": False, "requests_timeout": timeout})


@functools.cache
def _configure_s3fs() -> None:
    fsspec.get_filesystem_class("s3").retries = 2  # times the attempts of botocore
    retries = {"mode": "standard", "total_max_attempts": ATTEMPTS}
    client = {"connect_timeout": CONNECT_SECONDS, "read_timeout": READ_SECONDS, "retries": retries}
    fsspec.config.conf.setdefault("s3", {"use_listings_cache": False, "config_kwargs": client})
