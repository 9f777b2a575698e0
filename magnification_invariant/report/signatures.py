"""The paper's signature table, from finished cells: size, what it is worth, how stable it is, and between networks."""

import json
from collections import defaultdict
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path

import numpy as np
from tqdm import tqdm

from magnification_invariant.data.splits import domain_name
from magnification_invariant.records import write_json
from magnification_invariant.report.page import Section, Table, number
from magnification_invariant.report.runs import Run, by_title, star
from magnification_invariant.signatures import SparseSignature, read_embeddings, refit_stability, size_at_loss
from magnification_invariant.signatures.networks import SignedNetwork, compare_networks

STABILITY = "signature_stability.json"


def signature_sections(runs: Iterable[Run], refits: int = 0) -> list[Section]:
    """The signatures of finished cells, as sections of a report.

    Args:
        runs: The cells, floors among them or not.
        refits: Halves of the patients that each signature is refitted on (at least 2), see `patient_stability`; the
            networks are compared then, too. With 0 all is read from records: refits are shown where a folder has them.

    Raises:
        ValueError: One refit has nothing to agree with; or as of `patient_stability`.
    """
    if refits < 0 or refits == 1:
        raise ValueError(f"stability is the agreement of refits: at least 2, or 0 for none, not {refits}")
    groups = {title: of for title, of in by_title(runs).items() if of[0].is_network}
    signed = {title: [run for run in of if run.results["signature"]["size"]] for title, of in groups.items()}
    sections = [("Signatures", _sizes(groups, signed))]
    if not any(signed.values()):
        return sections
    if refits:
        for run in tqdm([run for of in signed.values() for run in of], desc="refitting signatures", disable=None):
            patient_stability(run.folder, refits)
    sections += [
        ("Signatures at equal loss", _equal_loss(signed)),
        ("Stability on one backbone", _one_backbone(signed)),
    ]
    return [*sections, ("Stability between networks", _between_networks(signed))] if refits else sections


def patient_stability(folder: str | Path, n_subsamples: int = 30) -> dict:
    """Refits the signature of a finished cell on halves of its training patients, see `refit_stability`.

    The cell's signature is first fitted again from its embeddings, for its penalty. The result is kept in the folder
    (`STABILITY`), and read from there the next time.

    Raises:
        ValueError: The embeddings do not give the recorded signature.
    """
    folder = Path(folder)
    if (folder / STABILITY).exists():
        known = json.loads((folder / STABILITY).read_text())
        if known["subsamples"] == n_subsamples:
            return known
    (x, train), (x_val, val) = (read_embeddings(folder / "embeddings.safetensors", part) for part in ("train", "val"))
    signature = SparseSignature().fit(x, train["label"], train["patient"], x_val, val["label"], val["patient"])
    recorded = json.loads((folder / "results.json").read_text())["signature"]
    if len(signature.signature_) != recorded["size"]:
        raise ValueError(
            f"the embeddings of {folder} give {len(signature.signature_)} dimensions and its record says "
            f"{recorded['size']}: another version of this package made it"
        )
    found = refit_stability(signature, x, train["label"], groups=train["patient"], n_subsamples=n_subsamples)
    write_json(folder / STABILITY, {"subsamples": n_subsamples, **found})
    return json.loads((folder / STABILITY).read_text())


