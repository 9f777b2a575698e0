"""Predict images of known scale, and say what the model itself thinks of it.

python examples/predict.py --model runs/dann-lomo200-fold0-seed0 --mpp 0.5 slides/*.png
"""

import argparse

from magnification_invariant import Classifier


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", help="files, folders or patterns")
    parser.add_argument("--model", required=True, help="model folder or Hub repository")
    parser.add_argument("--mpp", type=float, help="micrometres per pixel; default: what the files state")
    args = parser.parse_args()

    classifier = Classifier.from_pretrained(args.model)
    print(classifier)
    for row in classifier.predict(args.images, args.mpp):
        said = row["error"] or f"{row['prediction']}, p = {row['probability']:.3f}, seen at {row['mpp']:.3g} um/px"
        print(f"{row['filename']}: {said}")
        if row["warning"]:
            print(f"  careful: {row['warning']}")


if __name__ == "__main__":
    main()
