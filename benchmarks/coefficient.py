"""Does any coefficient of the gradient reversal pay at a magnification that was never seen? From the nested search's
trainings: DANN beside ERM of the same trial, that is of the same epochs, learning rate, weight decay and smoothing, so
that the two differ by the adversary alone.

    python benchmarks/random_search.py --rule nested ...              # trains, with and without --zoom 2.5
    python benchmarks/coefficient.py runs/random_search/nested > benchmarks/results/coefficient.md
"""

import argparse
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

SHARED = ("zoom", "epochs", "learning_rate", "weight_decay", "label_smoothing")


class Pair(NamedTuple):
    """DANN minus ERM of one trial, over the trainings on two magnifications; `measured` is a `Difference` of Brier."""

    zoom: float
    schedule: str
    coeff: float
    trainings: int
    erm: float
    measured: tuple


def pairs_of(folder: Path) -> list[Pair]:
    """All trials of which both methods are finished, weak coefficients first."""
    from magnification_invariant.records import Run
    from magnification_invariant.report.runs import difference, estimate

    trials = defaultdict(lambda: defaultdict(list))
    for run in map(Run, sorted(folder.glob("*"))):
        if run.is_finished and run.method in ("erm", "dann"):
            trials[tuple(run.settings[name] for name in SHARED)][run.method].append(run)
    pairs = []
    for (zoom, *_), methods in trials.items():
        if len(methods) == 2:
            dann, erm = methods["dann"], methods["erm"]
            settings = dann[0].settings["coeff_schedule"], dann[0].settings["coeff"]
            pairs.append(Pair(zoom, *settings, len(dann), estimate(erm).value, difference(dann, erm)))
    return sorted(pairs, key=lambda pair: (pair.zoom, pair.coeff))


def draw(pairs: list[Pair], path: Path) -> None:
    """Differences with their intervals against the coefficient, a panel without zoom and one with it."""
    from matplotlib.figure import Figure

    zooms = sorted({pair.zoom for pair in pairs})
    figure = Figure(figsize=(4 * len(zooms), 3), layout="constrained")
    axes = figure.subplots(1, len(zooms), sharey=True, squeeze=False)
    for axis, zoom in zip(axes[0], zooms, strict=True):
        for schedule, marker in (("dann", "o"), ("adaptive", "s")):
            shown = [pair for pair in pairs if (pair.zoom, pair.schedule) == (zoom, schedule)]
            if shown:
                y = [pair.measured.difference for pair in shown]
                errors = [
                    [a - pair.measured.low for a, pair in zip(y, shown, strict=True)],
                    [pair.measured.high - a for a, pair in zip(y, shown, strict=True)],
                ]
                axis.errorbar([p.coeff for p in shown], y, errors, fmt=marker, label=f"schedule {schedule}", capsize=2)
        axis.axhline(0, color="grey", linewidth=0.8)
        axis.set(xscale="log", xlabel="coefficient", title=f"zoom {zoom:g}" if zoom > 1 else "no zoom")
    axes[0, 0].set_ylabel("Brier, DANN minus ERM")
    axes[0, 0].legend()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="runs of the nested search")
    folder = parser.parse_args().folder
    from magnification_invariant.report.page import interval, markdown_table

    pairs, picture = pairs_of(folder), Path(__file__).parent / "results" / "coefficient.png"
    draw(pairs, picture)
    better, worse = (sum(side(pair.measured) for pair in pairs) for side in (lambda d: d.high < 0, lambda d: d.low > 0))
    rows = []
    for pair in pairs:
        low, high = pair.measured[1:3]
        minus = f"{pair.measured.difference:+.4f} {interval(low, high, '+.4f')}"
        zoom, coeff = "on" if pair.zoom > 1 else "off", f"{pair.coeff:g}"
        rows.append([zoom, pair.schedule, coeff, str(pair.trainings), f"{pair.erm:.4f}", minus])
    head = ["zoom", "schedule", "coefficient", "trainings", "ERM's Brier", "DANN minus ERM"]
    text = (
        "Virtual slides, development patients: each trial of the nested search trains on two magnifications and is "
        "scored on the other two, by the temperature-scaled, patient-balanced Brier score of other patients. DANN and "
        "ERM of a trial differ by the adversary alone. Intervals are over patients, the trained networks taken as "
        f"given, and are not adjusted for their number. Of {len(pairs)} intervals {better} lie below 0 (the adversary "
        f"helps) and {worse} above. A Brier score near 0.25 is that of a network that has learned to say 0.5."
    )
    print("# Which coefficient of the gradient reversal pays\n")
    print(f"`python benchmarks/coefficient.py {folder}`\n\n{text}\n\n![](coefficient.png)\n")
    print(markdown_table(head, rows))


if __name__ == "__main__":
    main()
