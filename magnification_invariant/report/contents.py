"""What a report says: sections of words, tables and pictures, read from the records of finished cells."""

import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
import safetensors.numpy

from magnification_invariant import metrics
from magnification_invariant.data.splits import domain_name
from magnification_invariant.metrics.intervals import FEWEST_PATIENTS, Difference
from magnification_invariant.metrics.invariance import DomainProbe
from magnification_invariant.report import pictures
from magnification_invariant.report.page import Picture, Section, Table, interval, number
from magnification_invariant.report.runs import (
    PRIMARY,
    Run,
    by_title,
    difference,
    estimate,
    joined,
    read_runs,
    spread,
    star,
)
from magnification_invariant.report.signatures import signature_sections
from magnification_invariant.report.zoom import zoom_blocks

# Ezuma and Medaiyese, arXiv 2604.25817: each model at the held-out magnification that was best for it.
PAPER = {
    "erm": ("Baseline", 200, 0.965, 0.931, 0.089, 1074, 0.00),
    "gan": ("GAN-augmented", 100, 0.962, 0.928, 0.092, 1112, 0.02),
    "dann": ("Domain-general", 200, 0.967, 0.930, 0.063, 306, 0.99),
}
NAMES = {"auc": "AUC", "f1": "F1", "brier": "Brier"}


class Comparison(NamedTuple):
    """One line of the forest: `metric` of row `a` minus that of row `b`."""

    a: str
    b: str
    metric: str
    where: str
    found: Difference
    adjusted: float

    @property
    def text(self) -> str:
        return f"{NAMES[self.metric]}, {self.a} - {self.b}, {self.where}"


