"""What an adversary can and cannot do, on vectors whose truth is known.

A vector is a class signal along one direction, an effect of its patient, noise, and an effect of its domain:

- additive: every domain shifts all its vectors, within a plane that all domains share;
- multiplicative: every domain has gains of its own for all numbers, in two patterns that all domains share;
- along the signal: every domain shifts all its vectors along the very direction that tells the classes apart;
- prevalence: an additive effect, and classes are of other shares in every domain.

One of four domains is held out. Settings of each method are chosen by nested leave-one-domain-out on development data
sets (`metrics.selection.nested_choice`, trials of `random_search.settings`), for each effect and strength apart, and
scored on other data sets. Data sets are the unit: intervals are over them. "all domains" is ERM that is trained on the
held-out domain too, of the same patients: what there is to gain at all.

    python benchmarks/vectors.py
    python benchmarks/vectors.py --data-sets 2 --development 1 --trials 2 --results runs/trial   # the same path

Trained by `engine.fit` on a `VectorCache`, as `magdg lomo --embeddings` does, without its records.
"""

import argparse
import os
import shlex
import sys
import textwrap
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np

EFFECTS = ("additive", "multiplicative", "along the signal", "prevalence")
STRENGTHS = (1.0, 4.0)
METHODS = ("l2", "erm", "coral", "dann", "cdann")
ALL = "all domains"
COLOURS = {"l2": "#999999", "coral": "#2a9d8f", "dann": "#d1495b", "cdann": "#8d5fd3", ALL: "#222222"}
DOMAINS = ("A", "B", "C", "D")  # A is held out
WIDTH, HIDDEN, PATIENTS, IMAGES = 32, 32, 120, 2
SIGNAL, PATIENT = 2.0, 0.6  # distance of the classes and spread of patients, in standard deviations of the noise
EPOCHS, BATCH, LEARNING_RATE = 10, 60, 1e-2
DEVELOPMENT = 10_000  # seed of the first development data set


def data_set(effect: str, strength: float, seed: int) -> dict:
    """A table of vectors (n, `WIDTH`) of `PATIENTS` patients, half of each class, `IMAGES` at every domain.

    Args:
        effect: One of `EFFECTS`.
        strength: Of the domains' effect, in units of the class signal; 0 is none.
        seed: Of everything that is drawn.
    """
    rng = np.random.default_rng([EFFECTS.index(effect), round(strength * 100), seed])
    patient, domain = (
        each.ravel() for each in np.meshgrid(np.repeat(np.arange(PATIENTS), IMAGES), range(4), indexing="ij")
    )
    label = patient % 2
    directions = np.linalg.qr(rng.standard_normal((WIDTH, WIDTH)))[0]
    signal, plane, place = directions[0], rng.standard_normal((2, WIDTH)), rng.standard_normal((4, 2))
    plane /= np.linalg.norm(plane, axis=1, keepdims=True)
    vectors = rng.standard_normal(WIDTH) + SIGNAL * (label - 0.5)[:, None] * signal
    vectors = vectors + PATIENT * rng.standard_normal((PATIENTS, WIDTH))[patient]
    vectors += rng.standard_normal(vectors.shape)
    kept = np.ones(len(vectors), bool)
    if effect == "multiplicative":
        patterns = rng.standard_normal((2, WIDTH)) / np.sqrt(2)
        vectors *= np.exp(strength / 2 * (place @ patterns))[domain]
    elif effect == "along the signal":
        vectors += strength * SIGNAL / 2 * place[domain, :1] * signal
    else:
        vectors += (strength if effect == "additive" else 1.0) * SIGNAL * (place @ plane)[domain]
    if effect == "prevalence":
        share = np.clip(1 / (1 + np.exp(-strength * place[:, 0])), 0.25, 0.75)[domain]
        comes = rng.random((PATIENTS, 4))[patient, domain]  # a patient to a domain, with all images
        kept = comes < np.where(label == 1, share, 1 - share)
    columns = {"embedding": vectors.astype(np.float32), "label": label, "patient": patient.astype(str)}
    columns["domain"] = np.array(DOMAINS)[domain]
    return {name: column[kept] for name, column in columns.items()} | {"mpp": np.full(kept.sum(), np.nan)}


