"""Files of the Hugging Face hub: the cache, whether the hub can be reached, downloads.

`huggingface_hub` determines where the hub and the cache are (HF_ENDPOINT, HF_HOME) and whether
the hub may be contacted at all (HF_HUB_OFFLINE).
"""

import contextlib
import inspect
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
from filelock import FileLock
from huggingface_hub import constants

from regard.compat import downloads_in_small_steps
from regard.errors import FileError, UsageError
from regard.files import lacking, reason
from regard.models.initialization import preserved_rng_state

log: logging.Logger = logging.getLogger(__name__)

SECONDS = 5.0  # time limit for an answer of the hub
STALL = 15.0  # seconds without a further byte, after which a download is given up
_THREAD = "regard-hub"
_STALLED = f"no data for {STALL:g} s"
WEIGHTS = "model.safetensors"
FAMILIARITY = "familiarity.safetensors"


def _timm_source(name: str) -> tuple[str, str] | None:
    """Repository and file of timm's pretrained weights for a network; None if there are none."""
    cfg = timm.models.get_pretrained_cfg(name) if timm.is_model_pretrained(name) else None
    if cfg is None or not cfg.hf_hub_id or cfg.custom_load:
        return None
    file = cfg.hf_hub_filename or WEIGHTS
    return (cfg.hf_hub_id, file) if file.endswith(".safetensors") else None


def cached_weights(name: str) -> Path | None:
    """The file of timm's pretrained weights for a network in the local cache, or None."""
    if (source := _timm_source(name)) is None:
        return None
    found = huggingface_hub.try_to_load_from_cache(*source)
    return Path(found) if isinstance(found, str) else None


def has_weights(name: str) -> bool:
    """Whether `fetch_weights` can get weights for a network: timm has them on the hub."""
    return _timm_source(name) is not None


def fetch_weights(name: str) -> str:
    """Makes sure that timm's pretrained weights for a network are in the local cache.

    A file that is damaged or not the network's, as a broken download or a proxy may leave it, is
    downloaded again.

    Returns:
        Their source: "the local cache" or "the hub".

    Raises:
        FileError: they are in neither, the hub does not answer in SECONDS or stops sending, or
            sends something else.
    """
    if (source := _timm_source(name)) is None:
        raise FileError(f"timm has no weights of {name} on the hub")
    with one_at_a_time(source[0]):
        path = cached_weights(name)
        fault = None if path is None else _fault(name, path)
        if path is not None and fault is None:
            return "the local cache"
        damaged = f"{path} can't be used ({fault}); " if path else ""
        try:
            check_reachable(*source)
            if path is not None:
                path.unlink(missing_ok=True)
            found = watched(
                lambda **bar: huggingface_hub.hf_hub_download(
                    *source, force_download=path is not None, **bar
                )
            )
        except OSError as error:  # includes FileError
            raise FileError(f"{damaged}{_why(error)}") from error
    if fault := _fault(name, Path(found)):
        raise FileError(f"the hub sent a file that can't be used ({fault}): {found}")
    return "the hub"


def _fault(name: str, path: Path) -> str | None:
    """Why a file can't hold timm's weights for the network of this name, or None."""
    try:
        with preserved_rng_state():
            model = timm.create_model(
                name, pretrained=True, pretrained_cfg_overlay={"file": str(path)}
            )
    except Exception as error:  # of safetensors, torch and timm
        return reason(error)
    finite = all(bool(t.isfinite().all()) for t in model.parameters())
    return None if finite else "a weight is not finite"


def check_reachable(repository: str, file: str, revision: str | None = None) -> None:
    """Asks the hub for a file's size, to find out quickly whether a download can start.

    Raises:
        FileError: the hub may not be contacted, does not answer in time, or has no such file.
    """
    if (error := _refusal(repository, file, revision)) is not None:
        raise FileError(f"the hub does not provide the file ({_why(error)})") from error


