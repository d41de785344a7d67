"""Sets the project's addresses in all files.

    python scripts/set_address.py https://github.com/OWNER/NAME https://OWNER.github.io/NAME/

The current ones are in `[project.urls]` of pyproject.toml: Homepage is the repository,
Documentation the site. Both are replaced by the given ones, there and in every other file that git
tracks.
"""

import argparse
import subprocess
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RAW = ("https://github.com/", "https://raw.githubusercontent.com/")


def addresses(root: Path) -> tuple[str, str]:
    """Repository and site, from pyproject.toml."""
    content = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    return content["project"]["urls"]["Homepage"], content["project"]["urls"]["Documentation"]


def replace(root: Path, names: list[str], home: str, site: str) -> list[str]:
    """Replaces the addresses in these files below `root`, and returns those that had any."""
    home, site = home.rstrip("/").removesuffix(".git"), site.rstrip("/") + "/"
    old_home, old_site = addresses(root)
    pairs = {old_home: home, old_home.replace(*RAW): home.replace(*RAW), old_site: site}
    changed = []
    for name in names:
        content = (root / name).read_bytes()
        new = content
        for old, value in pairs.items():
            new = new.replace(old.encode(), value.encode())
        if new != content:
            (root / name).write_bytes(new)
            changed.append(name)
    return changed


def main() -> None:
    """Prints the files that were changed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("home", help="of the repository")
    parser.add_argument("site", help="of the documentation")
    options = parser.parse_args()
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    names = [name for name in listed.stdout.split("\0") if (ROOT / name).is_file()]
    print(*replace(ROOT, names, options.home, options.site), sep="\n")


if __name__ == "__main__":
    main()