def scored(table: dict, method: str, split, settings: dict) -> tuple[np.ndarray, float]:
    """Temperature-scaled squared errors (n,) of the test part, and its patient-balanced AUC."""
    from magnification_invariant import metrics
    from magnification_invariant.data.vectors import VectorCache
    from magnification_invariant.tasks.floors import FLOORS, Labelled

    cache, parts = VectorCache(table), {}
    for part in ("train", "val", "test"):
        rows = getattr(split, part)
        parts[part] = Labelled(rows, table["label"][rows], metrics.patient_weights(table["patient"][rows]))
    val, test = parts["val"], parts["test"]
    if method == "l2":
        score = FLOORS["l2"](cache, parts["train"], val)(test.rows)
        logits = np.stack([np.zeros_like(score), score], 1)
        temperature = 1.0  # is in the score
    else:
        of_val, logits = trained(table, cache, method, parts, settings)
        temperature = metrics.fit_temperature(of_val, val.label, sample_weight=val.weight)
    probability = metrics.apply_temperature(logits, temperature)[:, 1]
    auc = metrics.auc(test.label, probability, test.weight)
    return (probability - test.label) ** 2, auc


def trained(table: dict, cache, method: str, parts: dict, settings: dict) -> list[np.ndarray]:
    """Logits of the validation and the test part."""
    import torch

    from magnification_invariant.engine import FitConfig, TrainRows, fit, predict
    from magnification_invariant.tasks import get_task

    kind, train = get_task(method), parts["train"]
    names, domain = np.unique(table["domain"][train.rows], return_inverse=True)
    torch.manual_seed(0)
    model = kind.create_model("mag_hidden", num_classes=2, num_domains=len(names), width=WIDTH, hidden=HIDDEN)
    model.standardise(table["embedding"][train.rows], train.weight)
    options = {name: value for name, value in settings.items() if name in vars(kind.Options())}
    task = kind(model, kind.Options(**options))
    rows = TrainRows(train.rows, train.label, domain, table["patient"][train.rows])
    task.prepare(rows, None, None, ["0", "1"], names.tolist())
    rest = {name: value for name, value in settings.items() if name not in options}
    config = FitConfig(**{"epochs": EPOCHS, "batch_size": BATCH, "learning_rate": LEARNING_RATE, **rest})
    model = fit(task, cache, rows, config)
    return [predict(model, cache.views, parts[part].rows, batch_size=1024)[0] for part in ("val", "test")]


def choose(effect: str, strength: float, args: argparse.Namespace) -> dict[str, dict]:
    """By method the settings that nested leave-one-domain-out chooses on development data sets, with A held out."""
    from random_search import COEFFICIENTS, settings

    from magnification_invariant.metrics.selection import nested_choice
    from magnification_invariant.tasks import get_task

    tables = [data_set(effect, strength, DEVELOPMENT + seed) for seed in range(args.development)]
    chosen = {}
    for method in METHODS[1:]:
        trials = [settings(method, trial, EPOCHS) for trial in range(args.trials)]
        loss = [np.concatenate([nested_loss(table, method, trial) for table in tables]) for trial in trials]
        defaults = vars(get_task(method).Options())
        name = next((name for name in COEFFICIENTS if name in defaults), None)
        departs = [(defaults | trial).get(name, 0.0) for trial in trials]
        chosen[method] = trials[nested_choice({("A", "the others"): np.stack(loss)}, "A", departs)]
    return chosen


