"""The command line: parsing, and one-line errors. What the commands do is elsewhere."""

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import cyclopts
from cyclopts import App, Parameter

from regard.errors import RegardError, Stopped, UsageError
from regard.training.config import Recipe, fields_of
from regard.version import __version__

app = App(
    name="regard",
    version=__version__,
    help="Attention networks for image classification that show where they look.",
    help_format="plaintext",
    result_action="return_value",
)


RecipeFlags = make_dataclass(
    "RecipeFlags",
    [
        (
            f.name,
            Annotated[
                get_type_hints(Recipe)[f.name] | None,
                Parameter(
                    help=f.metadata["help"],
                    group=f"{f.metadata['group']} (of the recipe)",
                    consume_multiple=True,
                    negative_iterable=(),
                ),
            ],
            field(default=None),
        )
        for f in fields_of()
    ],
)
"""Every field of a recipe as a flag; None where it was not given."""


RecipeFlags.__module__ = __name__  # Python 3.11 says "types", which cyclopts takes for builtin


@dataclass(frozen=True)
class EngineFlags:
    """What answers: the flags that evaluate, predict and serve share."""

    engine: Annotated[
        str,
        Parameter(
            help="eager, compiled, onnxruntime or openvino; auto measures those that are "
            "installed, once for this network and machine, and takes the fastest whose answers "
            "agree."
        ),
    ] = "eager"
    precision: Annotated[
        str,
        Parameter(
            help="Of the engine: fp32, bf16, or auto: bf16 where the machine computes in it, but "
            "never with eager."
        ),
    ] = "auto"

    @property
    def plain(self) -> bool:
        """Whether the network itself answers, operator by operator in fp32."""
        return self.engine == "eager" and self.precision != "bf16"


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
    from regard.commands.demo import run

    run(out, seed=seed, epochs=epochs, echo=_say)
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
    from regard.commands.models import print_figures

    print_figures(pattern, as_json=json)
    return 0


@app.command
def bench(
    model: Annotated[list[str] | None, Parameter(negative=())] = None,
    /,
    *,
    peers: Annotated[bool, Parameter(negative=())] = False,
    engine: Annotated[list[str] | None, Parameter(negative=(), consume_multiple=True)] = None,
    precision: Annotated[list[str] | None, Parameter(negative=(), consume_multiple=True)] = None,
    train: Annotated[bool, Parameter(negative=())] = False,
    batch_size: Annotated[list[int] | None, Parameter(negative=(), consume_multiple=True)] = None,
    size: tuple[int, int] | None = None,
    threads: int | None = None,
    turns: int = 10,
    memory: Annotated[bool, Parameter(negative=())] = False,
    device: str = "cpu",
    json: bool = False,
    csv: Path | None = None,
) -> int:
    """Measure how fast networks predict here, beside the authors' way and their plain twins.

    The weights are random and the images noise: neither changes the time.

    Parameters
    ----------
    model
        Networks' names; without: cbam_resnet50, attention56 and ag_sononet8.
    peers
        Also the same networks of pytorchcv and timm.
    engine
        eager, compiled, onnxruntime, openvino; without: all that are installed.
    precision
        fp32, bf16, int8 (of openvino), or auto: all that the machine computes in.
    train
        Measure training steps as well.
    batch_size
        Images at a time; without: 8.
    size
        Height and width of the images; without: each network's own.
    threads
        Of the CPU; without: as many as torch takes.
    turns
        In which each is timed; more is surer.
    memory
        Measure each one's peak memory too, in a process of its own.
    device
        cpu or cuda.
    json
        Print JSON, with each turn's seconds.
    csv
        Add the rows to a CSV file.
    """
    from regard.commands.bench import command

    return command(
        model, csv=csv, as_json=json, echo=_complain, peers=peers, engines=engine,
        precisions=precision or ["auto"], train=train, batch_sizes=batch_size or [8], size=size,
        threads=threads, turns=turns, memory=memory, device=device,
    )  # fmt: skip


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
    from regard.commands.convert import convert as run

    run(source, model=model, out=out, arguments=_arguments(arg or []), echo=_say)
    return 0


@app.command
def data(
    source: Annotated[str, Parameter(name="DATA")],
    /,
    *,
    val: float = 0.1,
    test: float = 0.2,
    seed: int = 0,
    limit: int | None = None,
    workers: int | None = None,
    root: Path | None = None,
    json: bool = False,
) -> int:
    """Look at data before training: counts, sizes, faults, leakage.

    Parameters
    ----------
    source
        digits, a folder of class folders (with train, val, test or without), a CSV file
        (path, label, split, group), cifar10, cifar100, medmnist:FILE.npz or hf:NAME.
    val
        Share for validation where the data has no such split.
    test
        Share for the test where the data has no such split.
    seed
        Of those splits.
    limit
        Look at so many images only, evenly spread.
    workers
        Processes that decode; without: one a core.
    root
        Where cifar10 and cifar100 are kept.
    json
        Print JSON.
    """
    from regard.commands.data import print_check
    from regard.data import assign_splits, check_data, open_data

    table = assign_splits(open_data(source, root=root), val=val, test=test, seed=seed)
    with _bar("looking at the images") as progress:
        check = check_data(table, progress=progress, workers=workers, limit=limit)
    print_check(check, as_json=json)
    return 0


