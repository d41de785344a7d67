"""`regard serve`."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from regard.commands.flags import DeviceFlag, EngineFlags, use_engine
from regard.extras import require


def command(
    run: Annotated[Path, Parameter(name="RUN")],
    /,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    megabytes: float = 20.0,
    megapixels: float = 50.0,
    requests: int = 16,
    seconds: float = 60.0,
    device: DeviceFlag = "auto",
    engine: Annotated[EngineFlags, Parameter(name="*")] = EngineFlags(),  # noqa: B008
) -> int:
    """Serve a web page and an HTTP API for a network.

    Parameters
    ----------
    run
        A run's folder, or any folder in timm's local-dir layout, or the name of weights that
        come with Regard.
    host
        Address to listen on; 127.0.0.1 is reachable from this machine only.
    port
        Port to listen on; 0 picks a free one.
    megabytes
        Largest upload.
    megapixels
        Largest image, half of it for DICOM, float and 32-bit images; the header is checked before
        the image is decoded.
    requests
        Maximum concurrent requests; further ones get HTTP 503.
    seconds
        Time limit of a request.
    """
    require("serve", "regard serve")  # before anything slow is imported
    engine.require()
    from regard.models.io import network_folder
    from regard.predict import load
    from regard.serve.server import read_test_result, serve
    from regard.serve.uploads import Limits

    limits = Limits(megabytes, megapixels, requests, seconds)
    run = network_folder(run)
    classifier = load(run, device)
    use_engine(classifier, engine, [], None, sizes=(1, 4, 16))
    serve(classifier, host=host, port=port, limits=limits, tested=read_test_result(run))
    return 0
