"""An S3 server to try the trainer against: moto's, in memory, with one bucket made at the start.

It checks no signatures and keeps nothing, so it is for trials alone.

Usage: ``python s3_server.py [BUCKET]``. The environment may name another address to bind
(``S3_BIND``, default ``127.0.0.1``) and port (``S3_PORT``, default 9000).
"""

from __future__ import annotations

import logging
import os
import signal
import sys

import boto3
from moto.server import ThreadedMotoServer


def main() -> None:
    """Serve until SIGTERM or SIGINT."""
    bucket = sys.argv[1] if len(sys.argv) > 1 else "runs"
    # One line a request would bury what the trainer says next to it.
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    stop = {signal.SIGINT, signal.SIGTERM}
    # Blocked before the server's thread starts, which inherits it: only sigwait() below gets them.
    signal.pthread_sigmask(signal.SIG_BLOCK, stop)
    host, port = os.environ.get("S3_BIND", "127.0.0.1"), int(os.environ.get("S3_PORT", "9000"))
    server = ThreadedMotoServer(ip_address=host, port=port)
    server.start()
    client = boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{port}",
        region_name="us-east-1",
        aws_access_key_id="any",
        aws_secret_access_key="any",  # noqa: S106  moto takes whatever it is given
    )
    client.create_bucket(Bucket=bucket)
    sys.stderr.write(f"serving s3://{bucket} on {host}:{port}\n")
    signal.sigwait(stop)
    server.stop()


if __name__ == "__main__":
    main()
