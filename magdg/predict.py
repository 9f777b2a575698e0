"""Predict images of known scale: calibrated probability, signature, and a warning where the scale does not fit."""

from pathlib import Path

from magdg.sources import add_column_arguments, load_data, positive


def add_arguments(parser) -> None:
    add = parser.add_argument
    add("paths", nargs="*", metavar="PATH", help="image files, folders (searched through) or quoted glob patterns")
    add("--data", metavar="DATA", help="instead of PATHs: BreaKHis in any form, a Hub dataset repository, or 'virtual'")
    add_model_arguments(parser)
    add("--out", type=Path, default=Path("predictions.parquet"), help=".parquet, .csv or .json; default: %(default)s")
    add_view_argument(parser, "normalised")
    add("--backend", choices=("torch", "onnx", "openvino"), default="torch", help="default: %(default)s")
    add("--batch-size", type=positive, default=32, help="tiles at a time; default: %(default)s")
    add_column_arguments(parser)


def add_model_arguments(parser) -> None:
    add = parser.add_argument
    add("--model", required=True, metavar="REPO_OR_FOLDER", help="a model that this package wrote")
    add("--mpp", type=float, help="micrometres per pixel of the images as stored; default: what files or table state")


def add_view_argument(parser, default: str) -> None:
    text = f"show images at a scale that was trained on, or at their own as the records do; default: {default}"
    parser.add_argument("--view", choices=("normalised", "protocol"), default=default, help=text)


def execute(args) -> int:
    if bool(args.paths) == bool(args.data):
        raise ValueError("give either PATHs or --data")

    import torch
    from accelerate import PartialState

    from magnification_invariant.predict import Classifier, items_of, predict_to_file

    items = items_of(load_data(args) if args.data else args.paths, args.mpp)
    state = PartialState(cpu=not torch.accelerator.is_available())  # or it would start alone without one
    with state.main_process_first():  # one downloads, the others find it
        classifier = Classifier.from_pretrained(
            args.model, backend=args.backend, device=state.device, batch_size=args.batch_size
        )
    summary = predict_to_file(
        classifier,
        items,
        args.out,
        view=args.view,
        process=state.process_index,
        processes=state.num_processes,
        wait=state.wait_for_everyone,
    )
    if summary is None:
        return 0
    print(f"wrote {summary.images} rows to {args.out}")
    for what, notes in (("with a warning", summary.warnings), ("FAILED", summary.errors)):
        if notes:
            print(f"{len(notes)} of {summary.images} images {what}; see the table" * (len(notes) > 20) or f"{what}:")
            for name, text in notes[:20]:
                print(f"  {name}: {text}")
    return 1 if summary.errors else 0
