"""Evaluate a model on data, or anyone's predictions: intervals, calibration, a threshold, types and domains."""

from pathlib import Path

from magdg.predict import add_view_argument
from magdg.sources import add_column_arguments, load_data


def add_arguments(parser) -> None:
    add = parser.add_argument
    add("source", metavar="MODEL|PREDICTIONS", help="a model's folder or Hub repository, or predictions.parquet")
    add("--data", metavar="DATA", help="of a model: BreaKHis in any form, a Hub dataset repository, or 'virtual'")
    add("--part", help="which part of the predictions, or of the model's records, is evaluated; default: test")
    add_view_argument(parser, "protocol")
    add("--sensitivity", type=float, default=0.95, help="wanted of the threshold; default: %(default)s")
    add("--output-dir", type=Path, default=Path("evaluation"), help="default: %(default)s")
    add_column_arguments(parser)


def execute(args) -> int:
    from magnification_invariant.report.evaluation import read_predictions, sections
    from magnification_invariant.report.page import markdown, write

    is_table = args.source.lower().endswith(".parquet")
    if is_table == bool(args.data):
        raise ValueError("give either predictions (.parquet), or a model and --data to predict")
    columns, temperature = (read_predictions(Path(args.source)), None) if is_table else predict(args)
    content = sections(columns, args.part or "test", sensitivity=args.sensitivity, temperature=temperature)
    title = f"Evaluation of {args.source}"
    files = write(args.output_dir, "evaluation", title, content)
    print(markdown(title, content, "evaluation"))
    print(f"{files[1]}, {files[0]}")
    return 0


def predict(args) -> tuple[dict, float]:
    """Columns of predictions, and the model's temperature.

    Where images are in the model's records, only they are predicted, as the parts of the records: of the others, many
    were trained on. Where none is, images of patients that the model has seen are left out.

    Raises:
        ValueError: The model has seen all patients, or an image cannot be predicted.
    """
    import numpy as np

    from magnification_invariant.data.splits import domain_column
    from magnification_invariant.predict import Classifier, items_of
    from magnification_invariant.records import PARTS, Run

    ds, classifier = load_data(args), Classifier.from_pretrained(args.source)
    keys, parts = ("filename", "patient"), np.full(len(ds), "", object)
    run = Run(classifier.folder)
    if (run.folder / "predictions.parquet").is_file():
        records = zip(*(run.records[name].to_pylist() for name in (*keys, "part")), strict=True)
        part_of = {tuple(key): part for *key, part in records if part in PARTS}
        parts[:] = [part_of.get(key, "") for key in zip(*(ds[name][:] for name in keys), strict=True)]
    if parts.any():
        print(f"{sum(parts != '')} of {len(ds)} images are in the model's records: only these are evaluated")
        ds, parts = ds.select(np.flatnonzero(parts)), parts[parts != ""]
    else:
        seen = np.isin(ds["patient"][:], classifier.config.get("seen", {}).get("patients") or [])
        if seen.all():
            raise ValueError(
                f"{args.source} was trained on all {len(set(ds['patient']))} patients of {args.data}: what it says of "
                "them is no evaluation; give others"
            )
        if seen.any():
            print(f"{seen.sum()} of {len(ds)} images are of patients that the model was trained on: they are left out")
        ds = ds.select(np.flatnonzero(~seen))
        parts = np.full(len(ds), "test", object)
    args.part = args.part or next(part for part in ("test", "test_source", "val") if part in parts)
    kept = ("filename", "error", "logits")  # the embeddings of 10,000 images need not be held
    rows = [{name: row[name] for name in kept} for row in classifier.iterate(items_of(ds), view=args.view)]
    if failed := [row for row in rows if row["error"]]:
        raise ValueError(f"{len(failed)} images cannot be predicted; {failed[0]['filename']}: {failed[0]['error']}")
    columns = {name: np.array(ds[name][:]) for name in ("label", *keys, "subtype") if name in ds.column_names}
    columns |= {"domain": np.array(ds[domain_column(ds)][:]), "part": parts.astype(str)}
    return columns | {"logits": np.array([row["logits"] for row in rows])}, classifier.temperature
