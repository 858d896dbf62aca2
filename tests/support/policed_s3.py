"""An S3 server that asks IAM-like policies before it answers, and writes down what was asked.

moto has a check of its own, which asks for the right to delete several objects of the bucket, not
of them, so it refuses what AWS admits. Started as a program with a port, a file of policies by
access key (``{"trainer": {"Statement": [...]}}``) and the file to write to. Keys of which the file
says nothing may do everything.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import tempfile
import threading
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

_SCOPE = re.compile(r"Credential=([^/]+)/")
_BUCKET_READS = {
    "uploads": "ListBucketMultipartUploads",
    "location": "GetBucketLocation",
    "versions": "ListBucketVersions",
}


@dataclass(frozen=True, order=True)
class Asked:
    """One right that a request needs.

    Attributes:
        role: access key.
        action: as policies name it.
        resource: an ARN.
        allowed: whether the role's policy has it.
    """

    role: str
    action: str
    resource: str
    allowed: bool = True


def allows(policy: Mapping[str, Any], action: str, resource: str) -> bool:
    """Whether a statement allows an action on a resource; none may deny or set conditions."""
    for statement in policy["Statement"]:
        assert statement.keys() <= {"Sid", "Effect", "Action", "Resource"}, statement
        assert statement["Effect"] == "Allow"
        if any(fnmatchcase(action, one) for one in statement["Action"]) and any(
            fnmatchcase(resource, one) for one in statement["Resource"]
        ):
            return True
    return False


def rights(
    method: str, path: str, query: Mapping[str, list[str]], headers: Mapping[str, str], body: bytes
) -> list[tuple[str, str]]:
    """Actions and resources that AWS asks for; one that is not known here is named so."""
    bucket, _, key = path.lstrip("/").partition("/")
    whole, one = f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/{key}"
    if "HTTP_X_AMZ_COPY_SOURCE" in headers or headers.get("HTTP_X_AMZ_ACL"):
        return [("s3:unknown-copy-or-acl", one)]
    if not key:
        if method in {"GET", "HEAD"}:
            special = next((_BUCKET_READS[name] for name in query if name in _BUCKET_READS), None)
            return [(f"s3:{special or 'ListBucket'}", whole)]
        if method == "POST" and "delete" in query:
            names = [n.text or "" for n in ET.fromstring(body).iter() if n.tag.endswith("Key")]
            return [("s3:DeleteObject", f"{whole}/{name}") for name in names]
        return [(f"s3:unknown-{method}-{sorted(query)}", whole)]
    upload = "uploadId" in query
    known = {
        "GET": "ListMultipartUploadParts" if upload else "GetObject",
        "HEAD": "GetObject",
        "PUT": "PutObject",
        "POST": "PutObject",
        "DELETE": "AbortMultipartUpload" if upload else "DeleteObject",
    }
    return [(f"s3:{known.get(method, f'unknown-{method}')}", one)]


class Police:
    """WSGI around a server's application."""

    def __init__(
        self, app: Callable[..., Iterable[bytes]], policies: Mapping[str, Any], log: Path
    ) -> None:
        self._app, self._policies, self._log = app, policies, log
        self._mutex = threading.Lock()

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        query = parse_qs(environ.get("QUERY_STRING", ""), keep_blank_values=True)
        role = self._role(environ, query)
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        environ["wsgi.input"] = BytesIO(body)
        path = unquote(environ["PATH_INFO"])
        needed = rights(environ["REQUEST_METHOD"], path, query, environ, body)
        asked = [Asked(role, *right, self._may(role, *right)) for right in needed]
        with self._mutex, self._log.open("a") as log:
            log.writelines(json.dumps(vars(one)) + "\n" for one in asked)
        if not all(one.allowed for one in asked):
            return self._refuse(start)
        return self._app(environ, self._blurred(role, path, start))

    def _role(self, environ: Mapping[str, Any], query: Mapping[str, list[str]]) -> str:
        scope = query.get("X-Amz-Credential")
        if scope:
            return scope[0].partition("/")[0]
        found = _SCOPE.search(environ.get("HTTP_AUTHORIZATION", ""))
        return found[1] if found else "nobody"

    def _may(self, role: str, action: str, resource: str) -> bool:
        return role not in self._policies or allows(self._policies[role], action, resource)

    def _blurred(self, role: str, path: str, start: Callable[..., Any]) -> Callable[..., Any]:
        """Who may not list is not told what is missing: 403 in place of 404."""
        bucket = f"arn:aws:s3:::{path.lstrip('/').partition('/')[0]}"

        def answer(status: str, headers: list[tuple[str, str]], *more: Any) -> Any:
            if status.startswith("404") and not self._may(role, "s3:ListBucket", bucket):
                status = "403 Forbidden"
            return start(status, headers, *more)

        return answer

    @staticmethod
    def _refuse(start: Callable[..., Any]) -> list[bytes]:
        text = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
        length = ("Content-Length", str(len(text)))
        start("403 Forbidden", [("Content-Type", "application/xml"), length])
        return [text]


@dataclass(frozen=True)
class PolicedS3:
    """A running server.

    Attributes:
        endpoint_url: its address.
        log: what was asked, one JSON object a line.
    """

    endpoint_url: str
    log: Path

    def asked(self, role: str) -> list[Asked]:
        """What a role asked for so far, in order."""
        lines = self.log.read_text().splitlines()
        every = [Asked(**json.loads(line)) for line in lines]
        return [one for one in every if one.role == role]


@contextlib.contextmanager
def policed_server(policies: Mapping[str, Any], port: int) -> Iterator[PolicedS3]:
    """A server with policies by access key; it ends with the block."""
    with tempfile.TemporaryDirectory(prefix="policed-") as folder:
        rules, log = Path(folder, "policies.json"), Path(folder, "asked.jsonl")
        rules.write_text(json.dumps(policies))
        log.touch()
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, str(port), str(rules), str(log)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield PolicedS3(f"http://127.0.0.1:{port}", log)
        finally:
            process.kill()
            process.wait(30)
            process.stdout.close()  # type: ignore[union-attr]  # seen above


def main() -> None:
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Handler(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_request(self, *_args: object) -> None:
            """Nothing: what is asked is written down elsewhere."""

    port, rules, log = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    app = Police(
        DomainDispatcherApplication(create_backend_app), json.loads(rules.read_text()), log
    )
    server = make_server("127.0.0.1", port, app, threaded=True, request_handler=Handler)
    print("ready", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
