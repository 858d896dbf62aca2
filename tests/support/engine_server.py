"""The process of a stand-in engine: ``python -m support.engine_server --kind vllm --port 0``.

See :mod:`support.fake_engine`, which starts it and says what it can be made to do wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from support.engine_kinds import Answer, Dropped, Engine, Sglang, Vllm


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # head and body in one segment
    engine: Engine

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.reply(lambda: self.engine.get(self.path))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/_faults":
            with self.engine.lock:
                self.engine.faults = body
            self.send(200, "")
        elif self.path == "/_log":
            with self.engine.lock:
                self.send(200, self.engine.log)
        else:
            with self.engine.lock:
                self.engine.log.append({"path": self.path, "body": body})
            self.reply(lambda: self.engine.post(self.path, body))

    def reply(self, work: Any) -> None:
        key = self.engine.key
        if key is not None and self.headers.get("Authorization") != f"Bearer {key}":
            self.send(401, {"error": "Unauthorized"})
            return
        try:
            self.engine.at("any")
            body = work()
        except Answer as answer:
            self.send(answer.status, answer.body)
        except Dropped:
            self.close_connection = True
        except (KeyError, TypeError, FileNotFoundError) as error:
            self.send(400, {"error": {"message": repr(error)}})
        else:
            self.send(200, body)

    def send(self, status: int, body: Any) -> None:
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        kind = "text/plain" if isinstance(body, str) else "application/json"
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kind", choices=("vllm", "sglang"), required=True)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--model", help="a Qwen2 directory; without it the answers are hashed")
    parser.add_argument("--api-key")
    parser.add_argument("--max-lora-rank", type=int, default=16)
    parser.add_argument("--max-loaded", type=int, help="SGLang's --max-loaded-loras")
    args = parser.parse_args()
    Handler.engine = (Vllm if args.kind == "vllm" else Sglang)(args)
    server = Server(("127.0.0.1", args.port), Handler)
    print(server.server_address[1], flush=True)
    # The parent holds the other end: when it goes, so does this process.
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    server.serve_forever()


if __name__ == "__main__":
    main()
