"""Write a model as ONNX, preprocessing included, for `magdg predict --backend onnx` (or openvino); or for WSInfer."""

from pathlib import Path

from magdg.sources import VIRTUAL, add_column_arguments, load_data


def add_arguments(parser) -> None:
    add = parser.add_argument
    add("model", metavar="REPO_OR_FOLDER", help="a model that this package wrote")
    add("--out", type=Path, metavar="FOLDER", help="where to; default: the model's own folder")
    add("--to", choices=("onnx", "wsinfer"), default="onnx", help="wsinfer is for its QuPath extension; default: onnx")
    add("--at", type=float, metavar="UM_PER_PX", help="of wsinfer's tiles; default: the middle of what was trained on")
    add("--int8", action="store_true", help="compute in 8 bits, if the probabilities hardly change")
    add("--calibration", dest="data", metavar="DATA", default=VIRTUAL, help="images for --int8; default: virtual")
    add_column_arguments(parser)


def execute(args) -> int:
    if args.to == "wsinfer":
        return _to_wsinfer(args)
    if args.at is not None:
        raise ValueError("--at is for --to wsinfer: an ONNX file takes pixels of any scale")
    from magnification_invariant.predict import items_of
    from magnification_invariant.predict.export import ALLOWED_CHANGE, export

    done = export(args.model, args.out, calibration=items_of(load_data(args)) if args.int8 else None)
    bits = 8 if done.int8 else 32
    print(f"wrote {done.path} ({bits} bits, {done.path.stat().st_size / 1e6:.1f} MB)")
    print(f"32-bit logits: within {done.error:.1g} of PyTorch's (share of the largest)")
    if done.change is not None:
        verdict = "kept" if done.int8 else f"more than {ALLOWED_CHANGE}: 32 bits were kept"
        print(f"8 bits change the probability by {done.change:.3f} (99th percentile): {verdict}")
    return 0


def _to_wsinfer(args) -> int:
    if args.out is None or args.int8:
        raise ValueError("--to wsinfer needs --out FOLDER, since its config.json is another one, and knows no --int8")
    from magnification_invariant.data.scale import check_mpp
    from magnification_invariant.predict.wsinfer import export_wsinfer

    folder = export_wsinfer(args.model, args.out, args.at and check_mpp(args.at))
    print(f"wrote {folder}: in QuPath, Extensions > WSInfer, as a model of your own")
    return 0