@app.command
def recipes(name: str | None = None) -> int:
    """List the recipes, or print one.

    Parameters
    ----------
    name
        A recipe's name; its TOML file is printed, as a start for one of your own.
    """
    from regard.training.config import load_recipe, shipped, summary

    texts = shipped()
    if name is None:
        for each, text in texts.items():
            print(f"{each:22s} {summary(text)}")
        return 0
    load_recipe(name)
    print(texts[name] if name in texts else Path(name).read_text(encoding="utf-8"), end="")
    return 0


@app.command
def train(
    source: Annotated[str, Parameter(name="DATA")],
    /,
    *,
    model: str | None = None,
    recipe: str = "quick",
    out: Path | None = None,
    resume: Annotated[bool, Parameter(negative=())] = False,
    weights: Path | None = None,
    pretrained: Annotated[bool, Parameter(negative=())] = False,
    root: Path | None = None,
    flags: Annotated[RecipeFlags, Parameter(name="*")] = RecipeFlags(),  # type: ignore[valid-type]  # noqa: B008
) -> int:
    """Train a network on labeled images.

    Writes a run's folder: the network (timm loads it), recipe, splits, metrics, report.html.
    Under `accelerate launch -m regard train ...` or torchrun it runs in many processes.

    Parameters
    ----------
    source
        digits, a folder of class folders (with train, val, test or without), a CSV file
        (path, label, split, group), cifar10, cifar100, medmnist:FILE.npz or hf:NAME.
    model
        A network's name, see `regard models`, or any of timm's; without: the recipe's.
    recipe
        A name, see `regard recipes`, or a TOML file; the flags below go on top.
    out
        The run's folder; without: runs/DATA-MODEL.
    resume
        Go on with the run in that folder from its last saved state.
    weights
        Start from the network of another run's folder, or from an authors' checkpoint.
    pretrained
        Start from timm's pretrained weights; for CBAM and SE the plain network's, grafted.
    root
        Where cifar10 and cifar100 are kept.
    """
    from regard.commands.train import train as run

    changes = {k: v for k, v in vars(flags).items() if v is not None}
    run(
        source, model=model, recipe=recipe, out=out, resume=resume, weights=weights,
        pretrained=pretrained, root=root, echo=_say, **changes,
    )  # fmt: skip
    return 0