def nested_loss(table: dict, method: str, settings: dict) -> np.ndarray:
    """Mean squared error of each tested patient, at domains that neither training nor the test of A ever saw."""
    from magnification_invariant.data.splits import leave_one_domain_out

    squares, patients = [], []
    for other in DOMAINS[1:]:
        unseen = np.where(np.isin(table["domain"], ["A", other]), "A", table["domain"])
        split = leave_one_domain_out(table | {"domain": unseen}, "A", n_folds=3)
        split = replace(split, test=split.test[table["domain"][split.test] == other])
        squares.append(scored(table, method, split, settings)[0])
        patients.append(table["patient"][split.test])
    _, patient = np.unique(np.concatenate(patients), return_inverse=True)
    return np.bincount(patient, np.concatenate(squares)) / np.bincount(patient)


def report_on(effect: str, strength: float, chosen: dict, args: argparse.Namespace) -> dict[str, np.ndarray]:
    """By method Brier score and AUC (data sets, 2) at the unseen domain, and `ALL`, of ERM that has seen it."""
    from magnification_invariant.data.splits import leave_one_domain_out
    from magnification_invariant.metrics import patient_weights

    figures = {method: [] for method in (*METHODS, ALL)}
    for seed in range(args.data_sets):
        table = data_set(effect, strength, seed)
        split = leave_one_domain_out(table, "A", n_folds=3)
        weight = patient_weights(table["patient"][split.test])
        for method in figures:
            name, own = ("erm", seeing(table, split)) if method == ALL else (method, split)
            squares, auc = scored(table, name, own, chosen.get(name, {}))
            figures[method].append((np.average(squares, weights=weight), auc))
    return {method: np.array(values) for method, values in figures.items()}


def seeing(table: dict, split):
    """The split with the held-out domain's images of the training and validation patients in these parts."""
    unseen = table["domain"] == split.held_out
    rows = {}
    for part in ("train", "val"):
        patients = np.unique(table["patient"][getattr(split, part)])
        more = np.flatnonzero(unseen & np.isin(table["patient"], patients))
        rows[part] = np.sort(np.concatenate([getattr(split, part), more]))
    return replace(split, **rows)


def mean_and_interval(values: np.ndarray) -> tuple[float, float]:
    """Mean, and half of its 95 % interval over data sets (Student's t)."""
    from scipy.stats import t

    n = len(values)
    return float(values.mean()), float(t.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n)) if n > 1 else float("nan")


