"""`regard figures`."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from regard.commands.flags import DeviceFlag, check_folder
from regard.commands.subgroups import BandsFlag, parse_bands


def command(
    run: Annotated[Path, Parameter(name="RUN")],
    /,
    *,
    out: Path | None = None,
    format: Annotated[
        list[Literal["pdf", "svg", "png", "tiff"]] | None,
        Parameter(negative=(), consume_multiple=True),
    ] = None,
    dpi: int = 300,
    width: str = "85mm",
    images: int = 12,
    masks: Path | None = None,
    positive: str | None = None,
    bands: BandsFlag = None,
    scored: int | None = None,
    overwrite: Annotated[bool, Parameter(negative=())] = False,
    device: DeviceFlag = "auto",
) -> int:
    """Write every figure of a finished run as files for print.

    ROC, precision-recall, reliability, confusion matrix, calibration and decision curve of one
    class, subgroups, learning curves, faithfulness, and explanations of the images that the
    report shows; vector graphics with embedded fonts where the format has them. methods.md drafts
    the methods paragraph of a paper, checklists.md answers CLAIM, STARD-AI and TRIPOD+AI as far
    as the run's data allows, subgroups.csv has every number of the subgroups.

    Parameters
    ----------
    run
        Folder of the run.
    out
        Output folder (default: figures in the run's folder).
    format
        pdf, svg, png or tiff; several are written side by side (default: pdf).
    dpi
        Resolution of png and tiff, and of pictures within pdf and svg.
    width
        Width of each figure, in mm, cm, in or pt.
    images
        Number of images to explain (0 = none).
    masks
        Masks to outline in the explanations: a CSV file (path, x0, y0, x1, y1 in pixels) or a
        folder of mask images.
    positive
        Class of the ROC, precision-recall and decision curves (default: the rarer of two classes;
        with more classes, each against the rest).
    scored
        Number of images on which the maps' faithfulness is measured (default: the run's).
    overwrite
        Replace files in the output folder that Regard did not write.
    """
    check_folder(out)
    limits = parse_bands(bands)
    from regard.explanations.print_style import width_in_inches
    from regard.report.figures import FigureOptions, write_figures
    from regard.report.methods import as_markdown, methods_of
    from regard.report.source import RunSource

    options = FigureOptions(
        formats=tuple(dict.fromkeys(format or ["pdf"])), dpi=dpi, images=images,
        width=width_in_inches(width), positive=positive, bands=limits, scored=scored,
        overwrite=overwrite,
    )  # fmt: skip
    source = RunSource(run, masks, device)
    written = write_figures(
        source, out or run / "figures", options,
        lambda measured: as_markdown(methods_of(source, measured, source.command)),
        ("methods.md", "checklists.md"),
    )  # fmt: skip
    for path in written:
        print(path)
    return 0
