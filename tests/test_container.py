"""The Dockerfile: its command serves, its health check works, and it has all that it copies."""

import json
import re
import subprocess
import sys
from pathlib import Path

from tests.helpers import Server

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
LINES = [line for line in TEXT.splitlines() if line and not line.startswith("#")]


def arguments(instruction: str) -> list[str]:
    (line,) = [line for line in LINES if line.startswith(instruction)]
    return json.loads(line[line.index("[") :])


def test_the_image_serves_and_is_healthy_only_while_it_does(whole):
    entry, words = arguments("ENTRYPOINT"), arguments("CMD")
    assert [*entry, words[0]] == ["regard", "serve", "/network"]
    assert words[1:] == ["--host", "0.0.0.0", "--port", "8000"]
    server = Server(whole, "--host", "0.0.0.0")
    python, *check = arguments("HEALTHCHECK")
    assert python == "python"
    check = [word.replace(":8000/", f":{server.port}/") for word in check]
    try:
        healthy = subprocess.run([sys.executable, *check], timeout=60)
    finally:
        server.stop()
    assert healthy.returncode == 0
    gone = subprocess.run([sys.executable, *check], timeout=60, capture_output=True)
    assert gone.returncode != 0


def test_the_user_is_not_root_and_all_that_is_copied_gets_into_the_context():
    order = [line.split()[0] for line in LINES]
    assert order.index("USER") < order.index("ENTRYPOINT")
    (user,) = [line.split()[1] for line in LINES if line.startswith("USER")]
    assert int(user) > 0
    assert f"--uid {user}" in TEXT
    sources = [w for line in LINES if line.startswith("COPY") for w in line.split()[1:-1]]
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert {f"!{name}" for name in sources} <= set(ignored)
    assert all((ROOT / name).exists() for name in sources)


def test_the_extras_are_those_of_the_package():
    (extras,) = re.findall(r"^ARG EXTRAS=(\S+)", TEXT, re.M)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for extra in extras.split(","):
        assert re.search(rf"^{extra} = \[", project, re.M), extra
