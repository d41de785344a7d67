"""A methods paragraph and answers to checklists, from what a run knows of itself."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

from regard.data.sources import open_data
from regard.data.splits_file import Row, read_rows
from regard.evaluation import Estimate
from regard.explanations.print_style import SOFTWARE
from regard.files import plural
from regard.report.checklists import CHECKLISTS, SOURCES
from regard.report.figures import Measured
from regard.report.page import Methods
from regard.report.source import RunSource
from regard.report.subgroups import gap_sentences
from regard.report.words import percent, percent_range

_SPLITS = {"train": "training", "val": "validation", "test": "test"}
_RESIZE = {
    "squash": "scaled to", "crop": "scaled and cropped at the center to",
    "pad": "scaled and padded to",
}  # fmt: skip
MUST = "you must say"
_NOTE = "Drafted from what the run knows: complete what it can't know, check every sentence."


def methods_of(source: RunSource, measured: Measured, command: str) -> Methods:
    """The paragraph and the checklists of a run.

    Args:
        source: the run.
        measured: the numbers of its figures.
        command: the command that trained it.
    """
    said = _Sentences(source, measured, command).all()
    paragraphs = [
        ("Data", ("data", "counts", "missing")), ("Partitions", ("splits", "level")),
        ("Preprocessing", ("preprocessing",)), ("Network", ("model", "initialization")),
        ("Training", ("training", "imbalance")), ("Selection of the weights", ("selection",)),
        ("Evaluation", ("metrics", "intervals", "threshold", "results", "diagnostic",
                        "calibration", "parts")),
        ("Explanations", ("explanations",)), ("Software", ("software", "availability")),
    ]  # fmt: skip
    text = "\n\n".join(
        f"{title}. {' '.join(said[name] for name in names if said.get(name))}"
        for title, names in paragraphs
        if any(said.get(name) for name in names)
    )
    lists = {
        name: (SOURCES[name], [(n, topic, said.get(key) or None) for n, topic, key in items])
        for name, items in CHECKLISTS.items()
    }
    return Methods(text, lists)


def as_markdown(methods: Methods) -> dict[str, str]:
    """The paragraph and the checklists as the files methods.md and checklists.md."""
    mark = f"<!-- {SOFTWARE} wrote this file and may replace it: edit a copy. -->\n\n"
    note = f"{_NOTE}\n\n"
    parts = [part.partition(". ") for part in methods.text.split("\n\n")]
    text = "\n\n".join(f"**{title}.** {rest}" for title, _, rest in parts)
    tables = []
    for name, (origin, items) in methods.checklists.items():
        answered = sum(answer is not None for *_, answer in items)
        rows = [
            f"| {n} | {_cell(topic)} | {_cell(answer) if answer else f'**{MUST}**'} |"
            for n, topic, answer in items
        ]
        tables.append(
            f"## {name}\n\n{origin} {answered} of {len(items)} items are answered from the run. "
            "Topics in short; the published checklist has the wording that counts.\n\n"
            "| item | topic | answer |\n|---|---|---|\n" + "\n".join(rows) + "\n"
        )
    return {
        "methods.md": f"{mark}# Methods\n\n{note}{text}\n",
        "checklists.md": f"{mark}# Reporting checklists\n\n{note}" + "\n".join(tables),
    }


def as_text(methods: Methods, markdown: bool) -> str:
    """The paragraph and the checklists as one text, in Markdown or plain."""
    if markdown:
        first, second = as_markdown(methods).values()
        return f"{first}\n{second.partition('-->')[2].lstrip()}"
    lines = [f"{SOFTWARE} wrote this file and may replace it: edit a copy.", "", "METHODS", "",
             _NOTE, "", methods.text]  # fmt: skip
    for name, (origin, items) in methods.checklists.items():
        lines += ["", "", name, "", origin, ""]
        lines += [f"{n}  {topic}\n    {answer or MUST}" for n, topic, answer in items]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


class _Sentences:
    """What can be said of a run, by the names that `checklists` uses."""

    def __init__(self, source: RunSource, measured: Measured, command: str) -> None:
        self.source, self.measured, self.command = source, measured, command
        self.plan, self.facts, self.recipe = source.plan, source.facts, source.recipe
        self.rows = list(read_rows(source.run.path / "splits.csv"))

    def all(self) -> dict[str, str]:
        """The sentences; "" or missing where the run does not know."""
        said = {
            name: getattr(self, f"_{name}")()
            for name in (
                "data", "counts", "missing", "subsets", "splits", "level", "preprocessing",
                "model", "initialization", "training", "imbalance", "selection", "metrics",
                "intervals", "threshold", "results", "diagnostic", "calibration", "parts",
                "failures", "explanations",
                "software", "availability",
            )
        }  # fmt: skip
        one = self.measured.diagnostics.one_class
        return said | {
            "technology": "Deep learning: a convolutional neural network with attention.",
            "numbers": f"{said['counts']} {said['missing']}",
            "development": f"{said['splits']} {said['selection']}",
            "building": f"{said['model']} {said['training']} {said['selection']}",
            "ensembling": "None: one network.",
            "internal": said["results"] if self.source.split == "test" else "",
            "predictors": "The pixels of one image.",
            "predictions": "The softmax of the network's outputs; `regard predict` computes it.",
            "updating": self._updating(),
            "table": "" if one is None else _crossed(one.counts, one.positive),
            "outputs": "predictions.npz holds the probabilities of every evaluated image.",
        }

    # ---- data ----------------------------------------------------------------------------
    def _data(self) -> str:
        contents = sorted(f"{row.content:016x}" for row in self.rows if row.content)
        digest = hashlib.sha256("".join(contents).encode()).hexdigest()[:16]
        groups = {row.group for row in self.rows if row.group}
        grouped = (
            f"They come in {plural(len(groups), 'group')} (such as patients)." if groups
            else "No groups (such as patients) were given: images count as independent."
        )  # fmt: skip
        return (
            f"{plural(len(self.rows), 'image')} of {len(self.plan['classes'])} classes from "
            f"{self.plan['data']} (content hash {digest}; each image's hash is in splits.csv). "
            f"{grouped}"
        )

    def _counts(self) -> str:
        parts = []
        for split, rows in self._by_split().items():
            counts = Counter(row.label for row in rows)
            listed = ", ".join(f"{c} {counts[c]:,}" for c in self.plan["classes"][:20])
            more = "; …" if len(self.plan["classes"]) > 20 else ""
            parts.append(f"{_SPLITS[split]} {len(rows):,} ({listed}{more})")
        return f"Images by partition and class: {'; '.join(parts)}."

    def _by_split(self) -> dict[str, list[Row]]:
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            found.setdefault(row.split or "train", []).append(row)
        return {split: found[split] for split in _SPLITS if split in found}

    def _missing(self) -> str:
        count = self.facts.get("unreadable", 0)
        if not count:
            return "Every image could be read."
        return f"{plural(count, 'image')} could not be read and took no part (unreadable.csv)."

    def _subsets(self) -> str:
        limits = [flag for flag in ("--limit", "--classes") if flag in self.command]
        return f"Limited by {', '.join(limits)} of the command." if limits else ""

    def _splits(self) -> str:
        parts = [
            f"{_SPLITS[s]} {plural(len(rows), 'image')}" for s, rows in self._by_split().items()
        ]
        given = _given(self.plan)
        r = self.recipe
        how = "The partitions are stored in splits.csv."
        if given:
            how = "The partitions were given with the data."
        elif given is False:
            how = (
                f"They were drawn at random (seed {r.get('split_seed', r['seed'])}), stratified by "
                f"class, validation {r['val']:g} and test {r['test']:g} of the images."
            )
        return f"{', '.join(parts)}. {how}"

    def _level(self) -> str:
        groups: dict[str, set[str]] = {}
        contents: dict[int, set[str]] = {}
        for row in self.rows:
            if row.group:
                groups.setdefault(row.group, set()).add(row.split)
            if row.content:
                contents.setdefault(row.content, set()).add(row.split)
        twice = sum(len(splits) > 1 for splits in contents.values())
        same = (
            f" {plural(twice, 'image')} with the same content in more than one partition."
            if twice else " No image has the same content in two partitions."
        )  # fmt: skip
        if not groups:
            return f"Partitions are disjoint by image only.{same}"
        divided = sum(len(splits) > 1 for splits in groups.values())
        if divided:
            return f"{plural(divided, 'group')} in more than one partition.{same}"
        return f"No group is in more than one partition.{same}"

    def _preprocessing(self) -> str:
        p, r = self.plan["preprocess"], self.recipe
        c, h, w = p["input_size"]
        how = _RESIZE.get(p.get("resize", ""), "scaled to")
        normal = {
            "data": "with the mean and deviation of the training images",
            "image": "with each image's own mean and deviation",
        }.get(r.get("normalization", ""), "with the mean and deviation of the starting weights")
        augment = [
            f"{name.replace('_', ' ')} {r[name]}" for name in (
                "random_crop", "flip", "rotate", "zoom", "axis_scale", "shift", "color_jitter",
                "lighting", "random_erasing", "mixup",
            ) if r.get(name) not in (None, 0, 0.0, "none", [1.0, 1.0])
        ]  # fmt: skip
        extra = f" Augmentation of training images: {', '.join(augment)}." if augment else ""
        channels = "grayscale" if c == 1 else "color" if c == 3 else f"{c} channels"
        return f"Images were {how} {w}×{h} pixels, {channels}, and normalized {normal}.{extra}"

    # ---- network -------------------------------------------------------------------------
    def _model(self) -> str:
        made = self.plan.get("model_args") or {}
        with_ = f" with {', '.join(f'{k}={v}' for k, v in made.items())}" if made else ""
        graft = self.recipe.get("graft", "none")
        inserted = f" with inserted {graft.upper()} attention" if graft != "none" else ""
        return (
            f"{self.plan['model']}{with_}{inserted}, {self.facts['parameters']:,} parameters; "
            "config.json and recipe.toml describe it in full."
        )

    def _initialization(self) -> str:
        if self.plan.get("weights"):
            return f"Training started from the weights {self.plan['weights']}."
        if self.plan.get("pretrained"):
            return "Training started from pretrained weights."
        return f"Weights were initialized at random, seed {self.recipe['seed']}."

    def _training(self) -> str:
        r, f = self.recipe, self.facts
        more = [f"weight decay {r['weight_decay']:g}"]
        if r["optimizer"] == "sgd":
            more.insert(0, f"momentum {r['momentum']:g}")
        if r.get("label_smoothing"):
            more.append(f"label smoothing {r['label_smoothing']:g}")
        return (
            f"{r['optimizer'].upper()}, learning rate {r['lr']:g}, schedule {r['schedule']}, "
            f"{', '.join(more)}, batch size {r['batch_size']}, {plural(f['steps'], 'step')} "
            f"({f['epochs']:.3g} epochs), cross entropy, in {f['seconds']:.0f} s on {f['device']}."
        )

    def _imbalance(self) -> str:
        weights, sampler = self.recipe.get("class_weights", "none"), self.recipe.get("sampler")
        used = []
        if weights != "none":
            used.append(f"class weights in the loss: {weights}")
        if sampler == "balanced":
            used.append("images drawn in inverse proportion to the size of their class")
        return f"{'; '.join(used)}." if used else "Nothing was done about class imbalance."

    def _selection(self) -> str:
        chosen = self.facts.get("selected")
        if not chosen:
            return ""
        if chosen["by"] == "the last epoch":
            return "The weights are those of the last epoch; no image chose them."
        return f"The weights are those of epoch {chosen['epoch']:g}, chosen by {chosen['by']}."

    def _explanations(self) -> str:
        if not self.source.methods:
            return ""
        names = {"attention": "the network's own attention maps", "gradcam": "Grad-CAM"}
        shown = " and ".join(names[m] for m in self.source.methods)
        found = self.measured.faithfulness
        if found is None:
            return f"Explained by {shown}; how faithful they are was not measured."
        return (
            f"Explained by {shown}, checked by deletion and insertion against random maps and a "
            f"central blob and by random weights, on {plural(found.images, 'image')}."
        )

    # ---- evaluation ----------------------------------------------------------------------
    def _metrics(self) -> str:
        return (
            "Accuracy, balanced accuracy, recall, precision and F1 by class, ROC AUC, average "
            "precision, Matthews correlation, Cohen's kappa, Brier score, expected calibration "
            "error; ROC, precision-recall, reliability and (one class) decision curves."
        )

    def _intervals(self) -> str:
        if self.source.predictions.groups is not None:
            return "95 % intervals are of 1000 bootstrap samples of whole groups."
        return (
            "95 % intervals: Wilson's for shares of independent images, else of 1000 bootstrap "
            "samples of images."
        )

    def _threshold(self) -> str:
        stored, one = self.source.calibration, self.measured.diagnostics.one_class
        if one is not None and one.threshold is not None and stored is not None:
            rule = stored.threshold.rule if stored.threshold is not None else ""
            return (
                f"{one.positive} from a probability of {one.threshold:.4g} on ({rule}), chosen on "
                f"{stored.source}."
            )
        return "The network gives probabilities; the most probable class is its answer."

    def _updating(self) -> str:
        stored = self.source.calibration
        if stored is None or stored.temperature == 1:
            return "None."
        return f"Temperature {stored.temperature:.4g}, fitted on {stored.source}."

    def _results(self) -> str:
        found = self.source.evaluation
        parts = [
            f"{name} {_share(found.metrics[key])}"
            for key, name in (("top1", "accuracy"), ("balanced_accuracy", "balanced accuracy"))
        ]
        on = f"On {plural(found.n, _SPLITS[self.source.split] + ' image')}"
        return f"{on}: {', '.join(parts)}."

    def _diagnostic(self) -> str:
        one = self.measured.diagnostics.one_class
        if one is None:
            auc = self.measured.diagnostics.metrics.get("roc_auc_macro")
            return "" if auc is None else f"ROC AUC, mean over classes: {_plain(auc)}."
        m = one.metrics
        return (
            f"{one.positive} against the rest: ROC AUC {_plain(m['roc_auc'])}, sensitivity "
            f"{_share(m['sensitivity'])}, specificity {_share(m['specificity'])}, positive "
            f"predictive value {_share(m['ppv'])}, negative predictive value {_share(m['npv'])}."
        )

    def _calibration(self) -> str:
        before, after = self.measured.plain, self.measured.calibrated
        if after is before:
            return ""
        return (
            f"Temperature scaling changed the calibration error (ECE) from {_plain(before['ece'])} "
            f"to {_plain(after['ece'])} and the Brier score from {_plain(before['brier'])} to "
            f"{_plain(after['brier'])}."
        )

    def _parts(self) -> str:
        """The subgroups with their accuracy, and the largest gaps."""
        said = []
        for found in self.measured.subgroups:
            parts = [
                f"{name} {_share(part.metrics['top1'])}"
                for name, part in found.parts.items() if not part.too_small
            ]  # fmt: skip
            if parts:
                gaps = " ".join(gap_sentences(found))
                said.append(f"Accuracy by {found.column}: {'; '.join(parts)}. {gaps}".strip())
        return " ".join(said)

    def _failures(self) -> str:
        found = self.source.evaluation
        mistakes: Sequence[tuple[int, int, int]] = found.confusions(3)
        if not mistakes:
            return "No image was classified wrongly."
        listed = "; ".join(f"{found.classes[i]} as {found.classes[j]}: {n}" for i, j, n in mistakes)
        return f"The most frequent mistakes: {listed}. The report shows them with their maps."

    # ---- software ------------------------------------------------------------------------
    def _software(self) -> str:
        versions = ", ".join(f"{n} {v}" for n, v in self.facts["versions"].items())
        return f"{versions}. Command: `{self.command}`." if self.command else f"{versions}."

    def _availability(self) -> str:
        return (
            "The run's folder holds the weights (model.safetensors), the recipe and the "
            "partitions; state where it, the data and the code can be obtained."
        )


def _given(plan: dict[str, Any]) -> bool | None:
    """Whether the data came with its partitions; None where it can't be opened."""
    try:
        table = open_data(plan["data"], root=plan.get("root"), splits=plan.get("reading", "auto"))
    except (ValueError, OSError):
        return None
    return bool((table.splits != "").any())


def _share(estimate: Estimate) -> str:
    if not estimate.has_interval:
        return percent(estimate.value).replace("\u00a0", " ")
    return f"{percent(estimate.value)} ({percent_range(estimate)})".replace("\u00a0", " ")


def _plain(estimate: Estimate) -> str:
    if not estimate.has_interval:
        return f"{estimate.value:.3f}"
    return f"{estimate.value:.3f} ({estimate.low:.3f}–{estimate.high:.3f})"


def _crossed(counts: dict[str, int], name: str) -> str:
    return (
        f"{name}: {counts['tp']} true positive, {counts['fp']} false positive, {counts['tn']} true "
        f"negative, {counts['fn']} false negative."
    )
