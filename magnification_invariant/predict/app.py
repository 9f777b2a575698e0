"""The page in the browser. It computes nothing: it shows what classifier, explanation and search say of one image."""

import tempfile
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from magnification_invariant.data.images import SUFFIXES, open_image, to_rgb
from magnification_invariant.data.scale import check_mpp
from magnification_invariant.data.stated_scale import stated_scale
from magnification_invariant.models.magdg import PACKAGED
from magnification_invariant.predict.classifier import Classifier
from magnification_invariant.predict.explain import draw, map_of_view
from magnification_invariant.predict.inputs import Item
from magnification_invariant.predict.search import SignatureIndex, similar_cases
from magnification_invariant.records import POSITIVE
from magnification_invariant.virtual_slides import render_field, virtual_field, virtual_patient

DEFAULT_MODEL = min(PACKAGED.glob("[!.]*"))
MOST_PIXELS = 25_000_000
LAUNCH = {"max_file_size": "200mb", "footer_links": []}

# Micrometres per pixel of what people know instead.
SCALES = {
    "scanner, objective 40x": 0.25,
    "scanner, objective 20x": 0.5,
    "scanner, objective 10x": 1.0,
    "BreaKHis 40X": 0.492,
    "BreaKHis 100X": 0.197,
    "BreaKHis 200X": 0.0985,
    "BreaKHis 400X": 0.0492,
}
LIMITS = """\
**What this is not.** A research model, not a medical device: it must not be used for diagnosis. It knows H&E of breast
tissue and two classes; shown anything else, it still answers. {scales} The map shows what the network used, not where a
tumour is. What you upload is kept for an hour on the machine that serves this page."""
_TRAINED_ON = """\
It was trained on {:.3g} to {:.3g} micrometres per pixel at its input: finer images are resampled, answers to coarser
ones are guesses."""


def build(repo_or_folder: str | Path | None = None, *, index: str | Path | None = None):
    """The page, a `gradio.Blocks`; ``build(...).launch(**LAUNCH)`` serves it.

    Args:
        repo_or_folder: see `Classifier.from_pretrained`; by default the packaged weights, of virtual slides.
        index: folder that ``magdg search --build`` wrote with this model; without one no similar cases are shown.

    Raises:
        OSError: no model or index there.
    """
    import gradio as gr

    classifier = Classifier.from_pretrained(repo_or_folder or DEFAULT_MODEL)
    cases = SignatureIndex.load(index) if index else None
    scales = _TRAINED_ON.format(*classifier.mpp_range) if classifier.mpp_range else "It knows no scale."
    low, high = classifier.mpp_range or (0.25, 0.5)
    with gr.Blocks(title="magnification_invariant", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(
            f"# {classifier.config['name']}\nHow likely is {classifier.labels[POSITIVE]}, at which scale, and why?"
        )
        with gr.Row():
            with gr.Column(scale=2):
                file = gr.File(label="Image", file_types=sorted(SUFFIXES), elem_id="image")
                # a Number turns empty into 0
                mpp = gr.Textbox(label="Micrometres per pixel", placeholder="0.25", elem_id="mpp")
                known = gr.Dropdown(
                    list(SCALES), value=None, label="... or the magnification, if nothing better is known"
                )
                button = gr.Button("Predict", variant="primary", elem_id="predict")
                gr.Examples(_examples(low, high), [file, mpp], label="No image at hand? Virtual tissue")
            with gr.Column(scale=3):
                answer = gr.Label(label="Calibrated probability", elem_id="answer")
                note = gr.Markdown(elem_id="note")
        picture = gr.Plot(show_label=False, elem_id="map")
        charts = gr.Plot(show_label=False, elem_id="charts")
        similar = gr.Gallery(label="Most similar cases", columns=5, visible=cases is not None, elem_id="similar")
        gr.Markdown(LIMITS.format(scales=scales))
        button.click(
            partial(_answer, classifier, cases),
            [file, mpp, known],
            [answer, note, picture, charts, similar],
            api_name="predict",
            show_progress_on=answer,
        )
    return page


def _answer(classifier: Classifier, cases: SignatureIndex | None, path: str | None, mpp: str, known: str | None):
    """What the page shows; bad input is said in plain words."""
    import gradio as gr

    try:
        if not path:
            raise ValueError("Choose an image first.")
        scale = _scale(classifier, path, mpp, known)
        with open_image((path, None)) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(
                    f"The image has {image.width * image.height / 1e6:.0f} megapixels; this page takes "
                    f"{MOST_PIXELS / 1e6:.0f}. `magdg predict` takes larger ones."
                )
            image = to_rgb(image)
        (row,) = classifier.iterate([Item(Path(path).name, path, scale)])
        if row["error"]:
            raise ValueError(row["error"])
        curve = classifier.zoom_curve(image, scale) if scale and classifier.mpp_range else None
        figures = [_map_figure(classifier, image, row), _charts_figure(classifier, row, curve)]
    except Exception as error:  # whatever a damaged file makes Pillow raise
        message = (str(error) or type(error).__name__).replace(f"{Path(path or '').parent}/", "")
        raise gr.Error(message, duration=None, print_exception=False) from error
    probability = row["probability"]
    shown = {classifier.labels[POSITIVE]: probability}
    if len(classifier.labels) == 2:
        shown[classifier.labels[1 - POSITIVE]] = 1 - probability
    seen = f"at {row['mpp']:.3g} um/px" if scale else "whole, since its scale is not known,"
    lines = [f"Seen {seen} in {row['tiles']} tiles. {classifier.reliability(probability)}"]
    lines += [f"**Careful:** {row['warning']}."] if row["warning"] else []
    return shown, "\n\n".join(lines), *figures, _nearest(cases, classifier, path, scale)


def _scale(classifier: Classifier, path: str, mpp: str | None, known: str | None) -> float | None:
    """Micrometres per pixel as stated on the page, else in the file; a model that knows no scale can do without."""
    if mpp and mpp.strip():
        return check_mpp(mpp)
    if known:
        return SCALES[known]
    stated = stated_scale(path)
    if stated.mpp is None and classifier.mpp_range:
        raise ValueError(
            f"The scale is not known: {stated.note or 'the file does not state it'}. Give micrometres per pixel, or "
            "choose a magnification."
        )
    return stated.mpp


def _figure(width: float, height: float, columns: int):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns)


