"""The paper's signature table, from finished runs: size, what it is worth, and how stable it is on its backbone."""

from collections import defaultdict
from collections.abc import Iterable

import numpy as np
from tqdm import tqdm

from magnification_invariant.data.splits import domain_name
from magnification_invariant.files import read_json, write_json
from magnification_invariant.records import Run
from magnification_invariant.report.page import Section, Table, number
from magnification_invariant.report.runs import by_title, star
from magnification_invariant.signatures import SparseSignature, refit_stability, size_at_loss

STABILITY = "signature_stability.json"


def signature_sections(runs: Iterable[Run], refits: int = 0) -> list[Section]:
    """The signatures of finished runs, as sections of a report.

    Args:
        runs: Floors among them or not.
        refits: Halves of the patients that each signature is refitted on (at least 2), see `patient_stability`. With 0
            all is read from records: refits are shown where a folder has them.

    Raises:
        ValueError: One refit has nothing to agree with; or as of `patient_stability`.
    """
    if refits < 0 or refits == 1:
        raise ValueError(f"stability is the agreement of refits: at least 2, or 0 for none, not {refits}")
    groups = {title: group for title, group in by_title(runs).items() if group[0].is_network}
    signed = {title: [run for run in group if run.results["signature"]["size"]] for title, group in groups.items()}
    sections = [("Signatures", _sizes(groups, signed))]
    if not any(signed.values()):
        return sections
    if refits:
        every = [run for group in signed.values() for run in group]
        for run in tqdm(every, desc="refitting signatures", disable=None):
            patient_stability(run, refits)
    most = max(map(len, groups.values()))
    large = {title: signed[title] for title, group in groups.items() if 2 * len(group) >= most}
    sections += [
        ("Signatures at equal loss", _equal_loss(large)),
        ("Stability on one backbone", _one_backbone(signed)),
    ]
    return sections


def patient_stability(run: Run, n_subsamples: int = 30) -> dict:
    """Refits the signature of a finished run on halves of its training patients, see `refit_stability`.

    The run's signature is first fitted again from its embeddings, for its penalty. The result is kept in the folder
    (`STABILITY`), and read from there the next time.

    Raises:
        ValueError: The embeddings do not give the recorded signature.
    """
    if (known := _kept(run)) and known["subsamples"] == n_subsamples:
        return known
    x, x_val, train, val = *map(run.embeddings, ("train", "val")), *map(run.keys, ("train", "val"))
    signature = SparseSignature().fit(x, train["label"], train["patient"], x_val, val["label"], val["patient"])
    size, recorded = len(signature.signature_), run.results["signature"]["size"]
    if size != recorded:
        raise ValueError(
            f"the embeddings of {run.folder} give {size} dimensions and its record says {recorded}: another version of "
            "this package made it"
        )
    stability = refit_stability(signature, x, train["label"], groups=train["patient"], n_subsamples=n_subsamples)
    write_json(run.folder / STABILITY, {"subsamples": n_subsamples, **stability})
    return read_json(run.folder / STABILITY)


def _kept(run: Run) -> dict | None:
    file = run.folder / STABILITY
    return read_json(file) if file.exists() else None


def _sizes(groups: dict[str, list[Run]], signed: dict[str, list[Run]]) -> list:
    rows = []
    for title, runs in groups.items():
        every, present = ([run.results["signature"] for run in some] for some in (runs, signed[title]))
        size, width = [each["size"] for each in every], every[0]["width"]
        scores = [[each["test"]["patient_balanced"][name] for each in present] for name in ("auc", "f1", "brier")]
        rows.append(
            [title + star(runs), str(len(runs)), str(size.count(0)), f"{np.mean(size):.0f} ({min(size)}-{max(size)})"]
            + [str(width), f"{np.mean(size) / width:.2f}", _mean([each.get("live") for each in every], 0)]
            + [_mean([each[name] for each in present], 2) for name in ("jaccard", "nogueira")]
            + [_mean(values, 3) for values in scores]
        )
    head = ["method", "cells", "empty", "size (range)", "width", "share", "live", "Jaccard", "Nogueira"]
    return [
        "Dimensions of the embedding with a weight in an L1 logistic regression, means over cells; AUC, F1 and Brier "
        "are those of the signature itself at the unseen magnification, patient-balanced. Dead dimensions do not vary "
        "over the training images: few live ones make any signature look stable. Jaccard and Nogueira's index compare "
        "refits on one backbone, see below. Cells whose signature is empty count in size, share and live ones only.",
        Table([*head, "AUC", "F1", "Brier"], rows),
    ]


