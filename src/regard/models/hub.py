"""Files of the Hugging Face hub: what is cached, whether the hub can be reached, downloads.

`huggingface_hub` decides where the hub and the cache are (HF_ENDPOINT, HF_HOME) and whether it
may be asked at all (HF_HUB_OFFLINE).
"""

import queue
import threading
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
import timm
from huggingface_hub import constants

from regard.errors import FileError, UsageError
from regard.files import reason

SECONDS = 5.0  # in which the hub must answer
WEIGHTS = "model.safetensors"
FAMILIARITY = "familiarity.safetensors"


def _timm_source(name: str) -> tuple[str, str] | None:
    """Repository and file of timm's pretrained weights of a network; None: they have none."""
    cfg = timm.models.get_pretrained_cfg(name) if timm.is_model_pretrained(name) else None
    if cfg is None or not cfg.hf_hub_id or cfg.custom_load:
        return None
    file = cfg.hf_hub_filename or WEIGHTS
    return (cfg.hf_hub_id, file) if file.endswith(".safetensors") else None


def cached_weights(name: str) -> Path | None:
    """The file of timm's pretrained weights of a network in the local cache, or None."""
    if (source := _timm_source(name)) is None:
        return None
    found = huggingface_hub.try_to_load_from_cache(*source)
    return Path(found) if isinstance(found, str) else None


def fetch_weights(name: str) -> str:
    """Has timm's pretrained weights of a network in the local cache; downloads them if needed.

    Returns:
        Where they came from: "the local cache" or "the hub".

    Raises:
        FileError: they are in neither, or the hub does not answer in SECONDS.
    """
    if (source := _timm_source(name)) is None:
        raise FileError(f"timm has no weights of {name} on the hub")
    if cached_weights(name) is not None:
        return "the local cache"
    check_reachable(*source)
    try:
        huggingface_hub.hf_hub_download(*source)
    except Exception as error:  # of the HTTP library, of the hub, of the disk
        raise FileError(f"{source[0]} can't be downloaded ({reason(error)})") from error
    return "the hub"


def check_reachable(repository: str, file: str, revision: str | None = None) -> None:
    """Asks the hub for a file's size, to know at once whether a download can begin.

    Raises:
        FileError: the hub may not be asked, does not answer in time, or has no such file.
    """
    if constants.HF_HUB_OFFLINE:
        raise FileError("the hub is not asked: HF_HUB_OFFLINE is set")
    limit = SECONDS
    answers: queue.Queue[str] = queue.Queue()

    def ask() -> None:
        try:
            url = huggingface_hub.hf_hub_url(repository, file, revision=revision)
            huggingface_hub.get_hf_file_metadata(url, timeout=limit)
            answers.put("")
        except Exception as error:
            answers.put(reason(error))

    # a name server that does not answer can't be given a time limit: the thread is left behind
    threading.Thread(target=ask, daemon=True).start()
    try:
        fault = answers.get(timeout=limit)
    except queue.Empty:
        fault = f"no answer in {limit:g} s"
    if fault:
        raise FileError(f"the hub can't be reached ({fault})")


# ------------------------------------------------------------------------------ whole runs
PREFIX = "hf-hub:"
# no images and no names of files: report.html, splits.csv and predictions.npz stay
FILES = (
    "config.json", WEIGHTS, "README.md", "recipe.toml", "metrics.csv", "evaluation.json",
    "calibration.json", FAMILIARITY,  # without which it would answer otherwise
)  # fmt: skip
KNOWN = "images.npz"  # hashes of the training images, instead of splits.csv


def snapshot(name: str) -> Path:
    """The folder of `hf-hub:OWNER/NAME[@REVISION]` in the local cache, downloaded where needed.

    Raises:
        UsageError: it is no name of a repository.
        FileError: it is not on the hub, or the hub can't be reached and the cache lacks it.
    """
    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    _check_name(repository)
    wanted = [*FILES, KNOWN]
    try:
        if not constants.HF_HUB_OFFLINE:
            check_reachable(repository, "config.json", revision=revision or None)
        found = huggingface_hub.snapshot_download(
            repository, revision=revision or None, allow_patterns=wanted
        )
    except Exception as error:
        try:  # as it was when it was last reached
            found = huggingface_hub.snapshot_download(
                repository, revision=revision or None, local_files_only=True
            )
        except Exception:
            raise FileError(f"{name} can't be loaded: {reason(error)}") from error
    return Path(found)


def _check_name(repository: str) -> None:
    owner, slash, name = repository.partition("/")
    try:
        huggingface_hub.utils.validate_repo_id(repository)
    except ValueError as error:
        raise UsageError(f"{repository!r} is no OWNER/NAME of a repository") from error
    if not (owner and slash and name):
        raise UsageError(f"{repository!r} is no OWNER/NAME of a repository")


def push_files(folder: Path, repository: str) -> list[Path]:
    """The files of a finished run that are uploaded.

    Raises:
        UsageError: the folder holds no network with a card, or REPO is no name.
    """
    _check_name(repository)
    if missing := [n for n in ("config.json", WEIGHTS, "README.md") if not (folder / n).is_file()]:
        raise UsageError(f"{folder} holds no finished run: it has no {missing[0]}")
    return [folder / name for name in FILES if (folder / name).is_file()]


def push(
    files: Sequence[Path], repository: str, *, private: bool = False, more: Sequence[Path] = ()
) -> str:
    """Uploads files in one commit, to a repository that is made where it is missing.

    Returns:
        The repository's address.

    Raises:
        FileError: the hub can't be reached, or refuses: without a token, say.
    """
    if constants.HF_HUB_OFFLINE:
        raise FileError("the hub is not asked: HF_HUB_OFFLINE is set")
    api = huggingface_hub.HfApi()
    operations = [
        huggingface_hub.CommitOperationAdd(path_in_repo=path.name, path_or_fileobj=path)
        for path in (*files, *more)
    ]
    try:
        made = api.create_repo(repository, private=private, exist_ok=True)
        api.create_commit(repository, operations, commit_message="A run of Regard")
    except Exception as error:  # of the HTTP library, of the hub: a token that is missing or wrong
        hint = (
            "; `hf auth login` stores a token" if "401" in str(error) or "403" in str(error) else ""
        )
        raise FileError(f"{repository}: the hub refused ({reason(error)}){hint}") from error
    return str(made)
