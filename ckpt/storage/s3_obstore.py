"""The same S3 store with its bulk bytes moved by obstore, a client in Rust (extra ``[obstore]``).

Everything small (creates, listings, deletes, sizes) stays with s3fs, and so do credentials,
profile and endpoint: what is promised about them is proven once. obstore takes whole uploads and
reads, whose cost is processor time per byte. It signs the SHA-256 of what it sends, so the
server verifies the bytes.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from ckpt.errors import ConfigError

from .faultpoints import hit
from .retry import RetryPolicy
from .s3 import S3Storage
from .s3_session import CONCURRENCY, S3Session
from .s3_upload import SINGLE_PUT_BYTES, confirm, cut, part_bytes

try:
    import obstore
    from obstore.store import S3Store
except ModuleNotFoundError as missing:
    _msg = "the obstore backend needs obstore: pip install 'archon-lora[obstore]'"
    raise ConfigError(_msg) from missing

_STATUS = re.compile(r"status code: (?P<status>\d{3})")
_CODE = re.compile(r"<Code>(?P<code>\w+)</Code>")
_MESSAGE = re.compile(r"<Message>(?P<message>[^<]*)</Message>")
_CERTIFICATE = re.compile(r"InvalidCertificate\(\s*(?:Other\(\s*OtherError\(\s*)?(?P<why>\w+)")
_FATAL = ("InvalidPathError", "NotSupportedError", "UnknownConfigurationKeyError")
_CREDENTIALS_FOR = timedelta(minutes=5)
"""How long obstore keeps credentials before it asks again; botocore renews them by itself."""

_runtime_of: set[int] = set()
"""The process in which obstore's threads run; they do not survive a fork."""


class ServerSaid(Exception):
    """An HTTP answer other than success, in the form that botocore's errors have."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(f"HTTP {status} {code}: {message}")
        self.response = {
            "Error": {"Code": code, "Message": message},
            "ResponseMetadata": {"HTTPStatusCode": status},
        }


class ObstoreSession(S3Session):
    """One bucket, whose reads and uploads obstore does; see :class:`S3Session`."""

    def __init__(
        self, bucket: str, options: Mapping[str, Any], policy: RetryPolicy, *, checksum: bool
    ) -> None:
        super().__init__(bucket, options, policy, checksum=checksum)
        self._stores: tuple[Any, Any] | None = None

    def close(self) -> None:
        """Close the connections; the next request opens new ones."""
        self._stores = None
        super().close()

    async def fetch(self, key: str, span: tuple[int, int] | None) -> Any:
        """One read, never repeated; the caller repeats it."""
        if _forked():
            return await super().fetch(key, span)
        once, _ = await self._bulk()
        self.meter.add(requests=1)
        try:
            if span is None:
                answer = await obstore.get_async(once, key)
                data = (await answer.bytes_async()).to_bytes()
            else:
                data = await obstore.get_range_async(once, key, start=span[0], end=span[1])
        except Exception as error:  # noqa: BLE001 - raised again in the terms of fate_of
            raise understood(error) from None
        self.meter.add(received=len(data))
        return data

    async def put(self, key: str, body: bytes) -> None:
        """One upload in one request, never repeated; the caller repeats it."""
        once, _ = await self._bulk()
        self.meter.add(requests=1, sent=len(body))
        try:
            await obstore.put_async(once, key, body, use_multipart=False)
        except Exception as error:  # noqa: BLE001 - raised again in the terms of fate_of
            raise understood(error) from None

    async def put_parts(self, key: str, views: Iterable[memoryview], size: int) -> None:
        """A multipart upload, its requests repeated, aborted on any error."""
        _, patient = await self._bulk()
        part = part_bytes(size)
        source = _Parts(cut(views, part), self)
        try:
            await obstore.put_async(
                patient,
                key,
                source,
                use_multipart=True,
                chunk_size=part,
                max_concurrency=CONCURRENCY,
            )
        except Exception as error:  # noqa: BLE001 - raised again, or settled by the object
            if source.failure is not None:
                raise source.failure from None
            if not source.exhausted:
                raise understood(error) from None
            await confirm(self, key, size, source.count, understood(error))
        else:
            await confirm(self, key, size, source.count)
        finally:
            self.meter.add(requests=2)  # the first and the last one
        hit("object.multipart.after_complete")

    async def _bulk(self) -> tuple[Any, Any]:
        """Stores without and with repetition of their own, made on the event loop."""
        if self._stores is None:
            _runtime_of.add(os.getpid())
            fs = self._filesystem()
            client = await fs.set_session()
            self._stores = (
                self._connect(fs, client, 0),
                self._connect(fs, client, self.policy.attempts - 1),
            )
        return self._stores

    def _connect(self, fs: Any, client: Any, retries: int) -> Any:
        endpoint, region = client.meta.endpoint_url, client.meta.region_name
        limit = timedelta(seconds=self.policy.limit(SINGLE_PUT_BYTES))
        config: dict[str, Any] = {
            "endpoint": endpoint,
            "region": "us-east-1" if region in {None, "aws-global"} else region,
            "unsigned_payload": not self._checksum,
        }
        more: dict[str, Any] = {}
        if fs.anon:
            config["skip_signature"] = True
        else:
            more["credential_provider"] = lambda: asyncio.run_coroutine_threadsafe(
                self._credentials(fs), fs.loop
            ).result(timeout=self.policy.seconds)
        return S3Store(
            self.bucket,
            config=config,
            client_options={
                "allow_http": endpoint.startswith("http://"),
                "connect_timeout": timedelta(seconds=10),
                "timeout": limit,
                **self._trust(),
            },
            retry_config={
                "max_retries": retries,
                "retry_timeout": limit * (retries + 1),
                "backoff": {
                    "init_backoff": timedelta(seconds=self.policy.base),
                    "max_backoff": timedelta(seconds=self.policy.cap),
                    "base": 2,
                },
            },
            **more,
        )

    def _trust(self) -> dict[str, Any]:
        """Which servers to trust: as botocore decides it, by option, then by environment."""
        verify = self._options.get("client_kwargs", {}).get("verify")
        if verify is False or self._options.get("use_ssl") is False:
            return {"allow_invalid_certificates": True}
        bundle = verify if isinstance(verify, str) else os.environ.get("AWS_CA_BUNDLE")
        if not bundle:
            return {}
        try:
            return {"root_certificate": Path(bundle).read_bytes()}
        except OSError as error:
            msg = f"cannot read the certificates of the S3 server: {bundle}: {error.strerror}"
            raise ConfigError(msg) from None

    async def _credentials(self, fs: Any) -> dict[str, Any]:
        """What s3fs signs with: the options, or what botocore's chain finds."""
        if self._options.get("key") and self._options.get("secret"):
            return {
                "access_key_id": self._options["key"],
                "secret_access_key": self._options["secret"],
                "token": self._options.get("token"),
                "expires_at": None,
            }
        found = await fs.session.get_credentials()
        if found is None:
            msg = "no AWS credentials in the options, the environment or a profile"
            raise ConfigError(msg)
        frozen = await found.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + _CREDENTIALS_FOR,
        }


