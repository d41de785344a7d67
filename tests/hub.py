"""A stand-in for the Hugging Face hub on loopback, and `huggingface_hub` pointed at it."""

import base64
import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from huggingface_hub import constants, file_download

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Serves files of repositories, and notes what is asked of it.

    Attributes:
        files: bytes by "owner/name/file".
        asked: "VERB path" of each request.
        delay: seconds before each answer.
        fault: how files fail: "half" is sent and no more, "silent" is the rest after the header, a
            number is the status.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.made: set[str] = set()
        self.delay = 0.0
        self.fault: str | int = ""
        self.stopped = threading.Event()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def do_POST(self) -> None:
                hub.asked.append(f"POST {self.path}")
                size = int(self.headers.get("Content-Length") or 0)
                status, content = hub.take(self.path, self.rfile.read(size), self.headers)
                answer = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def answer(self, body: bool) -> None:
                hub.asked.append(f"{self.command} {self.path}")
                if hub.stopped.wait(hub.delay):
                    return
                content, headers = hub.find(self.path)
                status = hub.fault if isinstance(hub.fault, int) else 200
                self.send_response(404 if content is None else status)
                for key, value in headers.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(content or b"")))
                self.end_headers()
                if body and content and hub.fault == "silent":
                    hub.stopped.wait(60)
                elif body and content and hub.fault == "half":
                    self.wfile.write(content[: len(content) // 2])
                    self.close_connection = True
                elif body and content:
                    self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def take(self, path: str, body: bytes, headers: Any) -> tuple[int, Any]:
        """The status and the answer of an upload; only the token "good" may."""
        if headers.get("Authorization") != "Bearer good":
            return 401, {"error": "Invalid username or password."}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            name = json.loads(body)
            self.made.add(f"{name.get('organization')}/{name['name']}")
            return 200, {"url": f"{self.url}/{name.get('organization')}/{name['name']}"}
        if "/preupload/" in path:
            files = [f["path"] for f in json.loads(body)["files"]]
            rows = [{"path": f, "uploadMode": "regular", "shouldIgnore": False} for f in files]
            return 200, {"files": rows}
        repository = path.removeprefix("/api/models/").partition("/commit/")[0]
        for line in body.splitlines():
            row = json.loads(line)
            if row["key"] == "file":
                content = base64.b64decode(row["value"]["content"])
                self.files[f"{repository}/{row['value']['path']}"] = content
            elif row["key"] == "deletedFile":
                del self.files[f"{repository}/{row['value']['path']}"]
        return 200, {"commitUrl": f"{self.url}/{repository}/commit/{COMMIT}", "commitOid": COMMIT,
                     "success": True}  # fmt: skip

    def find(self, path: str) -> tuple[bytes | None, dict[str, str]]:
        """The content and the headers of an answer."""
        path = path.partition("?")[0].strip("/")
        if path.startswith("api/models/"):
            name = "/".join(path.split("/")[2:4])
            names = [f.removeprefix(f"{name}/") for f in self.files if f.startswith(f"{name}/")]
            if not names and name not in self.made:
                return None, {"X-Error-Code": "RepoNotFound"}
            rows = [{"type": "file", "path": n, "size": len(self.files[f"{name}/{n}"]), "oid": "0"}
                    for n in names]  # fmt: skip
            whole = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": n} for n in names]}
            content: Any = rows if "/tree/" in path else whole
            return json.dumps(content).encode(), {"Content-Type": "application/json"}
        repository, _, rest = path.partition("/resolve/")
        file = f"{repository}/{rest.partition('/')[2]}"
        if file not in self.files:
            known = any(f.startswith(f"{repository}/") for f in self.files)
            return None, {"X-Error-Code": "EntryNotFound" if known else "RepoNotFound"}
        tag = hashlib.sha256(self.files[file]).hexdigest()
        return self.files[file], {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT}

    def close(self) -> None:
        """Ends it; its port answers no more."""
        self.stopped.set()
        self.server.shutdown()
        self.server.server_close()


def point_at(url: str, cache: Path, monkeypatch: Any) -> None:
    """Has huggingface_hub use a hub and a cache of the test's own."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    # huggingface_hub before 1.0 has a copy
    monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_ENDPOINT", url)


def seconds_of(work: Any) -> tuple[float, Any]:
    """How long a call takes, and what it returns."""
    started = time.monotonic()
    result = work()
    return time.monotonic() - started, result
