"""Builds a release and checks that it works without the repository.

    python scripts/check_release.py                    # build, contents, a fresh environment
    python scripts/check_release.py --only-contents    # no environment; a minute less

The wheel and the source distribution are built by `python -m build`, checked by `twine check`,
and compared with the repository: every file that git tracks is in the sdist, every file of the
package is in the wheel. Then only the wheel is installed in a fresh environment, and the
commands that the README names are run there and timed. Needs `build` and `twine`.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 20e6  # size limit of each file, in bytes
MARKS = ("py.typed", "__init__.pyi", "training/recipes/demo.toml", "models/zoo.csv",
         "report/page.html", "serve/page.html")  # fmt: skip
LETTERS = {"0": "zero", "1": "one"}


def run(*command: object, cwd: Path, code: int = 0, **variables: str) -> str:
    """Runs a command that must end with `code`; returns its output and errors."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | variables
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=environment, text=True, capture_output=True
    )
    if done.returncode != code:
        raise SystemExit(f"{command}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def build(out: Path) -> tuple[Path, Path]:
    """Wheel and sdist; the wheel is built from the sdist, as an installer would."""
    # a folder `build` in the repository would be imported as that package, but has no __main__
    if find_spec("build") is None or find_spec("build.__main__") is None or not find_spec("twine"):
        raise SystemExit("this needs build and twine: pip install build twine")
    run(sys.executable, "-m", "build", "--outdir", out, ROOT, cwd=ROOT)
    run(sys.executable, "-m", "twine", "check", "--strict", *out.iterdir(), cwd=ROOT)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


def faults_of_contents(wheel: Path, sdist: Path) -> list[str]:
    """What is missing, superfluous or too large."""
    tracked = set(run("git", "ls-files", cwd=ROOT).split("\n")) - {""}
    with tarfile.open(sdist) as archive:
        inside = {str(PurePosixPath(*PurePosixPath(n).parts[1:])) for n in archive.getnames()}
    with zipfile.ZipFile(wheel) as archive:
        files = set(archive.namelist())
    package = {name.removeprefix("src/") for name in tracked if name.startswith("src/regard/")}
    faults = [f"the sdist lacks {name}" for name in sorted(tracked - inside)]
    faults += [f"the wheel lacks {name}" for name in sorted(package - files)]
    faults += [f"the wheel lacks {name}" for name in MARKS if f"regard/{name}" not in files]
    faults += [
        f"the wheel holds {name}" for name in sorted(files - package) if ".dist-info/" not in name
    ]
    sizes = {path.name: path.stat().st_size for path in (wheel, sdist)}
    faults += [f"{name} has {size / 1e6:.1f} MB" for name, size in sizes.items() if size > LIMIT]
    for name, size in sizes.items():
        print(f"{name}: {size / 1e6:.2f} MB")
    return faults


class Environment:
    """A fresh virtual environment and a folder to work in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.work = folder / "work"
        self.work.mkdir()
        venv.create(folder / "venv", with_pip=True)
        self.bin = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")

    def install(self, what: str) -> None:
        """Installs by pip, in the versions with which the project was tested."""
        run(self.bin / "python", "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt",
            what, cwd=self.work)  # fmt: skip

    def timed(self, name: str, *arguments: object, code: int = 0) -> str:
        """Runs `regard ARGUMENTS` and prints its time."""
        start = time.monotonic()
        said = run(self.bin / "regard", *arguments, cwd=self.work, code=code)
        print(f"{name:32s} {time.monotonic() - start:6.1f} s", flush=True)
        return said


def make_photos(place: Environment) -> None:
    """Writes scikit-learn's digits into class folders."""
    code = (
        "from sklearn.datasets import load_digits; from PIL import Image; from pathlib import Path;"
        f"names = {LETTERS!r}; d = load_digits()\n"
        "for i, (image, y) in enumerate(zip(d.images, d.target)):\n"
        "    if str(y) in names:\n"
        "        f = Path('photos', names[str(y)]); f.mkdir(parents=True, exist_ok=True)\n"
        "        picture = Image.fromarray((image * 15.9).astype('uint8')).resize((48, 48))\n"
        "        picture.save(f / f'{i}.png')\n"
    )
    run(place.bin / "python", "-c", code, cwd=place.work)


def answers_of_server(place: Environment, network: str, image: Path) -> None:
    """Serves a network, requests its health and one prediction, and stops it."""
    start = time.monotonic()
    process = subprocess.Popen(
        [place.bin / "regard", "serve", network, "--port", "0"],
        cwd=place.work, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[0]
        with urllib.request.urlopen(f"{url}healthz") as answer:
            assert answer.status == 200
        request = urllib.request.Request(f"{url}api/predict", data=image.read_bytes())
        with urllib.request.urlopen(request) as answer:
            assert json.load(answer)["classes"]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    print(f"{'serve, one image':32s} {time.monotonic() - start:6.1f} s")


def journey(place: Environment, wheel: Path) -> None:
    """From the wheel alone to a trained, explained, served and exported network."""
    start = time.monotonic()
    place.install(str(wheel))
    print(f"{'pip install':32s} {time.monotonic() - start:6.1f} s")
    make_photos(place)
    image = next((place.work / "photos/zero").iterdir())
    network = "runs/photos"
    place.timed("demo", "demo")
    small = ("--model", "ag_sononet8", "--size", "32", "--flip", "0", "--epochs", "12")
    place.timed("train", "train", "photos", *small, "--out", network)
    said = place.timed("predict", "predict", network, image, "--json")
    assert json.loads(said.splitlines()[0])["classes"], said
    place.timed("explain", "explain", network, image)
    assert next((place.work / "explained").rglob("*.explained.png")).stat().st_size
    place.timed("export --to torch", "export", network, "--to", "torch", "--out", "net.pt2")
    for wish, arguments in {
        "serve": ("serve", network),
        "onnxruntime": ("export", network, "--to", "onnx", "--out", "net.onnx"),
        "openvino": ("export", network, "--to", "openvino", "--out", "net.xml"),
    }.items():
        said = place.timed(f"{arguments[0]} without its extra", *arguments, code=2)
        assert f"pip install 'regard[{wish}]'" in said, said
    place.install(f"{wheel}[serve,onnxruntime]")
    answers_of_server(place, network, image)
    place.timed("export --to onnx", "export", network, "--to", "onnx", "--out", "net.onnx")
    for program in ("net.py", "net_onnx.py"):
        said = run(place.bin / "python", program, image, cwd=place.work)
        assert json.loads(said)["classes"], said


def main() -> None:
    """Builds and checks; exits with 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where the files are left (default: nowhere)")
    parser.add_argument("--only-contents", action="store_true", help="make no environment")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = options.out or Path(folder, "dist")
        if out.is_dir() and any(out.iterdir()):
            raise SystemExit(f"{out} is not empty")
        wheel, sdist = build(out)
        if faults := faults_of_contents(wheel, sdist):
            raise SystemExit("\n".join(faults))
        if not options.only_contents:
            place = Path(folder, "fresh")
            place.mkdir()
            journey(Environment(place), wheel)
    print("the release works")


if __name__ == "__main__":
    main()