class ObstoreStorage(S3Storage):
    """:class:`S3Storage` with obstore for the bytes; the same arguments and promises."""

    _session: ObstoreSession
    _session_class = ObstoreSession

    async def _put_whole(self, key: str, body: bytes) -> None:
        if _forked():
            await super()._put_whole(key, body)
        else:
            await self._session.repeat(len(body), lambda: self._session.put(key, body))

    async def _put_parts(self, key: str, views: Iterable[memoryview], size: int) -> None:
        if _forked():
            await super()._put_parts(key, views, size)
        else:
            await self._session.put_parts(key, views, size)


class _Parts(Iterator[bytes]):
    """Parts on their way to obstore; keeps what its source raised, as it came."""

    def __init__(self, parts: Iterator[bytes], session: S3Session) -> None:
        self._parts = parts
        self._session = session
        self.count = 0
        self.exhausted = False
        self.failure: Exception | None = None

    def __next__(self) -> bytes:
        try:
            part = next(self._parts)
            hit("object.multipart.mid")
        except StopIteration:
            self.exhausted = True
            hit("object.multipart.before_complete")
            raise
        except Exception as error:
            self.failure = error
            raise
        self.count += 1
        self._session.meter.add(requests=1, sent=len(part))
        return part


def _forked() -> bool:
    """Whether obstore's threads were left behind in a parent process."""
    return bool(_runtime_of) and os.getpid() not in _runtime_of


def understood(error: Exception) -> Exception:
    """An error of obstore in the terms of :func:`ckpt.storage.retry.fate_of`.

    Its classes do not tell an answer from a lost connection, but its text does.
    """
    text, _, debug = str(error).partition("\n\nDebug source:")
    status = _STATUS.search(text)
    if status is not None:
        code, message = _CODE.search(text), _MESSAGE.search(text)
        return ServerSaid(
            int(status["status"]),
            code["code"] if code else "",
            message["message"] if message else "",
        )
    if isinstance(error, FileNotFoundError):
        return ServerSaid(404, "NoSuchKey", "not there")
    if not type(error).__module__.startswith("obstore") or type(error).__name__ in _FATAL:
        return error
    refused = _CERTIFICATE.search(debug)
    if refused is not None:
        msg = (
            f"obstore refuses the server's certificate ({refused['why']}): name the bundle to "
            "trust by AWS_CA_BUNDLE or client_kwargs={'verify': ...}; a CA's own certificate is "
            "never good for a server here, though backend='s3fs' takes one"
        )
        return ConfigError(msg)
    return ConnectionError(text)
