"""Evaluate a model on data, or anyone's predictions: intervals, calibration, types, worst patients, threshold."""

from pathlib import Path

from magdg.arguments import add_column_arguments, load_data

HELP = "evaluate a model on data, or anyone's table of predictions"


def add_arguments(parser) -> None:
    add = parser.add_argument
    add("source", metavar="MODEL|PREDICTIONS", help="a model's folder or Hub repository, or predictions.parquet")
    add("--data", metavar="DATA", help="of a model: BreaKHis in any form, a Hub dataset repository, or 'virtual'")
    add("--part", default="test", help="of predictions: which part is evaluated; default: %(default)s")
    add("--sensitivity", type=float, default=0.95, help="wanted of the threshold; default: %(default)s")
    add("--output-dir", type=Path, default=Path("evaluation"), help="default: %(default)s")
    add_column_arguments(parser)


def run(args) -> int:
    from magnification_invariant.report.evaluation import read_predictions, sections
    from magnification_invariant.report.page import markdown, write

    is_table = args.source.endswith(".parquet")
    if is_table == bool(args.data):
        raise ValueError("give either predictions (.parquet), or a model and --data to predict")
    if is_table:
        found = sections(read_predictions(Path(args.source)), args.part, sensitivity=args.sensitivity)
    else:
        found = sections(_predicted(args), sensitivity=args.sensitivity, temperature=_temperature(args.source))
    title = f"Evaluation of {args.source}"
    files = write(args.output_dir, "evaluation", title, found)
    print(markdown(title, found, "evaluation"))
    print(f"{files[1]}, {files[0]}")
    return 0


def _predicted(args) -> dict:
    import numpy as np

    from magnification_invariant.data.splits import domain_column
    from magnification_invariant.predict import Classifier, items_of

    ds = load_data(args)
    rows = list(Classifier.from_pretrained(args.source).iterate(items_of(ds)))
    if failed := [row for row in rows if row["error"]]:
        raise ValueError(f"{len(failed)} images cannot be predicted; {failed[0]['filename']}: {failed[0]['error']}")
    names = [name for name in ("filename", "label", "patient", "subtype") if name in ds.column_names]
    columns = {name: np.array(ds[name][:]) for name in names} | {"domain": np.array(ds[domain_column(ds)][:])}
    return columns | {"logits": np.array([row["logits"] for row in rows])}


def _temperature(model: str) -> float:
    from magnification_invariant.model_folder import read_model_config

    return read_model_config(model)["temperature"]
