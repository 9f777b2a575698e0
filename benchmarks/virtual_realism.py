"""Virtual slides next to real tissue: what a person sees, what can be measured, what a network carries over.

The real images are a part of BreaKHis that lies beside the repository; no pixel of them is written into it. Its
patients are cut by class into two halves (breakhis_mini_halves.json, made once): *look*, which the generator may be
tuned against, and *locked*, which is scored once for a generator that is final and once for released weights.

    python benchmarks/virtual_realism.py                 # measures and montages of the half *look*
    python benchmarks/virtual_realism.py --score look    # train on virtual slides alone, test on real 100X; is logged
    python benchmarks/virtual_realism.py --score look locked     # a final generator: the same network on both halves
    python benchmarks/virtual_realism.py --score look --dry --patients 8 --epochs 1   # on virtual patients

Every score on real images is appended to results/virtual_realism_scores.json before it is shown: the number of looks
is part of what a score means.
"""

import argparse
import hashlib
import io
import json
import os
import platform
import sys
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).parent
HALVES = HERE / "breakhis_mini_halves.json"
SCORES = HERE / "results" / "virtual_realism_scores.json"
MAGNIFICATIONS = (40, 100, 200, 400)
TRAINED_WITH = ("patients", "training_images", "first_patient", "width", "arch", "image_size", "epochs", "seed")
NUCLEAR_MPP = 0.5  # nuclei are segmented at this scale, whatever the magnification
PERIODS = (64, 32, 16, 8, 4, 2, 1, 0.5)  # um, borders of the spectrum's octaves


# --- the halves


def halves(ds, seed: int = 0) -> dict[str, list[str]]:
    """Patients of *look* and *locked*: of each class in pairs of about as many 100X images, a seeded coin for each."""
    images = defaultdict(int)
    for patient, magnification in zip(ds["patient"], ds["magnification"], strict=True):
        images[patient] += magnification == 100
    cut = {"look": [], "locked": []}
    for label in (0, 1):
        of_class = {p for p, other in zip(ds["patient"], ds["label"], strict=True) if other == label}
        deal = sorted(of_class, key=lambda patient: (-images[patient], patient))
        for i in range(0, len(deal), 2):
            coin = hashlib.sha256(f"{seed}:{label}:{i}".encode()).digest()[0] % 2
            for k, patient in enumerate(deal[i : i + 2]):
                cut["look" if (coin + k) % 2 else "locked"].append(patient)
    return {name: sorted(patients) for name, patients in cut.items()}


def real_half(args, half: str):
    """The real images of a half, as a table of `load_breakhis`."""
    from magnification_invariant import load_breakhis

    ds = load_breakhis(args.data)
    if not HALVES.exists():
        HALVES.write_text(json.dumps(halves(ds), indent=1) + "\n")
    cut = json.loads(HALVES.read_text())
    if set(ds["patient"]) != {patient for patients in cut.values() for patient in patients}:
        raise SystemExit(f"{args.data} does not have the patients of {HALVES}")
    chosen = set(cut[half])
    return ds.select([i for i, patient in enumerate(ds["patient"]) if patient in chosen])


# --- measures of an image


