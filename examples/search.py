"""Find the cases most like an image.

    python examples/search.py --model runs/dann-lomo200-fold0-seed0
    python examples/search.py --model user/repository --data path/to/BreaKHis_v1 --image case.png

Without --image, the first image of the collection is searched for. A model folder needs a signature, which every
network trained by `magdg lomo` has.
"""

import argparse
from pathlib import Path

from magdg.sources import add_data_argument, load_data
from magnification_invariant import Classifier
from magnification_invariant.predict.search import SignatureIndex, build_index, similar_cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder or Hub repository with a signature")
    add_data_argument(parser)
    parser.add_argument("--index", type=Path, default=Path("index"), help="folder of the index; default: %(default)s")
    parser.add_argument("--image", type=Path, help="case to search by")
    args = parser.parse_args()

    ds, classifier = load_data(args), Classifier.from_pretrained(args.model)
    build_index(classifier, ds, args.index)
    index = SignatureIndex.load(args.index)
    print(f"{len(index.cases)} cases of {len(set(index.cases['patient'].to_pylist()))} patients in {args.index}")

    image = args.image or Path(ds[0]["image"].filename)
    cases, patient = similar_cases(index, classifier, image, k=5)
    print(f"\nNearest to {image} (of patient {patient}, who is left out):")
    for case in cases.to_pylist():
        print(f"{case['similarity']:6.3f}  {case['patient']}  {case['label']}  {case['filename']}")


if __name__ == "__main__":
    main()