def _equal_loss(signed: dict[str, list[Run]]) -> list:
    """Size at the smallest loss that all methods reach in a cell."""
    signed = {title: runs for title, runs in signed.items() if runs}
    curves = defaultdict(dict)
    for title, runs in signed.items():
        for run in runs:
            curves[run.key][title] = run.results["signature"]["curve"]
    sizes = {part: defaultdict(list) for part in ("val", "test")}
    for by_method in curves.values():
        if len(by_method) == len(signed):
            for part, size in sizes.items():
                reached = max(min(curve[part]) for curve in by_method.values())
                for title, curve in by_method.items():
                    size[title].append(size_at_loss(curve["size"], curve[part], reached))
    rows = [
        [title + star(runs), str(len(sizes["val"][title])), *(_mean(sizes[part][title], 1) for part in sizes)]
        for title, runs in signed.items()
    ]
    return [
        "The smallest signature on the path that reaches the log-loss that every method reaches in that cell: of the "
        "validation patients, and of the tested patients at the unseen magnification. Sizes at penalties chosen apart "
        "compare penalties; these compare methods. Means over the cells that all methods have; "
        "a method with less than half as many cells as another is left out, since it would leave few.",
        Table(["method", "cells", "size, validation loss", "size, test loss"], rows),
    ]


def _one_backbone(signed: dict[str, list[Run]]) -> list:
    rows = []
    for title, runs in signed.items():
        for held_out in dict.fromkeys(run.held_out for run in runs):
            chosen = [run for run in runs if run.held_out == held_out]
            refits = [run.results["signature"] for run in chosen]
            pairs = zip(*(each["jaccard_pairs"] or [] for each in refits), strict=True)
            counts = [_mean([each[name] for each in refits], 0) for name in ("size", "live")]
            agreement = [_mean([each[name] for each in refits], 2) for name in ("chance_jaccard", "nogueira")]
            shown = ", ".join(_mean(pair, 2) for pair in pairs)
            row = [title + star(chosen), domain_name(held_out), *counts, shown, *agreement]
            rows.append([*row, *_halves([_kept(run) for run in chosen])])
    head = ["method", "held out", "size", "live", "Jaccard of pairs", "by chance", "Nogueira"]
    return [
        "Each network's signature refitted on its own embeddings, over live dimensions: leaving out one training "
        "magnification each (all pairs), and on halves of the patients (magdg report --refits 30). Jaccard depends on "
        "the size and has no correction for chance, Nogueira's index has: 0 is chance, above 0.75 is excellent. The "
        "interval of the halves is a Monte Carlo one, conditional on the cohort: it holds the chance of the halves and "
        "not that of other patients. Means over folds and seeds.",
        Table([*head, "halves", "Nogueira, halves", "its interval"], rows),
    ]


def _halves(kept: list[dict | None]) -> list[str]:
    """How many refits by halves each of these runs keeps, and their agreement; dashes unless all of them have some."""
    known = [each for each in kept if each is not None]
    if len(known) < len(kept):
        return ["-"] * 3
    counts = ", ".join(str(n) for n in sorted({each["subsamples"] for each in known}))
    low, high = (_mean([each["nogueira_interval"][end] for each in known], 2) for end in (0, 1))
    return [counts, _mean([each["nogueira"] for each in known], 2), f"[{low}, {high}]"]


def _mean(values: Iterable[float | None], digits: int) -> str:
    known = [value for value in values if value is not None and np.isfinite(value)]
    return number(float(np.mean(known)) if known else None, digits)