def _refusal(repository: str, file: str, revision: str | None = None) -> Exception | None:
    """The hub's error when asked for a file's size, or None.

    Raises:
        FileError: the hub may not be contacted, or does not answer in SECONDS.
    """
    if constants.HF_HUB_OFFLINE:
        raise FileError("the hub is not contacted: HF_HUB_OFFLINE is set")
    limit = SECONDS

    def ask() -> None:
        url = huggingface_hub.hf_hub_url(repository, file, revision=revision)
        huggingface_hub.get_hf_file_metadata(url, timeout=limit)

    answers = _in_thread(ask)
    try:
        error = answers.get(timeout=limit)[1]
    except queue.Empty:
        raise FileError(f"the hub can't be reached (no answer in {limit:g} s)") from None
    # such as the HTTP library's own timeout, which may come before this one
    if error is not None and getattr(error, "response", None) is None:
        raise FileError(f"the hub can't be reached ({_why(error)})") from error
    return error


def _in_thread(work: Callable[[], Any]) -> "queue.Queue[tuple[Any, Exception | None]]":
    """Runs `work` in a thread; returns a queue that receives its result or its error.

    Waiting for a name server that does not answer can't be limited: such a thread is left behind.
    """
    answers: queue.Queue[tuple[Any, Exception | None]] = queue.Queue()

    def run() -> None:
        try:
            answers.put((work(), None))
        except Exception as error:  # of the HTTP library, the hub or the disk
            answers.put((None, error))

    threading.Thread(target=run, name=_THREAD, daemon=True).start()
    return answers


def _why(error: BaseException) -> str:
    """The text of an error: with the file for a disk error, and without links for reading more."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return reason(error, 1000).partition(" For more information")[0][:200]


# ------------------------------------------------------------------------------ downloads
class _Progress:
    """The bytes of a download; `bar` is the progress bar class that counts them."""

    def __init__(self) -> None:
        self.position, self.most, self.changed = 0.0, 0.0, time.monotonic()
        self.is_over = False
        progress = self

        class Bar(huggingface_hub.utils.tqdm):
            def update(self, n: float | None = 1) -> bool | None:
                progress.add(n or 0)
                shown: bool | None = super().update(n)
                return shown

        self.bar: type = Bar

    def add(self, count: float) -> None:
        """Counts bytes; a server that can't resume makes the count go back.

        Raises:
            TimeoutError: nothing new has arrived for too long.
        """
        self.position += count
        if self.position > self.most:
            self.most, self.changed = self.position, time.monotonic()
        if self.is_over or self.has_stalled:
            raise TimeoutError(_STALLED)

    @property
    def has_stalled(self) -> bool:
        return time.monotonic() - self.changed > STALL


class _Quiet(logging.Filter):
    """Drops the warnings of each attempt of a watched download; abandoned threads have some too."""

    active = 0

    def filter(self, record: logging.LogRecord) -> bool:
        return not (self.active or record.threadName == _THREAD)

    def __enter__(self) -> None:
        self.active += 1
        logging.getLogger("huggingface_hub.file_download").addFilter(self)  # adds it only once

    def __exit__(self, *_: object) -> None:
        self.active -= 1


_QUIET = _Quiet()


def watched(download: Callable[..., str]) -> str:
    """The path that a download returns; gives up after STALL seconds without a new byte.

    By itself, huggingface_hub retries for a minute if nothing arrives, and endlessly if a server
    breaks off and can't resume.

    Args:
        download: a function of huggingface_hub's; called with `tqdm_class` if it accepts that.

    Raises:
        FileError: it failed, or was given up.
    """
    progress = _Progress()
    known = inspect.signature(huggingface_hub.hf_hub_download).parameters
    bar = {"tqdm_class": progress.bar} if "tqdm_class" in known else {}
    with _QUIET, downloads_in_small_steps(1 << 18):
        answers = _in_thread(lambda: download(**bar))
        while True:
            try:
                found, error = answers.get(timeout=0.1)
                break
            except queue.Empty:
                if bar and progress.has_stalled:
                    progress.is_over = True
                    raise FileError(f"the download was stopped ({_STALLED})") from None
    if error is not None:
        raise FileError(f"the download failed ({_why(error)})") from error
    return str(found)


@contextlib.contextmanager
def one_at_a_time(repository: str) -> Iterator[None]:
    """Makes Regard's processes wait for each other when they download the same repository."""
    path = Path(constants.HF_HUB_CACHE, ".locks", f"regard--{repository.replace('/', '--')}.lock")
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # if the cache can't be written, the download says so
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(path))
        yield