@app.command
def evaluate(
    run: Annotated[str, Parameter(name="RUN")],
    source: Annotated[str | None, Parameter(name="DATA")] = None,
    /,
    *,
    split: str | None = None,
    weights: Path | None = None,
    root: Path | None = None,
    use: Annotated[EngineFlags, Parameter(name="*")] = EngineFlags(),
    json: bool = False,
) -> int:
    """Test a network on labeled images, with 95 % intervals.

    Parameters
    ----------
    run
        A run's folder; or a network's name, with --weights.
    source
        As for training; without: the run's own, as it was split.
    split
        train, val, test or all; without: test where there is one.
    weights
        For a network's name: a run's folder or an authors' checkpoint.
    root
        Where cifar10 and cifar100 are kept.
    json
        Print JSON.
    """
    from regard.commands.tables import print_evaluation
    from regard.evaluation import evaluate as measure
    from regard.runs import predictions_of

    def prepare(classifier: Any, reader: Any) -> None:
        count = len(reader.table)
        rows = range(0, count, max(1, count // 64))
        reads = [lambda i=i: classifier.preprocess.fit(reader.decode(i)) for i in rows]
        _use_engine(classifier, use, reads, count)

    unreadable: list[str] = []
    named, predictions = predictions_of(
        run, source, split=split, weights=weights, root=root, complain=unreadable.append,
        prepare=prepare,
    )  # fmt: skip
    found = measure(predictions)
    if json:
        from json import dumps

        content = {"split": named, **found.to_dict(), "unreadable": unreadable}
        print(dumps(content, indent=2, ensure_ascii=False))
    else:
        which = "all" if named == "all" else f"the {named}"
        print(f"{run} on {which} images of {source or 'its own data'}")
        print_evaluation(found)
    for line in unreadable:
        _complain(line)
    return 1 if unreadable else 0


@app.command
def predict(
    run: Annotated[Path, Parameter(name="RUN")],
    images: Annotated[list[Path], Parameter(negative=())],
    /,
    *,
    top: int = 5,
    use: Annotated[EngineFlags, Parameter(name="*")] = EngineFlags(),
    json: bool = False,
    csv: Path | None = None,
) -> int:
    """Classify images with a trained network.

    Parameters
    ----------
    run
        The run's folder, such as runs/demo.
    images
        Image files, and folders of them.
    top
        How many classes to name for each.
    json
        Print one JSON object a line.
    csv
        Write a CSV file instead.
    """
    if top < 1:
        raise UsageError(f"--top {top}: at least 1")
    if json and csv is not None:
        raise UsageError("--json and --csv: give one of them")
    from regard.commands.predict import print_predictions
    from regard.data.sources import images_below
    from regard.predict import load

    classifier = load(run)
    if not use.plain:
        paths = list(images_below(images))
        reads = [lambda p=p: classifier.decode(p) for p in paths[:64]]
        _use_engine(classifier, use, reads, len(paths))
    answered, failed = print_predictions(
        classifier, images, top=top, as_json=json, csv=csv, complain=_complain
    )
    if answered == failed == 0:
        raise UsageError(f"no image below {', '.join(map(str, images))}")
    return 0 if failed == 0 else 1 if answered else 2


@app.command
def explain(
    run: Annotated[Path, Parameter(name="RUN")],
    images: Annotated[list[Path], Parameter(negative=())],
    /,
    *,
    out: Path = Path("explained"),
    method: Annotated[list[str] | None, Parameter(negative=())] = None,
    target: str | None = None,
    reduce: str = "mean",
    layer: str | None = None,
    channels: Annotated[bool, Parameter(negative=())] = False,
    score: Annotated[bool, Parameter(negative=())] = False,
    masks: Path | None = None,
    baseline: str = "blur",
    seed: int = 0,
) -> int:
    """Show where a network looks, and how far that can be believed.

    For each image a picture and the raw maps (.npz); for several a contact sheet.

    Parameters
    ----------
    run
        The run's folder, or any folder in timm's local-dir layout.
    images
        Image files, and folders of them.
    out
        Folder for what is written.
    method
        attention (the network's own) or gradcam; may be repeated; without: both.
    target
        Class that Grad-CAM explains; without: the predicted one.
    reduce
        Channels of a mask to one map: mean, max, or a channel's number.
    layer
        Of Grad-CAM; without: the last map of features.
    channels
        Keep every channel of the masks in the .npz.
    score
        Deletion and insertion beside random maps, the image's middle and Grad-CAM; and whether
        the maps change with random weights.
    masks
        What people marked: a CSV (path, x0, y0, x1, y1) or a folder of mask images.
    baseline
        What takes deleted pixels' place: blur or mean.
    seed
        Of random maps, random weights and resamples.
    """
    from regard.commands.explain import explain_images
    from regard.explanations.explanation import METHODS
    from regard.explanations.faithfulness import Request
    from regard.predict import load

    channel: Any = int(reduce) if reduce.isdecimal() else reduce
    methods = tuple(method or METHODS)
    ask = Request(
        out, methods, target, channel, layer, channels, score, masks, baseline, seed,
        complain=_complain, echo=_say,
    )  # fmt: skip
    done = explain_images(load(run), images, ask)
    if done == ask.failed == 0:
        raise UsageError(f"no image below {', '.join(map(str, images))}")
    return 0 if ask.failed == 0 else 1 if done else 2


@app.command
def export(
    run: Annotated[Path, Parameter(name="RUN")],
    /,
    *,
    to: str,
    out: Path,
    data: str | None = None,
    root: Path | None = None,
    maps: Annotated[bool, Parameter(negative=())] = False,
    int8: Annotated[bool, Parameter(negative=())] = False,
    force: Annotated[bool, Parameter(negative=())] = False,
    overwrite: Annotated[bool, Parameter(negative=())] = False,
) -> int:
    """Write a network as one file that runs without Regard.

    The file takes resized images in 0..255, any number at once, and gives probabilities; class
    names and how to resize are in its metadata. It is loaded again and compared on real images
    before it appears.

    Parameters
    ----------
    run
        The run's folder; any folder in timm's local-dir layout with --data.
    to
        onnx, openvino (FILE.xml with FILE.bin beside) or torch (.pt2, of torch.export).
    out
        The file: .onnx, .xml or .pt2.
    data
        Images to compare on, as for training; without: the run's own.
    root
        Where cifar10 and cifar100 are kept.
    maps
        The attention maps come out as well.
    int8
        8-bit weights and activations (onnx, openvino), calibrated on training images; what it
        costs on the validation images is counted.
    force
        Keep an 8-bit file that loses more than 1 point of the accuracy.
    overwrite
        Replace a file that is there already.
    """
    from regard.export import export as write

    write(
        run, to=to, out=out, data=data, root=root, maps=maps, int8=int8, force=force,
        overwrite=overwrite, echo=_say,
    )  # fmt: skip
    return 0


@app.command
def serve(
    run: Annotated[Path, Parameter(name="RUN")],
    /,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    megabytes: float = 20.0,
    megapixels: float = 50.0,
    requests: int = 16,
    seconds: float = 60.0,
    use: Annotated[EngineFlags, Parameter(name="*")] = EngineFlags(),
) -> int:
    """Serve a page to try a network on, and its API.

    Parameters
    ----------
    run
        The run's folder, or any folder in timm's local-dir layout.
    host
        Address to listen on; 127.0.0.1 is this machine only.
    port
        Port to listen on; 0: any that is free.
    megabytes
        Largest upload.
    megapixels
        Largest image, told by its header before it is decoded.
    requests
        Requests in work at the same moment; the rest are told to come again.
    seconds
        For a request, before it is given up.
    """
    try:
        from regard.serve.app import serve as listen
        from regard.serve.uploads import Limits
    except ModuleNotFoundError as error:
        raise UsageError(
            f"the page needs {error.name}: pip install 'regard[serve]' brings it"
        ) from error
    from regard.predict import load

    limits = Limits(megabytes, megapixels, requests, seconds)
    classifier = load(run)
    _use_engine(classifier, use, [], None, sizes=(1, 4, 16))
    listen(classifier, host=host, port=port, limits=limits, echo=_say)
    return 0


@app.command
def report(run: Annotated[Path, Parameter(name="RUN")], /) -> int:
    """Write a run's report.html again.

    Parameters
    ----------
    run
        The run's folder.
    """
    from regard.report.build import report_run

    print(report_run(run))
    return 0


def _use_engine(
    classifier: Any,
    use: EngineFlags,
    reads: Sequence[Callable[[], Any]],
    count: int | None,
    sizes: tuple[int, ...] = (32,),
) -> None:
    """Gives a classifier the engine that was asked for; the plain network is one already."""
    from regard.engines import PRECISIONS, open_engine, probe_images
    from regard.machine import keep_freed_memory

    if use.precision not in PRECISIONS:
        raise UsageError(f"--precision {use.precision}: choose {', '.join(PRECISIONS)}")
    keep_freed_memory()
    if use.plain:
        return
    classifier.engine = open_engine(
        classifier, use.engine, precision=use.precision, sizes=sizes, images=probe_images(reads),
        count=count, echo=_complain,
    )  # fmt: skip


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


@contextlib.contextmanager
def _bar(title: str) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar in a terminal, called with (done, total); None elsewhere."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _say(line: str) -> None:
    print(line, flush=True)


def _complain(line: str) -> None:
    print(f"regard: {line}", file=sys.stderr, flush=True)


def main(tokens: Sequence[str] | None = None) -> None:
    """Runs the command line and exits.

    With 0 where all is done, 1 where work failed or failed in part, 2 for a wrong call, and
    128 + N where signal N ended it.
    """
    code = run_command(sys.argv[1:] if tokens is None else tokens)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = _unread()
    sys.exit(code)


def _unread() -> int:
    """As if SIGPIPE had ended it: whoever read the output, such as `head`, has enough."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + 13


def run_command(tokens: Sequence[str]) -> int:
    """Runs one command; a person's mistake becomes one line on standard error."""
    try:
        return app(tokens, exit_on_error=False, print_error=False) or 0
    except cyclopts.CycloptsError as error:
        _complain(f"{' '.join(str(error).split())} (see `regard --help`)")
        return 2
    except BrokenPipeError:
        return _unread()
    except Stopped as stopped:
        _complain(f"{stopped}; its state is saved: go on with the same command and --resume")
        return stopped.exit_code
    except RegardError as error:
        _complain(" ".join(str(error).split()))
        return error.exit_code
    except OSError as error:  # the system's: a full disk, a folder that may not be written
        if error.errno is None or os.environ.get("REGARD_DEBUG") == "1":
            return _fault(error)
        where = f"{error.filename}: " if error.filename is not None else ""
        _complain(f"{where}{(error.strerror or str(error)).lower()}")
        return 1
    except KeyboardInterrupt:
        _complain("stopped")
        return 130
    except Exception as error:
        return _fault(error)


def _fault(error: BaseException) -> int:
    """A fault of Regard's own: said so, with the traceback that a report needs."""
    _complain(
        f"a fault of Regard's own ({type(error).__name__}); please report it with the lines below"
    )
    traceback.print_exception(error)
    return 70


if __name__ == "__main__":
    main()