def _map_figure(classifier: Classifier, image: Image.Image, row: dict):
    view = classifier.view_of(image, row["native_mpp"])[0].pixels
    figure, (left, right) = _figure(8, 4, 2)
    draw(left, view)
    draw(right, view, map_of_view(classifier, view))
    left.set_title("as the network is shown it", fontsize=10)
    right.set_title(f"class-activation map: orange for {classifier.labels[POSITIVE]}, purple against", fontsize=10)
    return figure


def _charts_figure(classifier: Classifier, row: dict, curve: tuple[np.ndarray, np.ndarray] | None):
    figure, (left, right) = _figure(8, 3.2, 2)
    if curve is None:
        left.set_axis_off()
        left.set_title("this model knows no scale", fontsize=10)
    else:
        left.plot(*curve, "o-", color="#d95f0e")
        left.axvline(row["mpp"], color="0.7", lw=1)
        left.set(xscale="log", ylim=(0, 1), xlabel="micrometres per pixel", ylabel=f"P({classifier.labels[POSITIVE]})")
        left.set_xticks(curve[0], [f"{each:.2g}" for each in curve[0]], minor=False)
        left.set_xticks([], minor=True)
        left.set_title("this image at other scales", fontsize=10)
    projector = classifier.projector
    values = row["signature"] or []
    right.bar(range(len(values)), values, color=["#d95f0e" if value > 0 else "#2c7fb8" for value in values])
    right.axhline(0, color="0.5", lw=0.8)
    names = projector.indices.tolist() if projector and values else []
    right.set_xticks(range(len(names)), names, rotation=90 if len(names) > 8 else 0, fontsize=8)
    right.set(xlabel="dimension of the embedding", ylabel="standard deviations")
    right.set_title("signature" if values else "this model has no signature", fontsize=10)
    return figure


def _nearest(
    cases: SignatureIndex | None, classifier: Classifier, path: str, mpp: float | None
) -> list[tuple[str, str]]:
    if cases is None:
        return []
    similar, _ = similar_cases(cases, classifier, path, mpp=mpp, k=5)
    shown = []
    for case in similar.to_pylist():
        if case["picture"] and Path(case["picture"]).is_file():
            with open_image((case["picture"], None)) as image:
                shown.append((to_rgb(image), f"{case['label']}, {case['similarity']:.2f}"))
    return shown


def _examples(low: float, high: float) -> list[list]:
    """Two pictures of virtual tissue at a scale that the model knows, as files."""
    folder, mpp = Path(tempfile.mkdtemp(prefix="magdg-app-")), round((low * high) ** 0.5, 3)
    rows = []
    for patient in (0, 1):
        image = Image.fromarray(render_field(patient, mpp, virtual_field(patient, 100, 0), (500, 400)))
        path = folder / f"virtual {('benign', 'malignant')[virtual_patient(patient).label]}.png"
        image.save(path)
        rows.append([str(path), str(mpp)])
    return rows
