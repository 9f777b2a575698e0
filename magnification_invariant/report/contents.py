"""What a report says: sections of words, tables and pictures, read from the records of finished runs."""

import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from magnification_invariant import metrics
from magnification_invariant.data.splits import domain_name
from magnification_invariant.metrics.intervals import FEWEST_PATIENTS, Difference
from magnification_invariant.metrics.invariance import DomainProbe
from magnification_invariant.records import NORMALISED, Run
from magnification_invariant.report import pictures
from magnification_invariant.report.page import Picture, Section, Table, interval, number
from magnification_invariant.report.runs import (
    PRIMARY,
    SCALED,
    WHAT_SCALED_IS,
    Row,
    baseline,
    by_title,
    difference,
    estimate,
    held_outs,
    read_runs,
    rows_of,
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
    """One line of the forest: `metric` of row `a` minus that of row `b`; `adjusted` is the family's p-value."""

    a: str
    b: str
    metric: str
    held_out: int | str | None
    measured: Difference
    adjusted: float
    primary: bool

    @property
    def where(self) -> str:
        """Which held-out domain, in words."""
        return "all held-outs" if self.held_out is None else f"{domain_name(self.held_out)} held out"

    @property
    def text(self) -> str:
        """What is compared, in words."""
        return f"{NAMES[self.metric]}, {self.a} - {self.b}, {self.where}"


def sections(
    folders: Iterable[Path], pairs: list[tuple[str, str]] | None = None, *, refits: int = 0
) -> Iterator[Section]:
    """The report on finished runs, made when it is first asked for a section; nothing is trained or predicted for it.

    Args:
        folders: Runs, or folders of them.
        pairs: Rows to compare (a, b), the first pair being the primary one; by default those of `default_pairs`.
        refits: Of every signature, on halves of the patients, the one thing fitted here, see `signature_sections`.

    Raises:
        ValueError: As of `read_runs`, `compare` and `signature_sections`; or a run holds no domain out.
    """
    yield from _sections(folders, pairs, refits)


def _sections(folders: Iterable[Path], pairs: list[tuple[str, str]] | None, refits: int) -> list[Section]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # too few patients for an interval: the tables show none
        runs = read_runs(folders)
        for run in runs:
            if "test" not in run.parts:
                raise ValueError(f"{run.folder} holds no domain out: the report is on unseen ones (try magdg evaluate)")
        groups = by_title(runs)
        networks = {title: group for title, group in groups.items() if group[0].is_network}
        rows = rows_of(groups)
        compared = compare(rows, default_pairs(networks) if pairs is None else pairs)
        return [
            ("What can and cannot be concluded", _conclusions(rows, compared)),
            ("Beside the paper", _beside_the_paper(groups)),
            ("Each held-out magnification", _by_held_out(rows)),
            ("Paired differences", _differences(compared)),
            ("ROC curves", [Picture.drawn("roc", "ROC curves by held-out magnification.", pictures.roc, runs)]),
            ("Calibration", _calibration(networks)),
            ("What embeddings tell of the acquisition", _invariance(networks)),
            *([("Zoom curves", curves)] if (curves := zoom_blocks(networks)) else []),
            *signature_sections(runs, refits),
            ("Training", _training(networks)),
            ("Compute and provenance", _compute(groups)),
        ]


def default_pairs(networks: dict[str, list[Run]]) -> list[tuple[str, str]]:
    """Every row with its `baseline`, "dann" first."""
    pairs = [(title, other) for title in networks if (other := baseline(title, networks))]
    return sorted(pairs, key=lambda pair: (networks[pair[0]][0].method != "dann", networks[pair[0]][0].zoom > 1))


def compare(rows: dict[str, Row], pairs: list[tuple[str, str]]) -> list[Comparison]:
    """The primary comparison and, after it, the secondary family with Holm-adjusted p-values.

    Primary: Brier of the first pair over all held-outs. Secondary: its AUC and F1, its Brier at each held-out
    magnification, and the Brier of each further pair, of each network scale-normalised with itself, and of the first
    pair's first with its second scale-normalised.

    Raises:
        ValueError: A pair names a row that is not there.
    """
    unknown = {title for pair in pairs for title in pair} - rows.keys()
    if unknown:
        raise ValueError(f"no finished runs of {', '.join(sorted(unknown))}; there are {'; '.join(rows)}")
    tests = [(*pair, PRIMARY, None) for pair in pairs]
    if pairs:
        a, b = pairs[0]
        domains = held_outs(rows[a].runs + rows[b].runs)
        shared = [domain for domain in domains if rows[a].at(domain).runs and rows[b].at(domain).runs]
        by_domain = [(a, b, PRIMARY, domain) for domain in shared if len(shared) > 1]
        tests[1:1] = [(a, b, "auc", None), (a, b, "f1", None), *by_domain]
    tests += [
        (title, title.removesuffix(SCALED), PRIMARY, None) for title, row in rows.items() if row.part == NORMALISED
    ]
    if pairs and b + SCALED in rows:
        tests.append((a, b + SCALED, PRIMARY, None))
    tests = list(dict.fromkeys(tests))
    measured = [_measure(rows[a].at(domain), rows[b].at(domain), metric) for a, b, metric, domain in tests]
    first = len(pairs[:1])
    adjusted = [each.p_value for each in measured]
    adjusted[first:] = metrics.holm(adjusted[first:])
    return [
        Comparison(*test, each, float(p), i < first)
        for i, (test, each, p) in enumerate(zip(tests, measured, adjusted, strict=True))
    ]


def _measure(a: Row, b: Row, metric: str) -> Difference:
    return difference(a.runs, b.runs, metric, a.part, b.part)


def _conclusions(rows: dict[str, Row], compared: list[Comparison]) -> list:
    blocks = []
    if compared and compared[0].primary:
        first = compared[0]
        a, b, measured = first.a, first.b, first.measured
        size = (
            f"Brier {measured.difference:+.4f} {interval(measured.low, measured.high, '+.4f')}, p = "
            f"{measured.p_value:.4f} (lower is better; {_extent(rows[a].runs)})."
        )
        if np.isnan(measured.low):
            headline = (
                f"With fewer than {FEWEST_PATIENTS} patients of a class nothing can be concluded on {a} and {b}: "
            )
        elif measured.low <= 0 <= measured.high:
            headline = f"These runs do not tell {a} and {b} apart, and are compatible with anything in the interval: "
        elif measured.p_value >= 0.05:
            headline = f"Interval and test disagree, and nothing is concluded on {a} and {b}: "
        else:
            headline = f"On these patients {a} is {'better' if measured.high < 0 else 'WORSE'} than {b}: "
        blocks.append(headline + size)
        ones = {title: [1.0] * len(rows[title].runs) for title in (a, b)}
        raw = {title: estimate(rows[title].runs, PRIMARY, rows[title].part, t).value for title, t in ones.items()}
        scaled = {title: estimate(rows[title].runs, PRIMARY, rows[title].part).value for title in ones}
        blocks.append(
            "Calibration is not invariance: scaling by a temperature alone changes Brier by "
            + " and ".join(f"{scaled[title] - raw[title]:+.4f} ({title})" for title in ones)
            + f", while {a} and {b} differ by {raw[a] - raw[b]:+.4f} before it."
        )
    else:
        blocks.append("No two methods have runs in common, so none are compared.")
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
    return blocks + [WHAT_SCALED_IS] * any(row.part == NORMALISED for row in rows.values())


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
        own = {
            title: Row(title, runs).at(held_out)
            for title, runs in groups.items()
            if (runs[0].method, runs[0].zoom) == (method, 1.0)
        }
        own = {title: row for title, row in own.items() if row.runs}
        if not own:
            rows.append([method, f"{held_out}X", "ours", *["not run"] * 5])
        for row in own.values():
            measured = [estimate(row.runs, metric) for metric in ("auc", "f1", "brier")]
            sizes = _mean(row.runs, "signature", "size"), _mean(row.runs, "signature", "width")
            rows.append(
                [row.starred, f"{held_out}X", "ours"]
                + [f"{each.value:.3f} {interval(each.low, each.high)}" for each in measured]
                + ["{:.0f} of {:.0f}".format(*sizes), number(_mean(row.runs, "signature", "jaccard"), 2)]
            )
    return [
        "The paper's numbers are the paper's (arXiv 2604.25817, BreaKHis, each model at its best held-out "
        "magnification), without intervals. They are comparable only with runs on BreaKHis; the paper's split, recipe"
        " and width of the embedding are not published, and its Jaccard compares folds, ours refits on one backbone.",
        Table(head, rows),
    ]


def _by_held_out(rows: dict[str, Row]) -> list:
    head = ["method", "held out", "runs", "AUC", "Brier", "AUC: seen - unseen", "Brier: seen - unseen"]
    head += ["Brier's SD, seeds", "SD, folds"]
    runs = [run for row in rows.values() for run in row.runs]
    cells = []
    for held_out in held_outs(runs):
        for row in (row.at(held_out) for row in rows.values()):
            if not row.runs:
                continue
            tested = {metric: estimate(row.runs, metric, row.part) for metric in ("auc", "brier")}
            gaps = [estimate(row.runs, metric, "test_source").value - each.value for metric, each in tested.items()]
            deviations = spread(row.runs, part=row.part)
            cells.append(
                [row.starred, domain_name(held_out), str(len(row.runs))]
                + [f"{each.value:.3f} {interval(each.low, each.high)}" for each in tested.values()]
                + [f"{gap:+.3f}" for gap in gaps]
                + [number(deviations[name]) for name in ("seed", "fold")]
            )
    marks = sorted({mark for run in runs for mark in run.marks})
    missing = sorted({why for run in runs if (why := run.results.get("normalised_why_none"))})
    return [
        "Patient-balanced, at the fitted temperature, with 95 % intervals over patients. Seen - unseen is the "
        "magnification gap: the same test patients at the magnifications of training, minus them at the unseen one. "
        "constant, colour and l2 are floors: a constant, and logistic regression on colour or on embeddings.",
        Table(head, cells),
        *([f"* {'; '.join(marks)}"] if marks else []),
        *([f"Some runs are not shown scale-normalised: {'; '.join(missing)}."] if missing else []),
    ]


def _differences(compared: list[Comparison]) -> list:
    if not compared:
        return ["Nothing to compare."]
    rows = [
        [
            "primary" if each.primary else "secondary",
            each.text,
            f"{each.measured.difference:+.4f}",
            interval(each.measured.low, each.measured.high, "+.4f"),
            f"{each.measured.p_value:.4f}",
            f"{each.adjusted:.4f}",
        ]
        for each in compared
    ]
    lines = [(each.text, *each.measured[:3]) for each in compared if each.metric == PRIMARY]
    caption = "Differences with 95 % intervals over patients; below 0 favours the first."
    secondary = sum(not each.primary for each in compared)
    return [
        "p-values come from swapping all of a patient's predictions, in all runs, between the methods (2,000 draws). "
        f"The {secondary} secondary tests are one family, adjusted by Holm's method. Differences that cancel "
        "between the classes, as where a method shifts all probabilities, are noise to the test but not to the "
        "interval, which takes the classes' numbers of patients as given: p can be large where the interval leaves out "
        "0.",
        Table(["", "difference", "estimate", "95 % interval", "p", "p adjusted"], rows),
        Picture.drawn("forest", caption, pictures.forest, lines, "difference of Brier"),
    ]


def _calibration(networks: dict[str, list[Run]]) -> list:
    head = ["method", "T", "Brier before", "Brier after", "Brier at the oracle's T"]
    head += ["miscalibration", "discrimination", "ECE before", "ECE after", "slope", "intercept", "larger class"]
    rows = []
    for title, runs in networks.items():
        temperatures = [run.temperature for run in runs]
        used = ([1.0] * len(runs), None, [run.oracle_temperature() for run in runs])
        terms, lines = [], []
        for p in (run.part("test") for run in runs):
            judged = p["label"], p["probability"], metrics.patient_weights(p["patient"])
            terms.append(metrics.corp_decomposition(*judged))
            share = np.average(p["probability"] > 0.5, weights=judged[2])
            lines.append((*metrics.recalibration(*judged), max(share, 1 - share)))
        error = "test", "patient_balanced", "expected_calibration_error"
        rows.append(
            [title + star(runs), f"{np.exp(np.mean(np.log(temperatures))):.2f}"]
            + [f"{estimate(runs, temperatures=each).value:.4f}" for each in used]
            + [
                f"{np.mean([getattr(each, name) for each in terms]):.4f}"
                for name in ("miscalibration", "discrimination")
            ]
            + [number(_mean(runs, when, *error)) for when in ("uncalibrated", "parts")]
            + [number(value, 2) for value in np.mean(lines, axis=0)]
        )
    runs = [run for group in networks.values() for run in group]
    caption = "Reliability on the unseen magnification; the oracle's temperature was fitted on the test itself."
    return [
        "The oracle temperature is fitted on the test rows it is judged by: no method may use it; it shows how much "
        "of a Brier difference a temperature could explain. Miscalibration and discrimination are CORP's terms after "
        "scaling (Brier = miscalibration - discrimination + uncertainty). The calibration errors compare methods only"
        " on the same rows: noise inflates them. Slope below 1: probabilities are too extreme; intercept above 0: too "
        "low on the whole (after scaling; 1 and 0 are right). Larger class: the share of images that are given the "
        "more frequent answer; near 1 the predictions are degenerate, whatever the other numbers say. Means over runs.",
        Table(head, rows),
        *([Picture.drawn("reliability", caption, pictures.reliability, runs)] if runs else []),
    ]


def _invariance(networks: dict[str, list[Run]]) -> list:
    rows, maps, probes = [], [], {}

    def probe(run: Run) -> DomainProbe | str:  # or why there is none
        if run not in probes:
            embeddings, keys = _tested_embeddings(run)
            try:
                probes[run] = metrics.domain_probe(embeddings, keys["domain"], keys["patient"])
            except ValueError as error:
                probes[run] = f"none: {error}"
        return probes[run]

    for title, runs in networks.items():
        run = min(runs, key=lambda run: (run.held_out != 200, run.key[1:]))  # the paper's best, else the first
        _, keys = _tested_embeddings(run)
        read, chance, minus_erm = probe(run), "-", "-"
        if isinstance(read, DomainProbe):
            chance = f"{read.chance:.3f}"
            for erm in networks.get(baseline(title, networks), []):
                paired = erm.key == run.key and np.array_equal(_tested_embeddings(erm)[1]["filename"], keys["filename"])
                if paired and isinstance(probe(erm), DomainProbe):
                    minus = metrics.probe_difference(read, probe(erm), keys["label"], keys["domain"], keys["patient"])
                    minus_erm = f"{minus.difference:+.3f} {interval(minus.low, minus.high, '+.3f')}"
            read = f"{read.balanced_accuracy:.3f} {interval(read.low, read.high)}"
        rows.append([title + star([run]), run.folder.name, read, chance, minus_erm, *_neighbours(run)])
        caption = f"Embeddings of {title}'s test patients, by class and by magnification."
        maps.append(Picture.drawn(f"embedding_{title}", caption, pictures.embedding_map, run))
    return [
        "A fresh linear probe reads the magnification from frozen embeddings of the test patients, at seen and unseen"
        " magnifications, on patients it was not fitted on; compare it with chance, and with erm's of the same "
        "held-out, fold and seed (paired by patients). Intervals are over patients, the fitted probes taken as given. "
        "One run each. kNN: how often the 10 nearest images of other patients name it, to be compared with the same "
        "chance: what lies near, where the probe finds any direction. RI, the robustness index of PathoROB: of "
        "neighbours that share either the class or the magnification, the share that shares the class; 1 is robust, "
        "and a class that cannot be told gives about 0.5 whatever the magnification does. Its support is the share of "
        "images that have such neighbours: a small one makes the index say little.",
        Table(["method", "run", "fresh probe's balanced accuracy", "chance", "minus erm's", *NEIGHBOURS], rows),
        *maps,
    ]


NEIGHBOURS = ("kNN", "RI", "support")


def _neighbours(run: Run) -> list[str]:
    """Cells of a run under `NEIGHBOURS`; a dash where something cannot be had."""
    embeddings, keys = _tested_embeddings(run)
    near = index = support = float("nan")
    try:
        near = metrics.knn_reading(embeddings, keys["domain"], keys["patient"])
        index, support, _ = metrics.robustness_index(embeddings, keys["label"], keys["domain"], keys["patient"])
    except ValueError:  # there is too little to compare
        pass
    return [number(each) for each in (near, index, support)]


def _tested_embeddings(run: Run) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Embeddings (n, width) of the test patients at all magnifications, and the keys of their rows."""
    parts = ("test", "test_source")
    keys = [run.keys(part) for part in parts]
    columns = {name: np.concatenate([each[name] for each in keys]) for name in keys[0]}
    return np.concatenate([run.embeddings(part) for part in parts]), columns


def _training(networks: dict[str, list[Run]]) -> list:
    runs = [run for group in networks.values() for run in group if run.losses()]
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
        seconds = [run.seconds for run in runs if run.seconds is not None]
        mean = f"{np.mean(seconds):.0f}" if seconds else "-"
        model = str(runs[0].settings.get("model") or "its own")
        digests = sorted({run.config["settings_sha256"] for run in runs})
        rows.append([title, str(len(runs)), mean, f"{sum(seconds) / 3600:.2f}", model, ", ".join(digests)])
    configs = [run.config for runs in groups.values() for run in runs]
    machines = [config["machine"] for config in configs]
    versions = {", ".join(f"{name} {v}" for name, v in machine["versions"].items()) for machine in machines}
    return [
        Table(["method", "runs", "seconds a run", "hours together", "model", "settings"], rows),
        f"Data: {', '.join(sorted({config['cell']['data'] for config in configs}))}. Versions: "
        f"{'; '.join(sorted(versions))}. Revisions: {', '.join(sorted({m['git'] or 'unknown' for m in machines}))}.",
    ]


def _mean(runs: list[Run], *path: str) -> float:
    """Mean over runs of an entry of results.json; NaN where no run has it."""
    known = []
    for run in runs:
        value = run.results
        for key in path:
            value = (value or {}).get(key)
        if value is not None:
            known.append(value)
    return float(np.mean(known)) if known else float("nan")
