"""The health check of the service's image: 0 if ``/healthz`` answers 200 on ``$HEALTH_PORT``.

Another path may be given as the one argument: ``/readyz``.

The service answers it to anybody, a sidecar with a token does not: ``$TOKEN_FILE`` is then the file
that ``--token-file`` names (one word, or lines of ``SCOPE TOKEN [NAME]``). A token that is shown on
loopback goes nowhere else.
"""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.request
from pathlib import Path


def main() -> int:
    """Ask once; the exit status."""
    path = sys.argv[1] if len(sys.argv) > 1 else "/healthz"
    url = f"http://127.0.0.1:{int(os.environ.get('HEALTH_PORT', '8080'))}{path}"
    request = urllib.request.Request(url, headers=_headers())
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=4) as answer:
            return 0 if answer.status == 200 else 1
    except (urllib.error.URLError, OSError) as error:
        sys.stderr.write(f"{url}: {error}\n")
        return 1


def _headers() -> dict[str, str]:
    file = os.environ.get("TOKEN_FILE")
    if not file:
        return {}
    for line in Path(file).read_text(encoding="utf-8").splitlines():
        words = line.split()
        if words and not words[0].startswith("#"):
            return {"Authorization": f"Bearer {words[min(1, len(words) - 1)]}"}
    return {}


if __name__ == "__main__":
    sys.exit(main())
