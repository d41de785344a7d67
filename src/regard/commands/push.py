"""`regard push`: a run with its card to the Hugging Face hub."""

import logging
import tempfile
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from regard.files import plural

log: logging.Logger = logging.getLogger(__name__)


def command(
    run: Annotated[Path, Parameter(name="RUN")],
    repository: Annotated[str, Parameter(name="REPO")],
    /,
    *,
    private: Annotated[bool, Parameter(negative=())] = False,
    yes: Annotated[bool, Parameter(negative=())] = False,
) -> int:
    """Upload a finished run with its model card to the Hugging Face hub.

    Without --yes the files are only listed. After the upload predict, evaluate, explain,
    serve, export and train --weights take hf-hub:REPO, and
    timm.create_model("hf-hub:REPO", pretrained=True) loads it.

    Parameters
    ----------
    run
        Folder of a finished run.
    repository
        OWNER/NAME on the hub; created if it does not exist.
    private
        Make a new repository private.
    yes
        Upload.
    """
    from regard.models.hub import push, push_files
    from regard.models.io import load_model
    from regard.trained_on import KNOWN, known_images

    files = push_files(run, repository)
    load_model(run)  # a damaged one is refused
    known = known_images(run)
    for path in files:
        print(f"{path.name}: {path.stat().st_size:,} bytes")
    if known is not None:
        print(f"{KNOWN}: hashes of {plural(len(known), 'image')}, to recognize them")
    print("report.html, splits.csv and predictions.npz hold images or file names and stay here")
    if not yes:
        print(f"not uploaded to {repository}: --yes uploads these files")
        return 0
    with tempfile.TemporaryDirectory(prefix="regard-") as scratch:
        more = []
        if known is not None:
            more = [Path(scratch, KNOWN)]
            known.write(more[0])
        log.info(f"uploaded: {push(files, repository, private=private, more=more)}")
    return 0