# ------------------------------------------------------------------------------ whole runs
PREFIX = "hf-hub:"
# no images and no file names: report.html, splits.csv and predictions.npz stay
FILES = (
    "config.json", WEIGHTS, "README.md", "recipe.toml", "metrics.csv", "evaluation.json",
    "calibration.json", FAMILIARITY,  # without these it would predict differently
    "started.npz",  # hashes, as in KNOWN
)  # fmt: skip
KNOWN = "images.npz"  # hashes of the training images, instead of splits.csv


def snapshot(name: str) -> Path:
    """The folder of `hf-hub:OWNER/NAME[@REVISION]` in the local cache, downloaded if needed.

    Raises:
        UsageError: it is not a repository name.
        FileError: it is not on the hub, or the hub can't be reached and the cache lacks it.
    """
    repository, _, after = name.removeprefix(PREFIX).partition("@")
    _check_name(repository)
    wanted, revision = [*FILES, KNOWN], after or None
    try:
        if constants.HF_HUB_OFFLINE:
            raise FileError("the hub is not contacted: HF_HUB_OFFLINE is set")
        check_reachable(repository, "config.json", revision=revision)
        with one_at_a_time(repository):
            return Path(
                watched(
                    lambda **bar: huggingface_hub.snapshot_download(
                        repository, revision=revision, allow_patterns=wanted, **bar
                    )
                )
            )
    except Exception as error:
        found = _snapshot_before(repository, revision)
        if found is None:
            raise FileError(f"{name} can't be loaded: {_why(error)}") from error
        if not constants.HF_HUB_OFFLINE:
            log.warning(f"{name} is taken from the local cache: {_why(error)}")
    return found


def _snapshot_before(repository: str, revision: str | None) -> Path | None:
    """The folder of a repository as last downloaded; None if it is incomplete."""
    try:
        found = huggingface_hub.snapshot_download(
            repository, revision=revision, local_files_only=True
        )
    except Exception:  # not in the cache
        return None
    whole = all(Path(found, name).is_file() for name in ("config.json", WEIGHTS))
    return Path(found) if whole else None


def _check_name(repository: str) -> None:
    owner, slash, name = repository.partition("/")
    try:
        huggingface_hub.utils.validate_repo_id(repository)
    except ValueError as error:
        raise UsageError(f"{repository!r} is not a repository name: give OWNER/NAME") from error
    if not (owner and slash and name):
        raise UsageError(f"{repository!r} is not a repository name: give OWNER/NAME")


def push_files(folder: Path, repository: str) -> list[Path]:
    """The files of a finished run that are uploaded.

    Raises:
        UsageError: the folder holds no network with a card, or REPO is not a name.
    """
    _check_name(repository)
    if missing := [n for n in ("config.json", WEIGHTS, "README.md") if not (folder / n).is_file()]:
        raise UsageError(lacking(folder, f"finished run: it has no {missing[0]}"))
    return [folder / name for name in FILES if (folder / name).is_file()]


def push(
    files: Sequence[Path], repository: str, *, private: bool = False, more: Sequence[Path] = ()
) -> str:
    """Uploads files in one commit, to a repository that is created if needed.

    Files from an earlier push that the run no longer has, such as a calibration that was removed,
    are deleted, as the network would use them.

    Returns:
        The repository's address.

    Raises:
        FileError: the hub can't be reached, or refuses, for example without a token.
    """
    _refusal(repository, "config.json")  # an answer is enough: the file need not exist
    api = huggingface_hub.HfApi()
    adds = [
        huggingface_hub.CommitOperationAdd(path_in_repo=path.name, path_or_fileobj=path)
        for path in (*files, *more)
    ]
    gone = {*FILES, KNOWN} - {add.path_in_repo for add in adds}
    try:
        made = api.create_repo(repository, private=private, exist_ok=True)
        there = gone.intersection(api.list_repo_files(repository))
        deletes = [huggingface_hub.CommitOperationDelete(name) for name in sorted(there)]
        api.create_commit(repository, [*adds, *deletes], commit_message="A run of Regard")
    except Exception as error:  # of the HTTP library or the hub: a missing or wrong token
        hint = (
            "; `hf auth login` stores a token" if "401" in str(error) or "403" in str(error) else ""
        )
        answered = getattr(error, "response", None) is not None
        what = "the hub refused" if answered else "the upload failed"
        raise FileError(f"{repository}: {what} ({_why(error)}){hint}") from error
    return str(made)