def sections(folders: Iterable[Path], pairs: list[tuple[str, str]] | None = None, *, refits: int = 0) -> list[Section]:
    """The report on finished cells; nothing is trained or predicted for it.

    Args:
        folders: cells, or folders of them.
        pairs: rows to compare (a, b), the first pair being the primary one; by default every method with "erm" of the
            same zoom, "dann" first.
        refits: of every signature, on halves of the patients, the one thing fitted here, see `signature_sections`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # too few patients for an interval: the tables show none
        runs = read_runs(folders)
        groups = by_title(runs)
        networks = {title: group for title, group in groups.items() if group[0].is_network}
        compared = compare(networks, default_pairs(list(networks)) if pairs is None else pairs)
        return [
            ("What can and cannot be concluded", _conclusions(networks, compared)),
            ("Beside the paper", _beside_the_paper(groups)),
            ("Each held-out magnification", _by_held_out(groups)),
            ("Paired differences", _differences(compared)),
            ("ROC curves", [Picture.drawn("roc", "ROC curves by held-out magnification.", pictures.roc, runs)]),
            ("Calibration", _calibration(networks)),
            ("Which epoch counts", _selection(networks)),
            ("Other metrics", _other_metrics(groups)),
            ("What embeddings tell of the acquisition", _invariance(networks)),
            *([("Zoom curves", curves)] if (curves := zoom_blocks(networks)) else []),
            *signature_sections(runs, refits),
            ("Training", _training(networks)),
            ("Compute and provenance", _compute(groups)),
        ]


def default_pairs(titles: list[str]) -> list[tuple[str, str]]:
    """Every method against "erm" of the same zoom, "dann" first."""
    pairs = [(title, "erm + zoom" if title.endswith(" + zoom") else "erm") for title in titles]
    pairs = [(a, b) for a, b in pairs if a != b and b in titles]
    return sorted(pairs, key=lambda pair: (pair[0] != "dann", pair[0] != "dann + zoom"))


def compare(groups: dict[str, list[Run]], pairs: list[tuple[str, str]]) -> list[Comparison]:
    """The primary comparison and, after it, the secondary family with Holm-adjusted p-values.

    Primary: Brier of the first pair over all held-outs. Secondary: its AUC and F1, its Brier at each held-out
    magnification, and the Brier of each further pair.

    Raises:
        ValueError: a pair names a row that is not there.
    """
    unknown = {title for pair in pairs for title in pair} - groups.keys()
    if unknown:
        raise ValueError(f"no finished runs of {', '.join(sorted(unknown))}; there are {', '.join(groups)}")
    if not pairs:
        return []
    a, b = pairs[0]
    held_outs = sorted({run.held_out for run in groups[a]} & {run.held_out for run in groups[b]})
    tests = [(a, b, PRIMARY, None), (a, b, "auc", None), (a, b, "f1", None)]
    tests += [(a, b, PRIMARY, held_out) for held_out in held_outs if len(held_outs) > 1]
    tests += [(*pair, PRIMARY, None) for pair in pairs[1:]]
    found = []
    for a, b, metric, held_out in tests:
        chosen = [[run for run in groups[title] if held_out in (None, run.held_out)] for title in (a, b)]
        found.append(difference(*chosen, metric))
    adjusted = [found[0].p_value, *metrics.holm([each.p_value for each in found[1:]])]
    return [
        Comparison(a, b, metric, f"{domain_name(held_out)} held out" if held_out else "all held-outs", each, float(p))
        for (a, b, metric, held_out), each, p in zip(tests, found, adjusted, strict=True)
    ]


def _conclusions(networks: dict[str, list[Run]], compared: list[Comparison]) -> list:
    blocks = []
    if compared:
        a, b, _, _, found, _ = compared[0]
        size = (
            f"Brier {found.difference:+.4f} {interval(found.low, found.high, '+.4f')}, p = {found.p_value:.4f} "
            f"(lower is better; {_extent(networks[a])})."
        )
        if np.isnan(found.low):
            headline = (
                f"With fewer than {FEWEST_PATIENTS} patients of a class nothing can be concluded on {a} and {b}: "
            )
        elif found.low <= 0 <= found.high:
            headline = f"These runs do not tell {a} and {b} apart, and are compatible with anything in the interval: "
        elif found.p_value >= 0.05:
            headline = f"Interval and test disagree, and nothing is concluded on {a} and {b}: "
        else:
            headline = f"On these patients {a} is {'better' if found.high < 0 else 'WORSE'} than {b}: "
        blocks.append(headline + size)
        scaled = {title: estimate(networks[title]).value for title in (a, b)}
        raw = {title: estimate(networks[title], temperatures=[1.0] * len(networks[title])).value for title in (a, b)}
        blocks.append(
            "Calibration is not invariance: scaling by a temperature alone changes Brier by "
            + " and ".join(f"{scaled[title] - raw[title]:+.4f} ({title})" for title in (a, b))
            + f", while {a} and {b} differ by {raw[a] - raw[b]:+.4f} before it."
        )
    else:
        blocks.append("No two methods have runs in common, so nothing is compared.")
    blocks += [
        "The estimand: patient-balanced Brier score of temperature-scaled probabilities on the unseen magnification, "
        "one method minus the other, averaged over seeds and folds and then over the held-out magnifications; every "
        "patient weighs the same. Temperatures are fitted on validation patients.",
        "The interval is over patients and conditional on the trained models: it does not cover other training runs. "
        "Their spread over seeds and folds stands beside it. Patients of one source do not speak for other "
        "laboratories, and nothing here is evidence for diagnosis. On virtual slides, which are drawings, no result "
        "says anything about breast cancer.",
        "Holding out a magnification between others (100X, 200X) is interpolation; holding out 40X or 400X is "
        "extrapolation. A co-trained adversary at chance is no evidence of invariance; a fresh probe is.",
    ]
    return blocks


def _extent(runs: list[Run]) -> str:
    patients = len(set().union(*(set(run.part("test")["patient"]) for run in runs)))
    counts = [len({run.key[i] for run in runs}) for i in range(3)]
    return "{} test patients, {} held-outs x {} folds x {} seeds = {} runs each".format(patients, *counts, len(runs))


def _beside_the_paper(groups: dict[str, list[Run]]) -> list:
    head = ["method", "held out", "", "AUC", "F1", "Brier", "signature", "Jaccard"]
    rows = []
    for method, (name, held_out, auc, f1, brier, size, jaccard) in PAPER.items():
        figures = f"{auc:.3f}", f"{f1:.3f}", f"{brier:.3f}", f"{size:,}", f"{jaccard:.2f}"
        rows.append([f"{name} (PAPER's)", f"{held_out}X", "paper", *figures])
        runs = [run for run in groups.get(method, []) if run.held_out == held_out]
        if not runs:
            rows.append([method, f"{held_out}X", "ours", *["not run"] * 5])
            continue
        figures = {metric: estimate(runs, metric) for metric in ("auc", "f1", "brier")}
        sizes = _mean(runs, "signature", "size"), _mean(runs, "signature", "width")
        rows.append(
            [method + star(runs), f"{held_out}X", "ours"]
            + [f"{each.value:.3f} {interval(each.low, each.high)}" for each in figures.values()]
            + ["{:.0f} of {:.0f}".format(*sizes), number(_mean(runs, "signature", "jaccard"), 2)]
        )
    return [
        "The paper's numbers are the paper's (arXiv 2604.25817, BreaKHis, each model at its best held-out "
        "magnification), without intervals. They are comparable only with runs on BreaKHis; the paper's split, recipe"
        " and width of the embedding are not published, and its Jaccard compares folds, ours refits on one backbone.",
        Table(head, rows),
    ]


def _by_held_out(groups: dict[str, list[Run]]) -> list:
    head = ["method", "held out", "runs", "AUC", "Brier", "AUC: seen - unseen", "Brier: seen - unseen"]
    head += ["Brier's SD, seeds", "SD, folds"]
    rows, noted = [], set()
    for held_out in sorted({run.held_out for runs in groups.values() for run in runs}):
        for title, everything in groups.items():
            runs = [run for run in everything if run.held_out == held_out]
            if not runs:
                continue
            tested = {metric: estimate(runs, metric) for metric in ("auc", "brier")}
            gaps = [estimate(runs, metric, "test_source").value - each.value for metric, each in tested.items()]
            spreads = spread(runs)
            noted |= {mark for run in runs for mark in run.marks}
            rows.append(
                [title + star(runs), domain_name(held_out), str(len(runs))]
                + [f"{each.value:.3f} {interval(each.low, each.high)}" for each in tested.values()]
                + [f"{gap:+.3f}" for gap in gaps]
                + [number(spreads[name]) for name in ("seed", "fold")]
            )
    return [
        "Patient-balanced, at the fitted temperature, with 95 % intervals over patients. Seen - unseen is the "
        "magnification gap: the same test patients at the magnifications of training, minus them at the unseen one. "
        "constant and colour are floors: a constant, and logistic regression on colour statistics.",
        Table(head, rows),
        *_legend(noted),
    ]


def _differences(compared: list[Comparison]) -> list:
    if not compared:
        return ["Nothing to compare."]
    rows = [
        [
            "primary" if i == 0 else "secondary",
            each.text,
            f"{each.found.difference:+.4f}",
            interval(each.found.low, each.found.high, "+.4f"),
            f"{each.found.p_value:.4f}",
            f"{each.adjusted:.4f}",
        ]
        for i, each in enumerate(compared)
    ]
    drawn = []
    for name, chosen, better in (("brier", ("brier",), "below"), ("auc_f1", ("auc", "f1"), "above")):
        caption = f"Differences with 95 % intervals over patients; {better} 0 favours the first."
        lines = [(each.text, *each.found[:3]) for each in compared if each.metric in chosen]
        drawn.append(Picture.drawn(f"forest_{name}", caption, pictures.forest, lines, "difference"))
    return [
        "p-values come from swapping all of a patient's predictions, in all runs, between the methods (2,000 draws). "
        f"The {len(compared) - 1} secondary tests are one family, adjusted by Holm's method. Differences that cancel "
        "between the classes, as where a method shifts all probabilities, are noise to the test but not to the "
        "interval, which takes the classes' numbers of patients as given: p can be large where the interval leaves out "
        "0.",
        Table(["", "difference", "estimate", "95 % interval", "p", "p adjusted"], rows),
        *drawn,
    ]


def _calibration(networks: dict[str, list[Run]]) -> list:
    head = ["method", "T", "Brier before", "Brier after", "Brier at the oracle's T"]
    head += ["miscalibration", "discrimination", "ECE before", "ECE after", "debiased", "smooth"]
    rows = []
    for title, runs in networks.items():
        temperatures = [run.results["temperature"] for run in runs]
        oracle = [run.oracle_temperature() for run in runs]
        used = ([1.0] * len(runs), None, oracle)
        p = joined(runs, "test")
        parts = [
            metrics.corp_decomposition(*(p[name][p["runs"] == k] for name in ("y_true", "y_prob")), _weight(p, k))
            for k in range(len(runs))
        ]
        names = ("expected_calibration_error", "debiased_calibration_error", "smooth_calibration_error")
        before = _mean(runs, "uncalibrated", "test", "patient_balanced", names[0])
        rows.append(
            [title + star(runs), f"{np.exp(np.mean(np.log(temperatures))):.2f}"]
            + [f"{estimate(runs, temperatures=each).value:.4f}" for each in used]
            + [
                f"{np.mean([getattr(part, name) for part in parts]):.4f}"
                for name in ("miscalibration", "discrimination")
            ]
            + [f"{before:.3f}", *(f"{_mean(runs, 'parts', 'test', 'patient_balanced', name):.3f}" for name in names)]
        )
    folders = [run.folder for runs in networks.values() for run in runs]
    caption = "Reliability on the unseen magnification; the oracle's temperature was fitted on the test itself."
    return [
        "The oracle temperature is fitted on the test rows it is judged by: no method may use it; it shows how much "
        "of a Brier difference a temperature could explain. Miscalibration and discrimination are CORP's terms after "
        "scaling (Brier = miscalibration - discrimination + uncertainty). The calibration errors compare methods only"
        " on the same rows: noise inflates them. Means over runs.",
        Table(head, rows),
        *([Picture.drawn("reliability", caption, pictures.reliability, folders)] if folders else []),
    ]


def _selection(networks: dict[str, list[Run]]) -> list:
    rows = []
    for title, runs in networks.items():
        found = [metrics.selected_scores(pq.read_table(run.folder / "predictions.parquet")) for run in runs]
        for rule in metrics.SELECTION_RULES:
            means = [np.mean([each[rule][name] for each in found]) for name in ("epoch", "auc", "brier")]
            name = {"last": "last epoch (primary)", "oracle": "oracle: best AUC of the test itself"}.get(rule, rule)
            rows.append([title + star(runs), name, f"{means[0]:.1f}", f"{means[1]:.3f}", f"{means[2]:.4f}"])
    return [
        "All results are the last epoch's: the same number of steps for every method. Other rules over the same runs "
        "(sensitivity): the best log-loss or AUC of validation patients at the training magnifications. The oracle "
        "looks at the test and is never a result. Patient-balanced, temperature-scaled, means over runs.",
        Table(["method", "rule", "mean epoch", "AUC", "Brier"], rows),
    ]


def _other_metrics(groups: dict[str, list[Run]]) -> list:
    names = ("auc", "average_precision", "f1", "accuracy", "balanced_accuracy", "brier", "log_loss")
    blocks = ["Means over runs and held-outs, unseen magnification; the worst held-out of AUC and Brier."]
    for weighting, meaning in (("patient_balanced", "every patient weighs the same"), ("image", "every image does")):
        rows = []
        for title, runs in groups.items():
            of = {h: [run for run in runs if run.held_out == h] for h in {run.held_out for run in runs}}
            means = {h: [_mean(some, "parts", "test", weighting, name) for name in names] for h, some in of.items()}
            table = np.array(list(means.values()))
            worst = f"{table[:, 0].min():.3f}", f"{table[:, names.index('brier')].max():.3f}"
            rows.append([title + star(runs), *(f"{value:.3f}" for value in table.mean(0)), *worst])
        head = [*(name.replace("_", " ") for name in names), "worst AUC", "worst Brier"]
        blocks += [f"{weighting.replace('_', '-').capitalize()}: {meaning}.", Table(["method", *head], rows)]
    blocks.append("Patient-balanced accuracy is BreaKHis' patient recognition rate. F1 and accuracies are at 0.5.")
    return blocks


def _invariance(networks: dict[str, list[Run]]) -> list:
    rows, maps, probes = [], [], {}

    def probe(run: Run) -> DomainProbe | str:  # or why there is none
        if run not in probes:
            embedding, of = _tested_embeddings(run)
            try:
                probes[run] = metrics.domain_probe(embedding, of["domain"], of["patient"])
            except ValueError as error:
                probes[run] = f"none: {error}"
        return probes[run]

    for title, runs in networks.items():
        run = min(runs, key=lambda run: (run.held_out != 200, run.key[1:]))  # the paper's best, else the first
        embedding, of = _tested_embeddings(run)
        read, chance, minus_erm = probe(run), "-", "-"
        if isinstance(read, DomainProbe):
            chance = f"{read.chance:.3f}"
            for erm in networks.get("erm + zoom" if title.endswith(" + zoom") else "erm", []):
                paired = erm is not run and erm.key == run.key
                paired = paired and np.array_equal(_tested_embeddings(erm)[1]["filename"], of["filename"])
                if paired and isinstance(probe(erm), DomainProbe):
                    found = metrics.probe_difference(read, probe(erm), of["label"], of["domain"], of["patient"])
                    minus_erm = f"{found.difference:+.3f} {interval(found.low, found.high, '+.3f')}"
            read = f"{read.balanced_accuracy:.3f} {interval(read.low, read.high)}"
        log = json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[-1])
        mmd = metrics.class_conditional_mmd(embedding, of["label"], of["domain"])
        others = number(mmd, 4), number(log.get("domain_accuracy"))
        rows.append([title + star([run]), run.folder.name, read, chance, minus_erm, *others])
        caption = f"Embeddings of {title}'s test patients, by class and by magnification."
        maps.append(Picture.drawn(f"embedding_{title}", caption, pictures.embedding_map, run.folder))
    head = [
        "method",
        "run",
        "fresh probe's balanced accuracy",
        "chance",
        "minus erm's",
        "MMD within classes",
        "adversary (no evidence)",
    ]
    return [
        "A fresh linear probe reads the magnification from frozen embeddings of the test patients, at seen and unseen"
        " magnifications, on patients it was not fitted on; compare it with chance, and with erm's of the same "
        "held-out, fold and seed (paired by patients). Intervals are over patients, the fitted probes taken as given. "
        "MMD is squared, unbiased, between magnifications within classes. The co-trained adversary's accuracy is shown "
        "and is no evidence: it may just have been beaten. One run each.",
        Table(head, rows),
        *maps,
    ]


def _tested_embeddings(run: Run) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Embeddings of the test patients at all magnifications, and the columns of their rows."""
    tensors = safetensors.numpy.load_file(run.folder / "embeddings.safetensors")
    parts = {part: run.part(part) for part in ("test", "test_source")}
    names = ("label", "domain", "patient", "filename")
    of = {name: np.concatenate([columns[name] for columns in parts.values()]) for name in names}
    return np.concatenate([tensors[f"{part}.embedding"] for part in parts]), of


