"""The public `Classifier`: a trained network that predicts, and shows where it looked."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from regard.data.images import ImageSource
from regard.predict import Classifier as Predictor
from regard.predict import load_as

if TYPE_CHECKING:
    from regard.explanations.explanation import Explanation


class Classifier(Predictor):
    """A network with its class names and preprocessing: it predicts, and shows where it looked.

    `regard.load` makes one. Its other methods and attributes are inherited.
    """

    def explain(self, image: ImageSource, **options: Any) -> "Explanation":
        """One image's prediction, the network's own attention, Grad-CAM and channel weights.

        Examples:
            >>> classifier.explain("scan.png", target="malignant")  # a notebook shows the figure

        Args:
            image: anything that `decode` accepts.
            options: those of `regard.explain`: target, methods, reduce, layer, keep_channels.

        Returns:
            A `regard.Explanation`: classes, maps, figure(), overlay(name), save_figure, save_npz.

        Raises:
            ImageError: the image can't be read, or its prediction is not finite.
            UsageError: an option is not among its choices.
        """
        from regard.explanations.explanation import explain  # it draws: matplotlib is slow to load

        (shown,) = explain(self, [image], **options)
        return shown


def load(
    folder: str | Path,
    device: str = "cpu",
    *,
    calibrated: bool = True,
    precision: str = "fp32",
    flips: bool = False,
) -> Classifier:
    """Loads the network of a run's folder, or of any folder in timm's `local-dir` layout.

    Args:
        folder: the folder, or the name of weights that come with Regard, such as
            "ag_sononet8.digits".
        device: where it computes: cpu, cuda, mps, xpu, or auto for this machine's accelerator.
            Images are moved there automatically.
        calibrated: use the temperature and the threshold that `regard.calibrate` stored there,
            and flag images that are unlike the training images.
        precision: "fp32" or "bf16", see `regard.predict.use_precision`.
        flips: average the probabilities of each image and its mirror image.

    Raises:
        UsageError: the folder holds no network, or one that can't be loaded; this machine has no
            such device; or there is no such precision.
        CheckpointError: weights that come with Regard have been changed.
    """
    return load_as(
        Classifier, folder, device, calibrated=calibrated, precision=precision, flips=flips
    )