def _sizes(groups: dict[str, list[Run]], signed: dict[str, list[Run]]) -> list:
    rows = []
    for title, runs in groups.items():
        found = [run.results["signature"] for run in runs]
        with_one = [run.results["signature"] for run in signed[title]]
        size, width = [f["size"] for f in found], found[0]["width"]
        scores = [[f["test"]["patient_balanced"][name] for f in with_one] for name in ("auc", "f1", "brier")]
        rows.append(
            [title + star(runs), str(len(runs)), str(size.count(0)), f"{np.mean(size):.0f} ({min(size)}-{max(size)})"]
            + [str(width), f"{np.mean(size) / width:.2f}", _mean([f.get("live") for f in found], 0)]
            + [_mean([f["jaccard"] for f in with_one], 2), _mean([f["nogueira"] for f in with_one], 2)]
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
    for of_method in curves.values():
        if len(of_method) == len(signed):
            for part, found in sizes.items():
                reached = max(min(curve[part]) for curve in of_method.values())
                for title, curve in of_method.items():
                    found[title].append(size_at_loss(curve["size"], curve[part], reached))
    rows = [
        [title + star(runs), str(len(sizes["val"][title])), *(_mean(sizes[part][title], 1) for part in sizes)]
        for title, runs in signed.items()
    ]
    return [
        "The smallest signature on the path that reaches the log-loss that every method reaches in that cell: of the "
        "validation patients, and of the tested patients at the unseen magnification. Sizes at penalties chosen apart "
        "compare penalties; these compare methods. Means over the cells that all methods have.",
        Table(["method", "cells", "size, validation loss", "size, test loss"], rows),
    ]


def _one_backbone(signed: dict[str, list[Run]]) -> list:
    rows = []
    for title, runs in signed.items():
        for held_out in dict.fromkeys(run.held_out for run in runs):
            chosen = [run for run in runs if run.held_out == held_out]
            refits = [run.results["signature"] for run in chosen]
            pairs = zip(*(f["jaccard_pairs"] or [] for f in refits), strict=True)
            of_refits = [_mean([f[name] for f in refits], 2) for name in ("chance_jaccard", "nogueira")]
            counts = [_mean([f[name] for f in refits], 0) for name in ("size", "live")]
            shown = ", ".join(_mean(pair, 2) for pair in pairs)
            row = [title + star(chosen), domain_name(held_out), *counts, shown, *of_refits]
            rows.append([*row, *_halves([run.folder / STABILITY for run in chosen])])
    head = ["method", "held out", "size", "live", "Jaccard of pairs", "by chance", "Nogueira"]
    return [
        "Each network's signature refitted on its own embeddings, over live dimensions: leaving out one training "
        "magnification each (all pairs), and on halves of the patients (magdg report --refits 30). Jaccard depends on "
        "the size and has no correction for chance, Nogueira's index has: 0 is chance, above 0.75 is excellent. The "
        "interval of the halves is a Monte Carlo one, conditional on the cohort: it holds the chance of the halves and "
        "not that of other patients. Means over folds and seeds.",
        Table([*head, "halves", "Nogueira, halves", "its interval"], rows),
    ]


def _halves(files: list[Path]) -> list[str]:
    """How many refits by halves each of these cells keeps, and their agreement; dashes unless all of them have some."""
    if not all(file.exists() for file in files):
        return ["-"] * 3
    kept = [json.loads(file.read_text()) for file in files]
    counts = ", ".join(str(n) for n in sorted({found["subsamples"] for found in kept}))
    low, high = (_mean([found["nogueira_interval"][end] for found in kept], 2) for end in (0, 1))
    return [counts, _mean([found["nogueira"] for found in kept], 2), f"[{low}, {high}]"]


def _between_networks(signed: dict[str, list[Run]]) -> list:
    found = defaultdict(list)
    for title, runs in signed.items():
        networks = {run: SignedNetwork.from_cell(run.folder) for run in runs}
        for a, b in combinations(runs, 2):
            common = np.intersect1d(networks[a].keys, networks[b].keys)  # none where there are two domains only
            if a.key[1:] == b.key[1:] and len(common) >= 3:  # held-outs of one fold and seed
                pair = f"{domain_name(a.held_out)} and {domain_name(b.held_out)}"
                for by in ("index", "matching"):
                    if by == "matching" or networks[a].initial_sha256 == networks[b].initial_sha256:
                        found[title, pair, by].append(compare_networks(networks[a], networks[b], by))
    if not found:
        return ["No two networks of one fold and seed share training images."]
    rows = []
    for (title, pair, by), compared in found.items():
        good = [c for c in compared if c["comparable"]]
        share = _mean([c["share"] for c in compared], 2) if by == "index" else "-"
        kept = np.mean([min(k / max(size, 1) for k, size in zip(c["kept"], c["sizes"], strict=True)) for c in compared])
        figures = [_mean([c[name] for c in good], 2) for name in ("jaccard", "chance_jaccard", "nogueira")]
        units = [_mean([c["correlation"] for c in compared], 2), share, f"{len(good)} of {len(compared)}"]
        rows.append([title + star(signed[title]), pair, by, *units, f"{kept:.2f}", *figures])
        if not good:
            rows[-1][-3:] = ["not comparable", "-", "-"]
    head = [
        "method",
        "held out",
        "by",
        "correlation",
        "own best",
        "comparable",
        "kept",
        "Jaccard",
        "by chance",
        "Nogueira",
    ]
    return [
        "Signatures of the networks that held out different magnifications, on the training images that both saw. An "
        "index means one unit in two networks only if they started alike and stayed alike: the median correlation of "
        "units of one index is at least 0.5, and half of the units correlate best with their own index; else the pair "
        "is not comparable. By matching, units are paired by correlation (Hungarian method), pairs below 0.5 are "
        "dropped, and kept is the share of the smaller remainder of the two signatures.",
        Table(head, rows),
    ]


def _mean(values: Iterable[float | None], digits: int) -> str:
    known = [value for value in values if value is not None and np.isfinite(value)]
    return number(float(np.mean(known)) if known else None, digits)
