"""Files of the Hugging Face hub: what is cached, whether the hub can be reached, downloads.

`huggingface_hub` decides where the hub and the cache are (HF_ENDPOINT, HF_HOME) and whether it
may be asked at all (HF_HUB_OFFLINE).
"""

import queue
import threading
from pathlib import Path

import huggingface_hub
import timm
from huggingface_hub import constants

from regard.errors import FileError
from regard.files import reason

SECONDS = 5.0  # in which the hub must answer
WEIGHTS = "model.safetensors"


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


def check_reachable(repository: str, file: str, seconds: float | None = None) -> None:
    """Asks the hub for a file's size, to know at once whether a download can begin.

    Raises:
        FileError: the hub may not be asked, does not answer in time, or has no such file.
    """
    if constants.HF_HUB_OFFLINE:
        raise FileError("the hub is not asked: HF_HUB_OFFLINE is set")
    limit = SECONDS if seconds is None else seconds
    answers: queue.Queue[str] = queue.Queue()

    def ask() -> None:
        try:
            url = huggingface_hub.hf_hub_url(repository, file)
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
