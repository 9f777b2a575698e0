"""Draw what in an image speaks for a class: the same tissue at four scales, with maps and probabilities."""

from pathlib import Path

from magdg.predict import add_model_arguments


def add_arguments(parser) -> None:
    parser.add_argument("image", type=Path, metavar="IMAGE", help="an image file")
    add_model_arguments(parser)
    parser.add_argument("--out", type=Path, default=Path("page.png"), help="PNG; default: %(default)s")


def execute(args) -> int:
    from PIL import Image

    from magnification_invariant.data import read_mpp
    from magnification_invariant.predict import Classifier, check_mpp
    from magnification_invariant.predict.explain import page
    from magnification_invariant.records import POSITIVE

    mpp = args.mpp if args.mpp is not None else read_mpp(args.image)
    if mpp is None:
        raise ValueError(f"{args.image} does not state its scale: pass --mpp, micrometres per pixel")
    classifier = Classifier.from_pretrained(args.model)
    with Image.open(args.image) as image:
        rows = page(classifier, image, check_mpp(mpp), args.out)
    for row in rows:
        print(f"{row['mpp']:.3g} um/px: P({classifier.labels[POSITIVE]}) = {row['probability']:.3f}")
    print(f"{classifier.reliability(rows[0]['probability'])}\nwrote {args.out}")
    return 0
