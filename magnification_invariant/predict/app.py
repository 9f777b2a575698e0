"""The page in the browser. It computes nothing: it shows what classifier, explanation and search say of images."""

import base64
import io
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from magnification_invariant.data.images import SUFFIXES, open_image, to_rgb
from magnification_invariant.data.scale import check_mpp
from magnification_invariant.models.magdg import PACKAGED
from magnification_invariant.predict.classifier import COLUMNS, Classifier
from magnification_invariant.predict.explain import draw, map_of_view
from magnification_invariant.predict.inputs import Item
from magnification_invariant.predict.search import SignatureIndex, similar_cases
from magnification_invariant.predict.tables import SCHEMA, write_csv
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
    examples = _examples(*(classifier.mpp_range or (0.25, 0.5)))
    predict = partial(_answer, classifier, cases)
    predict([str(examples[0])], "", None)  # so that nobody's first click waits for what the first answer sets up
    with gr.Blocks(title="magnification_invariant", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        rows = gr.State([])
        gr.Markdown(
            f"### {classifier.config['name']}: how likely is {classifier.labels[POSITIVE]}, at which scale, and why?"
        )
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                asked, button, thumbnails = _questions(examples)
            with gr.Column(scale=3):
                table, download, shown = _answers(cases is not None)
        gr.Markdown(LIMITS.format(scales=scales))

        def choose_example(event: gr.SelectData) -> tuple:
            return [str(examples[event.index])], "", None

        def choose_row(rows: list[dict], event: gr.SelectData) -> tuple:
            return _shown(classifier, cases, rows[event.index[0]])

        waiting: dict[str, Any] = {"show_progress_on": shown[0]}
        every = [*shown, table, download, rows]
        button.click(predict, asked, every, api_name="predict", **waiting)
        chosen = thumbnails.select(choose_example, None, asked, api_visibility="private")
        chosen.then(predict, asked, every, api_visibility="private", **waiting)
        table.select(choose_row, rows, shown, api_visibility="private", **waiting)
    return page


def _questions(examples: list[Path]) -> tuple:
    """What the page asks for (files, mpp, magnification), its button, and the thumbnails of examples."""
    import gradio as gr

    file_types = sorted(SUFFIXES)
    files = gr.File(label="Images", file_count="multiple", file_types=file_types, height=130, elem_id="image")
    # a Number turns empty into 0
    mpp = gr.Textbox(label="Micrometres per pixel (mpp)", placeholder="empty: as the file states", elem_id="mpp")
    known = gr.Dropdown(list(SCALES), value=None, label="... or the magnification, if not known")
    button = gr.Button("Predict", variant="primary", elem_id="predict")
    gr.Markdown("No image at hand? Virtual tissue:")
    pictures = [(Image.open(path), path.stem) for path in examples]
    look = {"columns": 2, "height": 155, "allow_preview": False, "buttons": [], "show_label": False}
    return [files, mpp, known], button, gr.Gallery(pictures, elem_id="examples", **look)


def _answers(with_cases: bool) -> tuple:
    """The table of several images, the link to download it, and what is shown of one image."""
    import gradio as gr

    look = {"interactive": False, "max_height": 190, "buttons": [], "show_label": False}
    table = gr.Dataframe(visible=False, elem_id="table", **look)
    download = gr.HTML(visible=False, elem_id="download")
    with gr.Row():
        answer = gr.Label(label="Calibrated probability", min_width=220, elem_id="answer")
        with gr.Column(scale=2):
            note = gr.Markdown("Drop images, and say their scale if the files do not.", elem_id="note")
    picture = gr.Plot(show_label=False, elem_id="picture")
    look = {"columns": 5, "height": 190, "visible": with_cases, "buttons": []}
    similar = gr.Gallery(label="Most similar cases", elem_id="similar", **look)
    return table, download, [answer, note, picture, similar]


def _answer(classifier: Classifier, cases: SignatureIndex | None, paths: list[str] | None, mpp: str, known: str | None):
    """What the page shows of images: of the first all there is, of several a table too; mistakes in plain words."""
    import gradio as gr

    try:
        if not paths:
            raise ValueError("Choose an image first.")
        scale = check_mpp(mpp) if mpp and mpp.strip() else SCALES.get(known or "")
        rows = [_row(classifier, path, scale) for path in paths]
        shown = _shown(classifier, cases, rows[0])
    except ValueError as error:
        rows, shown = [], (None, f"### {error}", None, [])
    several = len(rows) > 1
    table, link = gr.Dataframe(_table(classifier, rows), visible=several), gr.HTML(_link(rows), visible=several)
    return *shown, table, link, rows


def _row(classifier: Classifier, path: str, mpp: float | None) -> dict[str, Any]:
    """The row of `Classifier.iterate` for a file, and its ``path``; what is wrong with it is its ``error``."""
    name = Path(path).name
    row = dict.fromkeys(COLUMNS) | {"filename": name}
    try:
        with open_image((path, None)) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(
                    f"the image has {image.width * image.height / 1e6:.0f} megapixels; this page takes "
                    f"{MOST_PIXELS / 1e6:.0f}, and `magdg predict` more"
                )
        (row,) = classifier.iterate([Item(name, path, mpp)])
    except Exception as error:  # whatever a damaged file makes Pillow raise
        row["error"] = str(error) or type(error).__name__
    row["error"] = row["error"] and row["error"].replace(f"{Path(path).parent}/", "")
    return row | {"path": path}


def _shown(classifier: Classifier, cases: SignatureIndex | None, row: dict[str, Any]) -> tuple:
    """Probabilities, the note, the picture, and similar cases of one row."""
    if row["error"]:
        return None, f"### {row['filename']} was not predicted: {row['error']}.", None, []
    with open_image((row["path"], None)) as image:
        image = to_rgb(image)
    probability, scale = row["probability"], row["native_mpp"]
    shown = {classifier.labels[POSITIVE]: probability}
    if len(classifier.labels) == 2:
        shown[classifier.labels[1 - POSITIVE]] = 1 - probability
    seen = f"at {row['mpp']:.3g} um/px" if scale else "whole, since its scale is not known,"
    scope = "not recorded with this model"
    if row["in_scope"] is not None:
        scope = f"{'in' if row['in_scope'] else 'OUT'}, stranger than {row['scope_percentile']:.0f} % of known images"
    lines = [f"**{row['filename']}**, seen {seen} in {row['tiles']} tiles. {classifier.reliability(probability)}"]
    lines += [f"**Scope:** {scope}."]
    lines += [f"**Careful:** {row['warning']}."] if row["warning"] else []
    curve = classifier.zoom_curve(image, scale) if scale and classifier.mpp_range else None
    return shown, "\n\n".join(lines), _figure(classifier, image, row, curve), _nearest(cases, classifier, row)


def _table(classifier: Classifier, rows: list[dict]) -> dict[str, list]:
    headers = ["image", f"P({classifier.labels[POSITIVE]})", "prediction", "um/px", "in scope", "remark"]
    scope = {True: "yes", False: "no", None: ""}
    cells = []
    for row in rows:
        numbers = [f"{row[name]:.3g}" if row[name] is not None else "" for name in ("probability", "mpp")]
        remark = f"not predicted: {row['error']}" if row["error"] else row["warning"] or ""
        cells.append([row["filename"], numbers[0], row["prediction"] or "", numbers[1], scope[row["in_scope"]], remark])
    return {"headers": headers, "data": cells}


def _link(rows: list[dict]) -> str:
    """The rows as `magdg predict` writes them, in a link that holds them; nothing is left on the server's disk."""
    file = io.StringIO()
    write_csv(file, SCHEMA.names, ({name: row[name] for name in SCHEMA.names} for row in rows))
    content = base64.b64encode(file.getvalue().encode()).decode()
    href = f"data:text/csv;base64,{content}"
    return f'<a download="predictions.csv" href="{href}">Download the table (CSV)</a>; click a row to see its image.'


def _figure(classifier: Classifier, image: Image.Image, row: dict, curve: tuple[np.ndarray, np.ndarray] | None):
    """What the network is shown, its map, the zoom curve and the signature, side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.4, 4.5), layout="constrained")
    (shown, heat), (zoom, bars) = figure.subplots(2, 2, height_ratios=(5, 3))
    view = classifier.view_of(image, row["native_mpp"])[0].pixels
    draw(shown, view)
    draw(heat, view, map_of_view(classifier, view))
    shown.set_title("as the network is shown it", fontsize=10)
    heat.set_title(f"map: orange for {classifier.labels[POSITIVE]}, purple against", fontsize=10)
    _draw_curve(zoom, classifier, row, curve)
    _draw_signature(bars, classifier, row["signature"] or [])
    return figure


def _draw_curve(axis, classifier: Classifier, row: dict, curve: tuple[np.ndarray, np.ndarray] | None) -> None:
    if curve is None:
        axis.set_axis_off()
        axis.set_title("this model knows no scale", fontsize=10)
        return
    axis.plot(*curve, "o-", color="#d95f0e")
    axis.axvline(row["mpp"], color="0.7", lw=1)
    axis.set(xscale="log", ylim=(0, 1), xlabel="micrometres per pixel", ylabel=f"P({classifier.labels[POSITIVE]})")
    axis.set_xticks(curve[0], [f"{each:.2g}" for each in curve[0]], minor=False)
    axis.set_xticks([], minor=True)
    axis.set_title("this image at other scales", fontsize=10)


def _draw_signature(axis, classifier: Classifier, values: list[float]) -> None:
    axis.bar(range(len(values)), values, color=["#d95f0e" if value > 0 else "#2c7fb8" for value in values])
    axis.axhline(0, color="0.5", lw=0.8)
    names = classifier.projector.indices.tolist() if classifier.projector and values else []
    axis.set_xticks(range(len(names)), names, rotation=90 if len(names) > 8 else 0, fontsize=8)
    axis.set(xlabel="dimension of the embedding", ylabel="standard deviations")
    axis.set_title("signature" if values else "this model has no signature", fontsize=10)


def _nearest(cases: SignatureIndex | None, classifier: Classifier, row: dict) -> list[tuple[Image.Image, str]]:
    if cases is None:
        return []
    similar, _ = similar_cases(cases, classifier, row["path"], mpp=row["native_mpp"], k=5)
    shown = []
    for case in similar.to_pylist():
        if case["picture"] and Path(case["picture"]).is_file():
            with open_image((case["picture"], None)) as image:
                shown.append((to_rgb(image), f"{case['label']}, {case['similarity']:.2f}"))
    return shown


def _examples(low: float, high: float) -> list[Path]:
    """Two pictures of virtual tissue at a scale that the model knows, in files that state it."""
    folder, mpp = Path(tempfile.mkdtemp(prefix="magdg-app-")), (low * high) ** 0.5
    paths = []
    for patient in (0, 1):
        image = Image.fromarray(render_field(patient, mpp, virtual_field(patient, 100, 0), (500, 400)))
        paths.append(folder / f"virtual {('benign', 'malignant')[virtual_patient(patient).label]}.tif")
        image.save(paths[-1], resolution=1e4 / mpp, resolution_unit=3)
    return paths