def _training(networks: dict[str, list[Run]]) -> list:
    runs = [run for group in networks.values() for run in group if (run.folder / "metrics.jsonl").exists()]
    if not runs:
        return ["No losses are recorded."]
    caption = (
        "Losses by epoch, means over runs; of adversaries also the coefficient of the gradient reversal and the domain "
        "head's accuracy on its training batches, which is no evidence of invariance."
    )
    return [Picture.drawn("training", caption, pictures.curves, runs)]


def _compute(groups: dict[str, list[Run]]) -> list:
    rows = []
    for title, runs in groups.items():
        files = [run.folder / "timing.json" for run in runs]
        seconds = [json.loads(file.read_text())["seconds"] for file in files if file.exists()]
        recipes = sorted({run.config["recipe_sha256"] for run in runs})
        mean = f"{np.mean(seconds):.0f}" if seconds else "-"
        model = str(runs[0].config["arguments"].get("model") or "its own")
        rows.append([title, str(len(runs)), mean, f"{sum(seconds) / 3600:.2f}", model, ", ".join(recipes)])
    configs = [run.config for runs in groups.values() for run in runs]
    versions = {", ".join(f"{name} {v}" for name, v in config["versions"].items()) for config in configs}
    data = {config["arguments"]["data"] for config in configs}
    return [
        Table(["method", "runs", "seconds a run", "hours together", "model", "recipe"], rows),
        f"Data: {', '.join(sorted(data))}. Versions: {'; '.join(sorted(versions))}. Revisions: "
        f"{', '.join(sorted({config['git'] or 'unknown' for config in configs}))}.",
    ]


def _weight(p: dict[str, np.ndarray], run: int) -> np.ndarray:
    return metrics.patient_weights(p["groups"][p["runs"] == run])


def _mean(runs: list[Run], *path: str) -> float:
    """Mean over runs of an entry of results.json; NaN where no run has it."""
    found = []
    for run in runs:
        value = run.results
        for key in path:
            value = (value or {}).get(key)
        if value is not None:
            found.append(value)
    return float(np.mean(found)) if found else float("nan")


def _legend(marks: set[str]) -> list[str]:
    return [f"* {'; '.join(sorted(marks))}"] if marks else []
