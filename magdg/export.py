"""Write a model as ONNX, preprocessing included; `magdg predict --backend onnx` (or openvino) reads it."""

from pathlib import Path

from magdg.sources import VIRTUAL, add_column_arguments, load_data


def add_arguments(parser) -> None:
    add = parser.add_argument
    add("model", metavar="REPO_OR_FOLDER", help="a model that this package wrote")
    add("--out", type=Path, metavar="FOLDER", help="where to; default: the model's own folder")
    add("--int8", action="store_true", help="compute in 8 bits, if the probabilities hardly change")
    add("--calibration", dest="data", metavar="DATA", default=VIRTUAL, help="images for --int8; default: virtual")
    add_column_arguments(parser)


def execute(args) -> int:
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
