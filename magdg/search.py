"""Find the cases of a collection most like an image, by signature; --build makes the collection's index first."""

from pathlib import Path

from magdg.sources import add_data_argument, load_data, positive


def add_arguments(parser) -> None:
    add = parser.add_argument
    add("image", nargs="?", metavar="IMAGE", help="the case to find others like")
    add("--index", type=Path, required=True, metavar="DIR", help="folder of the index")
    add("-k", type=positive, default=10, help="cases to show; default: %(default)s")
    add("--mpp", type=float, help="micrometres per pixel of the image; default: as the index or the file says")
    add("--patient", help="of the image, left out; default: as the index or a BreaKHis name says")
    add("--magnification", type=int, help="show cases of this one only")
    add("--build", metavar="MODEL", help="make the index with this model folder or Hub repository")
    add_data_argument(parser)


def execute(args) -> int:
    if not (args.image or args.build):
        raise ValueError("give an IMAGE to search by, or --build MODEL to make an index")
    if args.image and not Path(args.image).is_file():
        raise FileNotFoundError(f"no image {args.image}")

    from magnification_invariant.predict import Classifier
    from magnification_invariant.predict.search import SignatureIndex, build_index, similar_cases

    if args.build:
        file = build_index(Classifier.from_pretrained(args.build), load_data(args), args.index)
        print(f"wrote {file}, {file.stat().st_size / 1e6:.1f} MB")
    if args.image:
        index = SignatureIndex.load(args.index)
        chosen = {name: getattr(args, name) for name in ("k", "mpp", "patient", "magnification")}
        cases, patient = similar_cases(index, Classifier.from_pretrained(index.about["model"]), args.image, **chosen)
        print(f"{args.image}: {f'patient {patient}, left out' if patient else 'patient unknown: nobody is left out'}")
        for case in cases.to_pylist():
            kind = " ".join(str(case[name]) for name in ("label", "subtype") if case.get(name) is not None)
            place = f"{case['magnification']}X" if case.get("magnification") else case.get("domain", "")
            shown = f"{case['similarity']:6.3f}  {case['patient']:12} {kind:32} {place:6}"
            print(shown, case["picture"] or case["filename"])
    return 0
