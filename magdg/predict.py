"""Predict images or whole slides of known scale: calibrated probability, signature, and a warning where the scale does
not fit. A file as --out is for images; a folder is for whole slides, of all kinds that OpenSlide reads."""

from pathlib import Path

from magdg.sources import add_column_arguments, load_data, positive


def add_arguments(parser) -> None:
    add = parser.add_argument
    add("paths", nargs="*", metavar="PATH", help="image files or slides, folders (searched through) or quoted patterns")
    add("--data", metavar="DATA", help="instead of PATHs: BreaKHis in any form, a Hub dataset repository, or 'virtual'")
    add_model_arguments(parser)
    out = "of images .parquet, .csv or .json; of whole slides a folder; default: %(default)s"
    add("--out", type=Path, default=Path("predictions.parquet"), help=out)
    add_view_argument(parser, "normalised")
    at = "um/px at the network's input, instead of --view; default of slides: the middle of what was trained on"
    add("--at", type=float, metavar="UM_PER_PX", help=at)
    regex = "its one group is the patient in a file's name: writes a row a patient too (of --data always), into "
    add("--group-regex", metavar="REGEX", help=regex + "OUT.patients.*: mean probability of the images")
    add("--tissue", type=float, default=0.5, metavar="SHARE", help="least of a slide's tile; default: %(default)s")
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

    from magnification_invariant.data.slides import SLIDE_SUFFIXES
    from magnification_invariant.predict import Classifier, items_of, patients_by_name
    from magnification_invariant.predict.slides import find_slides

    if of_slides := args.out.is_dir() or not args.out.suffix:
        if args.data or args.view != "normalised" or args.group_regex:
            what = "which take PATHs, --at for --view, and no --group-regex"
            raise ValueError(f"--out {args.out} is a folder, for whole slides, {what}")
        items = find_slides(args.paths)
    else:
        images = load_data(args) if args.data else args.paths
        items = items_of(images, args.mpp)
        patients = images["patient"][:] if args.data and not args.no_groups else None
        patients = patients_by_name(items, args.group_regex) if args.group_regex else patients
        slide = next((item.name for item in items if Path(item.name).suffix.lower() in SLIDE_SUFFIXES), None)
        if slide:
            raise ValueError(f"{slide} is a whole slide: name a folder to write to, --out FOLDER")
    state = PartialState(cpu=not torch.accelerator.is_available())  # or it would start alone without one
    with state.main_process_first():  # one downloads, the others find it
        classifier = Classifier.from_pretrained(
            args.model, backend=args.backend, device=state.device, batch_size=args.batch_size
        )
    return _slides(args, classifier, items, state) if of_slides else _images(args, classifier, items, patients, state)


def _share(state) -> dict:
    return {"process": state.process_index, "processes": state.num_processes, "wait": state.wait_for_everyone}


def _images(args, classifier, items, patients: list[str] | None, state) -> int:
    from magnification_invariant.predict import check_mpp, patients_file, predict_to_file

    view = args.view if args.at is None else check_mpp(args.at)
    summary = predict_to_file(classifier, items, args.out, view=view, patients=patients, **_share(state))
    if summary is None:
        return 0
    print(f"wrote {summary.images} rows to {args.out}")
    if summary.out_of_scope is not None:
        print(f"{summary.out_of_scope} of {summary.images} images are out of the model's scope")
    if patients:
        print(f"wrote {summary.patients} patients to {patients_file(args.out)}")
    for what, notes in (("with a warning", summary.warnings), ("FAILED", summary.errors)):
        if notes:
            print(f"{len(notes)} of {summary.images} images {what}; see the table" * (len(notes) > 20) or f"{what}:")
            for name, text in notes[:20]:
                print(f"  {name}: {text}")
    return 1 if summary.errors else 0


def _slides(args, classifier, paths: list[Path], state) -> int:
    from magnification_invariant.predict.slides import predict_slides

    settings = {"mpp": args.mpp, "at": args.at, "least_tissue": args.tissue}
    rows = predict_slides(classifier, paths, args.out, **settings, **_share(state))
    for row in rows or []:
        if row["error"]:
            print(f"{row['slide']}: FAILED: {row['error']}")
        else:
            of = f"{row['probability']:.3f} ({row['prediction']}), {row['tiles']} tiles at {row['at']:.3g} um/px"
            print(f"{row['slide']}: {of}" + (f"; {row['warning']}" if row["warning"] else ""))
    if rows is not None:
        print(f"wrote {args.out / 'slides.csv'}: a row for every slide in {args.out}")
    return 1 if any(row["error"] for row in rows or []) else 0