def stain_densities(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Haematoxylin and eosin of RGB pixels, by the colours of Ruifrok and Johnston, as scikit-image has them."""
    from skimage.color import rgb2hed

    stains = rgb2hed(image)
    return stains[..., 0], stains[..., 1]


def colour(image: np.ndarray) -> dict[str, float]:
    """Percentiles of the stains, mean and spread of each channel's optical density, and the share of white."""
    density = -np.log10((image.astype(np.float32) + 1) / 256)
    found = {"white, share of pixels": float((density.sum(2) < 0.2).mean())}
    for name, channel in zip("RGB", np.moveaxis(density, 2, 0), strict=True):
        found |= {f"density {name}, mean": float(channel.mean()), f"density {name}, sd": float(channel.std())}
    for name, stain in zip(("haematoxylin", "eosin"), stain_densities(image), strict=True):
        values = np.percentile(stain, (5, 50, 95)) * 1000
        found |= {f"{name}, {p} % (x1000)": float(v) for p, v in zip((5, 50, 95), values, strict=True)}
    return found


def nuclei(image: np.ndarray, mpp: float) -> dict[str, float]:
    """Density and size of nuclei: haematoxylin at `NUCLEAR_MPP`, Otsu's threshold, touching ones cut by watershed."""
    from scipy.ndimage import distance_transform_edt, gaussian_filter
    from skimage.feature import peak_local_max
    from skimage.filters import threshold_otsu
    from skimage.measure import regionprops
    from skimage.segmentation import watershed

    size = [max(8, round(side * mpp / NUCLEAR_MPP)) for side in (image.shape[1], image.shape[0])]
    scaled = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
    stain = gaussian_filter(stain_densities(scaled)[0], 0.7 / NUCLEAR_MPP)
    mask = stain > threshold_otsu(stain)
    depth = gaussian_filter(distance_transform_edt(mask), 1)
    peaks = peak_local_max(depth, min_distance=round(2 / NUCLEAR_MPP), labels=mask.astype(int), exclude_border=False)
    seeds = np.zeros(mask.shape, int)
    seeds[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    regions = regionprops(watershed(-depth, seeds, mask=mask), intensity_image=stain)
    regions = [r for r in regions if 8 <= r.area * NUCLEAR_MPP**2 <= 250]
    area = scaled.shape[0] * scaled.shape[1] * NUCLEAR_MPP**2 / 1e6
    if not regions:
        return {"nuclei per mm2": 0.0}
    diameter = np.array([r.equivalent_diameter_area for r in regions]) * NUCLEAR_MPP
    return {
        "nuclei per mm2": len(regions) / area,
        "nuclei, diameter, median (um)": float(np.median(diameter)),
        "nuclei, diameter, 90 % / 10 %": float(np.divide(*np.percentile(diameter, (90, 10)))),
        "nuclei, solidity, median": float(np.median([r.solidity for r in regions])),
        "nuclei, contrast in haematoxylin (x1000)": float(stain[mask].mean() - stain[~mask].mean()) * 1000,
    }


def spectrum(image: np.ndarray, mpp: float) -> dict[str, float]:
    """Standard deviation of the grey optical density in octaves of the period in um, as far as the image has both."""
    grey = -np.log10((image.mean(2) + 1) / 256)
    side = min(grey.shape)
    grey = grey[(grey.shape[0] - side) // 2 :, (grey.shape[1] - side) // 2 :][:side, :side]
    window = np.outer(np.hanning(side), np.hanning(side))
    power = np.abs(np.fft.fft2((grey - grey.mean()) * window)) ** 2 / (side**2 * (window**2).sum())
    frequency = np.hypot(np.fft.fftfreq(side, mpp)[:, None], np.fft.fftfreq(side, mpp)[None])
    found = {}
    for longer, shorter in pairwise(PERIODS):
        if longer <= side * mpp / 2 and shorter >= 2 * mpp:
            band = (frequency >= 1 / longer) & (frequency < 1 / shorter)
            found[f"contrast at {shorter:g} to {longer:g} um (x1000)"] = float(np.sqrt(power[band].sum())) * 1000
    return found


def measured(ds, args) -> dict:
    """Every measure of some images a patient, at each magnification: {(magnification, measure): {patient: value}}."""
    found = defaultdict(lambda: defaultdict(list))
    for row in some(ds, args.images):
        image = np.asarray(row["image"].convert("RGB"))
        for measures in (colour(image), nuclei(image, row["mpp"]), spectrum(image, row["mpp"])):
            for name, value in measures.items():
                found[row["magnification"], name][row["patient"]].append(value)
    return {key: {patient: np.mean(values) for patient, values in by.items()} for key, by in found.items()}


def some(ds, each: int):
    """At most `each` images of a patient at a magnification."""
    taken = defaultdict(int)
    for i, key in enumerate(zip(ds["patient"], ds["magnification"], strict=True)):
        taken[key] += 1
        if taken[key] <= each:
            yield ds[i]


# --- virtual images that went the way of the real ones


def virtual_like(real, args):
    """Virtual slides, resized and compressed as the real files are, which are no originals here."""
    from datasets import Dataset, Features
    from datasets import Image as ImageFeature

    from magnification_invariant import load_virtual_slides

    drawn = load_virtual_slides(args.compared, images_per_magnification=args.images, first_patient=args.first_patient)
    example = next(row["image"] for row in real if row["image"].format == "JPEG")

    def recoded():
        for row in drawn:
            buffer = io.BytesIO()
            image = row["image"].convert("RGB").resize(example.size, Image.Resampling.LANCZOS)
            image.save(buffer, "JPEG", qtables=example.quantization)
            mpp = row["mpp"] * row["image"].width / image.width
            yield row | {"image": {"path": None, "bytes": buffer.getvalue()}, "mpp": mpp}

    return Dataset.from_list(list(recoded()), features=Features(drawn.features | {"image": ImageFeature()}))


def compare(real, virtual, args) -> str:
    """A table a magnification: mean over patients, and how many of the real patients' standard deviations lie between.

    Where two real patients at least have the measure, and differ in it.
    """
    ours, theirs = measured(virtual, args), measured(real, args)
    blocks = []
    for magnification in MAGNIFICATIONS:
        rows = []
        for (m, name), by_patient in theirs.items():
            if m == magnification and len(by_patient) > 1 and (m, name) in ours and np.ptp(list(by_patient.values())):
                a, b = list(by_patient.values()), list(ours[m, name].values())
                gap = (np.mean(b) - np.mean(a)) / np.std(a, ddof=1)
                rows.append((name, np.mean(a), np.std(a, ddof=1), np.mean(b), np.std(b, ddof=1), gap))
        there = {patient for (m, _), by in theirs.items() if m == magnification for patient in by}
        blocks += [f"## {magnification}X: {len(there)} real patients, {args.compared} virtual ones", ""]
        blocks += ["| | real, mean (sd) | virtual, mean (sd) | gap in sd of real |", "|---|---|---|---|"]
        for name, mean_a, sd_a, mean_b, sd_b, gap in sorted(rows, key=lambda row: -abs(row[-1])):
            blocks.append(f"| {name} | {mean_a:.3g} ({sd_a:.2g}) | {mean_b:.3g} ({sd_b:.2g}) | {gap:+.1f} |")
        blocks.append("")
    return "\n".join(blocks)


def histograms(real, virtual, args, path: Path) -> None:
    """Optical density after deconvolution, real and virtual in one panel a magnification and stain."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    axes = figure.subplots(2, len(MAGNIFICATIONS), sharex="row")
    for column, magnification in zip(axes.T, MAGNIFICATIONS, strict=True):
        for name, ds in (("real", real), ("virtual", virtual)):
            images = [r["image"].convert("RGB") for r in some(ds, args.images) if r["magnification"] == magnification]
            stains = zip(*(stain_densities(np.asarray(image)[::4, ::4]) for image in images), strict=True)
            for axis, stain, values in zip(column, ("haematoxylin", "eosin"), stains, strict=True):
                pooled = np.concatenate([value.ravel() for value in values])
                axis.hist(pooled, 100, range=(-0.05, 0.3), density=True, histtype="step", label=name)
                axis.set_title(f"{stain}, {magnification}X")
        column[0].legend()
    figure.savefig(path)


def montage(real, virtual, magnification: int, path: Path, n: int = 4, width: int = 400) -> None:
    """Real to the left, virtual to the right; benign above, malignant below; each from another patient if possible."""
    height, gap = round(width * 460 / 700), 12
    sheet = Image.new("RGB", (n * 2 * width + gap, 4 * height + gap), "white")
    for side, ds in enumerate((real, virtual)):
        at = np.array(ds["magnification"]) == magnification
        labels, patients = np.array(ds["label"]), ds["patient"][:]
        for label in (0, 1):
            turn, seen = [], defaultdict(int)
            for i in np.flatnonzero(at & (labels == label)).tolist():
                seen[patients[i]] += 1
                turn.append((seen[patients[i]], i))
            for k, (_, i) in enumerate(sorted(turn)[: 2 * n]):
                tile = ds[i]["image"].convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
                x, y = side * (n * width + gap) + k % n * width, label * (2 * height + gap) + k // n * height
                sheet.paste(tile, (x, y))
    sheet.save(path)


def run_comparison(args) -> None:
    from magnification_invariant.virtual_slides import GENERATOR_VERSION

    real = real_half(args, "look")
    virtual = virtual_like(real, args)
    args.output.mkdir(parents=True, exist_ok=True)
    for magnification in MAGNIFICATIONS:
        montage(real, virtual, magnification, args.output / f"montage_{magnification}X.png")
    histograms(real, virtual, args, args.output / "stains.png")
    text = (
        f"# Virtual slides (version {GENERATOR_VERSION}) and real tissue\n\n"
        f"`{' '.join(['python benchmarks/virtual_realism.py', *sys.argv[1:]])}`\n\n"
        "Real: the half *look* of a part of BreaKHis, most of it re-encoded as JPEG of 500x328 pixels; the virtual "
        "images went the same way. Means over patients. Nuclei are found by a threshold on haematoxylin, the same "
        "for both: the figures compare, they do not count. Montages stay outside the repository.\n\n"
    )
    text += compare(real, virtual, args)
    (HERE / "results" / "virtual_realism.md").write_text(text + scores_text())
    print(f"{text}\nPictures: {args.output}")


# --- the yardstick: trained on virtual slides alone


def trained_model(args):
    """A model that has seen virtual slides of all magnifications and nothing else, and its image size."""
    import torch

    from magnification_invariant.data import PixelCache, cache_height, load_virtual_slides
    from magnification_invariant.engine import FitConfig, TrainRows, fit
    from magnification_invariant.lomo.cell import RECIPES
    from magnification_invariant.tasks import get_task

    if args.first_patient + args.patients > 10_000:
        raise SystemExit("patients from 10,000 on are for other tests")
    ds = load_virtual_slides(
        args.patients,
        images_per_magnification=args.training_images,
        first_patient=args.first_patient,
        size=(args.width, round(args.width * 460 / 700)),
    )
    label, patient = np.array(ds["label"]), np.array(ds["patient"])
    domain = np.unique(ds["magnification"], return_inverse=True)[1]
    recipe = {name: value for name, value in RECIPES["strong"].items() if name != "calibrate"}
    config = FitConfig(epochs=args.epochs, image_size=args.image_size, seed=args.seed, **recipe)
    torch.manual_seed(args.seed)
    erm = get_task("erm")
    model = erm.create_model(args.arch or erm.arch, num_classes=2, num_domains=0)
    cache = PixelCache(ds, cache_height(args.image_size))
    return fit(erm(model), cache, TrainRows(np.arange(len(ds)), label, domain, patient), config), args.image_size


def released_model(folder: Path):
    import timm

    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    return model, model.pretrained_cfg["input_size"][-1]


def run_score(args) -> None:
    import torch

    torch.set_num_threads(args.threads)
    what = "weights" if args.weights else "generator"
    locked = [entry["what"] for entry in scores() if entry["half"] == "locked"]
    if "locked" in args.score and not args.dry and what in locked:
        raise SystemExit(f"the half locked has been scored for {what}, and is so once")
    model, size = released_model(args.weights) if args.weights else trained_model(args)
    for half in args.score:
        score_half(model, size, half, what, args)


def score_half(model, size: int, half: str, what: str, args) -> None:
    """Score a model on the 100X images of a half, log it, and show all that was logged."""
    from magnification_invariant import virtual_slides
    from magnification_invariant.data import ViewCache, load_virtual_slides
    from magnification_invariant.engine import predict
    from magnification_invariant.files import write_json
    from magnification_invariant.metrics import auc, patient_weights

    if args.dry:
        ds = load_virtual_slides(16, images_per_magnification=2, first_patient=9_900, magnifications=(100,))
    else:
        ds = real_half(args, half)
        ds = ds.select([i for i, magnification in enumerate(ds["magnification"]) if magnification == 100])
    logits, _ = predict(model, ViewCache(ds, size).views, np.arange(len(ds)))
    label, patient, score = np.array(ds["label"]), np.array(ds["patient"]), logits[:, 1] - logits[:, 0]
    generator = sorted(Path(virtual_slides.__file__).parent.glob("*.py"))
    entry = {
        "half": half,
        "look": sum(other["half"] == half for other in scores()) + 1,
        "what": what,
        "generator_version": virtual_slides.GENERATOR_VERSION,
        "generator_sha256": hashlib.sha256(b"".join(path.read_bytes() for path in generator)).hexdigest()[:16],
        "arguments": {name: str(vars(args)[name]) for name in TRAINED_WITH},
        "weights_sha256": args.weights
        and hashlib.sha256((args.weights / "model.safetensors").read_bytes()).hexdigest(),
        "images": len(ds),
        "patients": [len(set(patient[label == c])) for c in (0, 1)],
        "auc": float(auc(label, score)),
        "auc_patient_balanced": float(auc(label, score, sample_weight=patient_weights(patient))),
        "interval": bootstrap(label, score, patient),
    }
    if args.dry:
        print("on virtual patients, not logged:", json.dumps(entry, indent=1))
        return
    write_json(SCORES, [*scores(), entry])
    print(scores_text())


def bootstrap(label, score, patient, draws: int = 2000) -> list[float]:
    """95 % of the patient-balanced AUC over redrawn patients of each class.

    `metrics.cluster_interval` gives none for so few patients, since none covers what it claims: take this one for
    too narrow.
    """
    from magnification_invariant.metrics import auc, patient_weights

    rng, names = np.random.default_rng(0), np.unique(patient)
    weight, which = patient_weights(patient), np.searchsorted(names, patient)
    benign = np.array([label[which == k][0] == 0 for k in range(len(names))])
    values = []
    for _ in range(draws):
        times = np.zeros(len(names))
        for stratum in (np.flatnonzero(benign), np.flatnonzero(~benign)):
            times += np.bincount(rng.choice(stratum, len(stratum)), minlength=len(names))
        drawn = times[which] > 0
        values.append(auc(label[drawn], score[drawn], sample_weight=(weight * times[which])[drawn]))
    return [float(v) for v in np.percentile(values, (2.5, 97.5))]


def scores() -> list[dict]:
    """All that was ever scored on real images."""
    return json.loads(SCORES.read_text()) if SCORES.exists() else []


def scores_text() -> str:
    """All scores on real images, as Markdown."""
    if not scores():
        return "## Trained on virtual slides, tested on real 100X\n\nNot scored yet.\n"
    lines = ["## Trained on virtual slides, tested on real 100X", ""]
    lines += [
        "| half | look | generator | of | patients | AUC, patient-balanced | AUC by image |",
        "|---|---|---|---|---|---|---|",
    ]
    for e in scores():
        interval = "[{:.3f}, {:.3f}]".format(*e["interval"])
        version = f"{e['generator_version']} ({e['generator_sha256'][:8]})"
        patients = " + ".join(map(str, e["patients"]))
        balanced = f"{e['auc_patient_balanced']:.3f} {interval}"
        lines.append(
            f"| {e['half']} | {e['look']} | {version} | {e['what']} | {patients} | {balanced} | {e['auc']:.3f} |"
        )
    return "\n".join([*lines, "", "Intervals: redrawn patients; with so few of them they are too narrow.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, default=HERE.parents[1] / "shared" / "breakhis-mini", help="the part of BreaKHis")
    add("--output", type=Path, default=HERE.parent / "runs" / "virtual_realism", help="for pictures; git ignores it")
    add("--compared", type=int, default=24, help="virtual patients to compare with")
    add("--images", type=int, default=2, help="of a patient at a magnification, to compare")
    add("--first-patient", type=int, default=0, help="number of the first virtual patient")
    add("--score", nargs="+", choices=("look", "locked"), help="halves")
    add("--dry", action="store_true", help="test on virtual patients instead of real ones, and log nothing")
    add("--weights", type=Path, help="score this model folder instead of training")
    add("--patients", type=int, default=400, help="virtual ones to train on")
    add("--training-images", type=int, default=4, help="of each of them at each magnification")
    add("--width", type=int, default=350, help="of virtual images to train on, in pixels")
    add("--arch", help="timm architecture; default: magerm_resnet18")
    add("--image-size", type=int, default=112)
    add("--epochs", type=int, default=20)
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    print(f"Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores", file=sys.stderr)
    run_score(args) if args.score else run_comparison(args)


if __name__ == "__main__":
    main()
