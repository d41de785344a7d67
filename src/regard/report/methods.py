"""A methods paragraph and answers to checklists, from what is stored about a run."""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Sequence

from regard.attention import channel_gate_names
from regard.data.splits_file import Row, read_rows
from regard.evaluation import Estimate
from regard.evaluation.thresholds import from_probability
from regard.explanations.print_style import SOFTWARE
from regard.files import markdown, plural
from regard.report.checklists import CHECKLISTS, SOURCES
from regard.report.figures import Measured
from regard.report.page import Methods
from regard.report.source import RunSource
from regard.report.subgroups import gap_sentences
from regard.report.training_words import (
    imbalance,
    partitions,
    preprocessing,
    selection,
    technology,
    training,
    with_defaults,
)
from regard.report.words import percent, percent_range
from regard.trained_on import own_data

_SPLITS = {"train": "training", "val": "validation", "test": "test"}
MUST = "you must say"
_NOTE = "Drafted from what the run knows: complete what it can't know, check every sentence."


def methods_of(source: RunSource, measured: Measured, command: str) -> Methods:
    """The paragraph and the checklists of a run.

    Args:
        source: the run.
        measured: the data of its figures.
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
    text = "\n\n".join(f"**{title}.** {markdown(rest)}" for title, _, rest in parts)
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


def as_text(methods: Methods, with_markup: bool) -> str:
    """The paragraph and the checklists as one text, in Markdown or plain."""
    if with_markup:
        first, second = as_markdown(methods).values()
        return f"{first}\n{second.partition('-->')[2].lstrip()}"
    lines = [f"{SOFTWARE} wrote this file and may replace it: edit a copy.", "", "METHODS", "",
             _NOTE, "", methods.text]  # fmt: skip
    for name, (origin, items) in methods.checklists.items():
        lines += ["", "", name, "", origin, ""]
        lines += [f"{n}  {topic}\n    {answer or MUST}" for n, topic, answer in items]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    # code, too, ends at a bar
    return re.sub(r"(?<!\\)\|", r"\\|", markdown(" ".join(text.split())))


class _Sentences:
    """What can be stated about a run, under the names that `checklists` uses."""

    def __init__(self, source: RunSource, measured: Measured, command: str) -> None:
        self.source, self.measured, self.command = source, measured, command
        self.plan, self.facts = source.plan, source.facts
        self.recipe = with_defaults(source.recipe)
        self.rows = list(read_rows(source.run.path / "splits.csv"))

    def all(self) -> dict[str, str]:
        """The sentences; "" or missing if the run does not know."""
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
            "technology": self._technology(),
            "numbers": f"{said['counts']} {said['missing']}",
            "development": f"{said['splits']} {said['selection']}",
            "building": f"{said['model']} {said['training']} {said['selection']}",
            "ensembling": "None: one network.",
            "internal": said["results"] if self.source.split == "test" else "",
            "predictors": "The pixels of one image.",
            "predictions": self._predictions(),
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
        used = ", ".join(f"{_SPLITS[s]} {n:,}" for s, n in self.facts["counts"].items())
        return (
            f"{plural(count, 'image')} of these could not be read and took no part "
            f"(unreadable.csv); images that did: {used}."
        )

    def _subsets(self) -> str:
        limit = self.recipe["limit"]
        return "" if limit is None else f"At most {limit:,} images were used for training."

    def _splits(self) -> str:
        counts = {split: len(rows) for split, rows in self._by_split().items()}
        grouped = any(row.group for row in self.rows)
        return partitions(self.recipe, counts, _given(self.source), grouped)

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
        same += self._leaks()
        if not groups:
            return f"Partitions are disjoint by image only.{same}"
        divided = sum(len(splits) > 1 for splits in groups.values())
        if divided:
            return f"{plural(divided, 'group')} in more than one partition.{same}"
        return f"No group is in more than one partition.{same}"

    def _leaks(self) -> str:
        """What the run warned of that two partitions share, such as near-duplicates."""
        leaks = [w for w in self.facts.get("warnings", []) if "in different splits" in w]
        return "".join(f" Warning: {w.partition('; keep_together')[0]}." for w in leaks)

    @property
    def _started(self) -> bool:
        return bool(self.plan.get("weights") or self.plan.get("pretrained"))

    def _preprocessing(self) -> str:
        return preprocessing(self.recipe, self.plan["preprocess"], started=self._started)

    # ---- network -------------------------------------------------------------------------
    def _technology(self) -> str:
        return f"Deep learning: {technology(self.source.classifier.model)}."

    def _predictions(self) -> str:
        stored = self.source.calibration
        divided = (
            "" if stored is None or stored.temperature == 1
            else f", divided by the temperature {stored.temperature:.4g}"
        )  # fmt: skip
        return f"The softmax of the network's outputs{divided}; `regard predict` computes it."

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
        if self._started:
            start = self.plan.get("start") or self.plan.get("weights") or "pretrained weights"
            return f"Training started from {start}."
        return f"Weights were initialized at random, seed {self.recipe['seed']}."

    def _training(self) -> str:
        network = self.source.classifier.model
        heads, gates = getattr(network, "head_weights", ()), bool(channel_gate_names(network))
        return training(self.recipe, self.facts, heads, gates)

    def _imbalance(self) -> str:
        return imbalance(self.recipe)

    def _selection(self) -> str:
        return selection(self.recipe, self.facts)

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
        found = self.source.evaluation
        if not found.metrics["top1"].has_interval:
            return f"One {'image' if found.n_groups is None else 'group'} gives no intervals."
        grouped = self.source.predictions.groups is not None
        shares = " with the effective sample size of the groups" if grouped else ""
        calibration = ""
        if self.measured.diagnostics.one_class is not None:
            calibration = (
                "; for calibration slope and intercept Student's t with robust standard errors"
            )
        return (
            f"95 % intervals: Wilson's for shares{shares}, and for areas with the variance of 1000 "
            f"bootstrap samples of {'whole groups' if grouped else 'images'}, for ROC AUCs "
            "Newcombe's (2006, method 5) where that is wider; for means of recalls, precisions or "
            "areas over classes from the classes' own intervals (after Zou and Donner "
            f"2008){calibration}; else the samples' expanded percentiles, for the negative "
            "log-likelihood and the Brier score Student's t where that is wider, above also of "
            "the logarithm."
        )

    def _threshold(self) -> str:
        stored, one = self.source.calibration, self.measured.diagnostics.one_class
        if one is not None and one.threshold is not None and stored is not None:
            rule = stored.threshold.rule if stored.threshold is not None else ""
            return (
                f"{one.positive} {from_probability(one.threshold)} ({rule}), chosen on "
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
        if (one := self.measured.diagnostics.one_class) is not None and one.threshold is not None:
            on += ", by the most probable class"  # which the threshold may overrule
        return f"{on}: {', '.join(parts)}."

    def _diagnostic(self) -> str:
        one = self.measured.diagnostics.one_class
        if one is None:
            auc = self.measured.diagnostics.metrics.get("roc_auc_macro")
            return "" if auc is None else f"ROC AUC, mean over classes: {_plain(auc)}."
        m = one.metrics
        return (
            f"{one.positive} against the rest: ROC AUC {_plain(m['roc_auc'])}"
            f"{'' if one.threshold is None else '; at its threshold'}, sensitivity "
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


def _given(source: RunSource) -> set[str] | None:
    """The splits that the data comes with; None if it can't be opened."""
    try:
        table = own_data(source.run.path, source.plan)
    except (ValueError, OSError):
        return None
    return set(table.splits.tolist()) - {""}


def _share(estimate: Estimate) -> str:
    if math.isnan(estimate.value):
        return "not defined"
    if not estimate.has_interval:
        return percent(estimate.value).replace("\u00a0", " ")
    return f"{percent(estimate.value)} ({percent_range(estimate)})".replace("\u00a0", " ")


def _plain(estimate: Estimate) -> str:
    if math.isnan(estimate.value):
        return "not defined"
    if not estimate.has_interval:
        return f"{estimate.value:.3f}"
    return f"{estimate.value:.3f} ({estimate.low:.3f}–{estimate.high:.3f})"


def _crossed(counts: dict[str, int], name: str) -> str:
    return (
        f"{name}: {counts['tp']} true positive, {counts['fp']} false positive, {counts['tn']} true "
        f"negative, {counts['fn']} false negative."
    )
