"""Find the cases most like an image, and see how often they have its class.

    python examples/search.py --model runs/dann-lomo200-fold0-seed0/model
    python examples/search.py --model user/repository --data path/to/BreaKHis_v1 --image case.png

Without --image, the first image of the collection is searched for. A model folder needs a signature, which every
network trained by `magdg lomo` has.
"""

import argparse
from pathlib import Path

import numpy as np

from magdg.arguments import add_data_argument, load_data
from magnification_invariant.predict.search import SignatureIndex, SignedModel, build_index, find, precision_at


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder or Hub repository with a signature")
    add_data_argument(parser)
    parser.add_argument("--index", type=Path, default=Path("index"), help="folder of the index; default: %(default)s")
    parser.add_argument("--image", type=Path, help="case to search by")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    ds = load_data(args)
    build_index(SignedModel(args.model), ds, args.index)
    index = SignatureIndex.load(args.index)
    print(f"{len(index.cases)} cases of {len(set(index.cases['patient'].to_pylist()))} patients in {args.index}")

    image = args.image or Path(ds[0]["image"].filename)
    cases, patient = find(index, image, k=5)
    print(f"\nNearest to {image} (of patient {patient}, who is left out):")
    for case in cases.to_pylist():
        print(f"{case['similarity']:6.3f}  {case['patient']}  {case['label']}  {case['filename']}")

    # Patients whom the network was trained on are among them: this shows what the index does, not how good it is.
    label, patient, magnification = (np.asarray(index.cases[name]) for name in ("label", "patient", "magnification"))
    print("\nPrecision at 5, by the magnification of the query (down) and of the gallery (right)")
    values = np.unique(magnification)
    print("      " + "".join(f"{m:>7}X" for m in values))
    for asked in values:
        found = [
            precision_at(index.vectors, label, patient, query=magnification == asked, gallery=magnification == given)
            for given in values
        ]
        print(f"{asked:>5}X" + "".join(f"{f[5]['precision']:8.3f}" for f in found))


if __name__ == "__main__":
    main()
