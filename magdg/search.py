"""Find the cases of a collection most like an image, by signature; --build makes the collection's index first."""

from pathlib import Path

from magdg.sources import add_data_argument, load_data


def add_arguments(parser) -> None:
    parser.add_argument("image", nargs="?", metavar="IMAGE", help="the case to find others like")
    parser.add_argument("--index", type=Path, required=True, metavar="DIR", help="folder of the index")
    parser.add_argument("-k", type=int, default=10, help="cases to show; default: %(default)s")
    parser.add_argument("--patient", help="of the image, left out; default: as the index or a BreaKHis name says")
    parser.add_argument("--magnification", type=int, help="show cases of this one only")
    parser.add_argument("--build", metavar="MODEL", help="make the index with this model folder or Hub repository")
    add_data_argument(parser)


def execute(args) -> int:
    if not (args.image or args.build):
        raise ValueError("give an IMAGE to search by, or --build MODEL to make an index")
    if args.image and not Path(args.image).is_file():
        raise FileNotFoundError(f"no image {args.image}")
    import torch

    from magnification_invariant.predict.search import SignatureIndex, SignedModel, build_index, find

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.build:
        file = build_index(SignedModel(args.build, device), load_data(args), args.index)
        print(f"wrote {file}, {file.stat().st_size / 1e6:.1f} MB")
    if args.image:
        index = SignatureIndex.load(args.index)
        cases, patient = find(
            index, args.image, k=args.k, patient=args.patient, magnification=args.magnification, device=device
        )
        print(f"{args.image}: {f'patient {patient}, left out' if patient else 'patient unknown: nobody is left out'}")
        for case in cases.to_pylist():
            kind = " ".join(str(case[name]) for name in ("label", "subtype") if case.get(name) is not None)
            place = f"{case['magnification']}X" if case.get("magnification") else case.get("domain", "")
            shown = f"{case['similarity']:6.3f}  {case['patient']:12} {kind:32} {place:6}"
            print(shown, case["picture"] or case["filename"])
    return 0
