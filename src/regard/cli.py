"""The command line: parsing, and one-line errors. What the commands do is elsewhere."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import cyclopts
from cyclopts import App, Parameter

from regard import __version__

app = App(
    name="regard",
    version=__version__,
    help="Attention networks for image classification that show where they look.",
    help_format="plaintext",
    result_action="return_value",
)


class UsageError(ValueError):
    """A wrong call: the message is for the person who made it."""


@app.command
def demo(*, out: Path = Path("runs/demo"), seed: int = 0, epochs: int = 15) -> int:
    """Train AG-SonoNet-8 on real handwritten digits and show where it looks.

    Takes under a minute on two cores and downloads nothing. Writes the network, metrics.csv
    and report.html, a page to look at.

    Parameters
    ----------
    out
        Folder for the run; an earlier demo there is replaced.
    seed
        Of the split, the weights and the augmentation.
    epochs
        Passes over the training images.
    """
    if epochs < 1:
        raise UsageError(f"--epochs {epochs}: at least 1")
    from regard.demo import Settings, run

    run(out, settings=Settings(seed=seed, epochs=epochs), echo=_say)
    return 0


@app.command
def models(pattern: str = "*", *, json: bool = False) -> int:
    """List the networks: parameters and multiply-adds, the paper's figures beside ours.

    Parameters
    ----------
    pattern
        A part of a name, or a shell pattern such as 'cbam_*'.
    json
        Print JSON, with every figure in full.
    """
    from regard.figures import print_figures

    print_figures(pattern, as_json=json)
    return 0


@app.command
def convert(
    source: Path,
    *,
    model: str,
    out: Path,
    arg: Annotated[list[str] | None, Parameter(negative=())] = None,
) -> int:
    """Turn an authors' checkpoint into a folder that timm loads.

    Afterwards timm.create_model("local-dir:OUT", pretrained=True) is the network.

    Parameters
    ----------
    source
        The authors' checkpoint: .pth, .npz or .safetensors. Never unpickled.
    model
        The network of Regard's that it belongs to, such as cbam_resnet50.
    out
        A new folder.
    arg
        A further argument of the network as NAME=VALUE; may be repeated. Classes, input
        channels and the aggregation are seen from the checkpoint.
    """
    from regard.conversion import convert as run

    run(source, model=model, out=out, arguments=_arguments(arg or []), echo=_say)
    return 0


@app.command
def predict(
    run: Path,
    images: Annotated[list[Path], Parameter(negative=())],
    /,
    *,
    top: int = 5,
    json: bool = False,
) -> int:
    """Classify images with a trained network.

    Parameters
    ----------
    run
        The run's folder, such as runs/demo.
    images
        Image files.
    top
        How many classes to name for each.
    json
        Print one JSON object a line.
    """
    if top < 1:
        raise UsageError(f"--top {top}: at least 1")
    from regard.prediction import print_predictions

    failed = print_predictions(run, images, top=top, as_json=json, complain=_complain)
    return 0 if failed == 0 else 2 if failed == len(images) else 1


def _arguments(pairs: Sequence[str]) -> dict[str, Any]:
    import ast

    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(f"--arg {pair}: give NAME=VALUE, as aggregation=concat")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value  # a word, as `concat`
    return found


def _say(line: str) -> None:
    print(line, flush=True)


def _complain(line: str) -> None:
    print(f"regard: {line}", file=sys.stderr, flush=True)


def main(tokens: Sequence[str] | None = None) -> None:
    """Runs the command line and exits: 0 done, 1 failed in part, 2 a wrong call."""
    sys.exit(run_command(sys.argv[1:] if tokens is None else tokens))


def run_command(tokens: Sequence[str]) -> int:
    """Runs one command; a person's mistake becomes one line on standard error."""
    try:
        return app(tokens, exit_on_error=False, print_error=False) or 0
    except cyclopts.CycloptsError as error:
        _complain(f"{' '.join(str(error).split())} (see `regard --help`)")
        return 2
    except (ValueError, OSError) as error:
        _complain(" ".join(str(error).split()))
        return 2
    except KeyboardInterrupt:
        _complain("stopped")
        return 130


if __name__ == "__main__":
    main()