def draw(figures: dict, path: Path) -> None:
    """A panel an effect: Brier minus ERM's against the strength of the effect, a line a method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, len(EFFECTS), figsize=(13, 3.6), sharey=True, layout="constrained")
    for axis, effect in zip(axes, EFFECTS, strict=True):
        for k, (method, colour) in enumerate(COLOURS.items()):
            ends = [mean_and_interval((own := figures[effect, s])[method][:, 0] - own["erm"][:, 0]) for s in STRENGTHS]
            place = np.arange(len(STRENGTHS)) + 0.06 * (k - 2)
            style = {"ls": "--", "marker": "_"} if method == ALL else {"marker": "o", "ms": 4}
            axis.errorbar(place, *np.transpose(ends), color=colour, label=method, capsize=2, lw=1.6, **style)
        axis.axhline(0, color="black", lw=0.8)
        brier = [figures[effect, s]["erm"][:, 0].mean() for s in STRENGTHS]
        axis.set_xticks(range(len(STRENGTHS)), [f"{s:g}\nERM {b:.3f}" for s, b in zip(STRENGTHS, brier, strict=True)])
        axis.set_title(f"domain effect: {effect}", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("Brier at the unseen domain, minus ERM's\n(below 0 is better)")
    axes[1].set_xlabel("strength of the domain effect, in units of the class signal", loc="left")
    axes[-1].legend(fontsize=8, frameon=False)
    fig.savefig(path, dpi=110)


def table_of(figures: dict) -> str:
    from magnification_invariant.report.page import markdown_table

    lines = []
    for (effect, strength), own in figures.items():
        cells = [f"{own['erm'][:, 1].mean():.3f}", f"{own['erm'][:, 0].mean():.4f}"]
        for method in COLOURS:
            cells.append("{:+.4f} ± {:.4f}".format(*mean_and_interval(own[method][:, 0] - own["erm"][:, 0])))
        lines.append([effect, f"{strength:g}", *cells])
    return markdown_table(["effect", "strength", "ERM's AUC", "ERM's Brier", *(f"{m} - ERM" for m in COLOURS)], lines)


def table_of_choices(choices: dict) -> str:
    from magnification_invariant.report.page import markdown_table

    words = [
        [effect, f"{strength:g}", method, ", ".join(f"{k} {v}" for k, v in own.items()) or "defaults"]
        for (effect, strength), chosen in choices.items()
        for method, own in chosen.items()
    ]
    return markdown_table(["effect", "strength", "method", "settings"], words)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data-sets", type=int, default=12, help="that are reported on; default: %(default)s")
    add("--development", type=int, default=3, help="data sets that settings are chosen on; default: %(default)s")
    add("--trials", type=int, default=3, help="settings of a method, trial 0 is the defaults; default: %(default)s")
    add("--workers", type=int, default=1, help="processes of one thread each; default: %(default)s")
    add("--results", type=Path, default=Path(__file__).parent / "results", help="default: %(default)s")
    return parser.parse_args()


def measured(effect: str, strength: float, args: argparse.Namespace) -> tuple[dict, dict, float]:
    """`choose`, `report_on` and the seconds of CPU time that they took."""
    import torch

    torch.set_num_threads(1)
    started = time.process_time()
    chosen = choose(effect, strength, args)
    figures = report_on(effect, strength, chosen, args)
    seconds = time.process_time() - started
    print(effect, strength, f"{seconds:.0f} s", flush=True)
    return chosen, figures, seconds


def main() -> None:
    args = parse_args()
    from joblib import Parallel, delayed

    cases = list(product(EFFECTS, STRENGTHS))
    done = Parallel(n_jobs=args.workers)(delayed(measured)(*case, args) for case in cases)
    chosen, scores, seconds = zip(*done, strict=True)
    choices, figures = dict(zip(cases, chosen, strict=True)), dict(zip(cases, scores, strict=True))
    args.results.mkdir(parents=True, exist_ok=True)
    draw(figures, args.results / "vectors.png")
    minutes = sum(seconds) / 60
    about = (
        f"{PATIENTS} patients, {IMAGES} vectors of {WIDTH} numbers each at every one of 4 domains, of which one is "
        "held out: a third of the patients trains, a third validates, a third is tested. One hidden layer of "
        f"{HIDDEN} units, {EPOCHS} epochs, a learning rate of {LEARNING_RATE} where none is drawn. {args.trials} "
        f"settings of every method, drawn as in `random_search.py`; the nested rule chooses on {args.development} data "
        f"sets, {args.data_sets} others are reported on. The score is the patient-balanced, temperature-scaled Brier "
        "score at the unseen domain, minus ERM's on the same data set: mean ± half of the 95 % interval over data "
        f"sets. Measured on {os.cpu_count()} shared CPU cores, one thread, {minutes:.0f} minutes of CPU time."
    )
    command = f"`{shlex.join(['python', 'benchmarks/vectors.py', *sys.argv[1:]])}`"
    picture = "![Brier minus ERM's by the strength of four domain effects](vectors.png)"
    parts = ["# What an adversary can and cannot do", command, textwrap.fill(about, 120), picture, table_of(figures)]
    parts += ["## Settings that the nested rule chose", table_of_choices(choices)]
    (args.results / "vectors.md").write_text("\n\n".join(parts) + "\n")
    print(parts[4])


if __name__ == "__main__":
    main()
