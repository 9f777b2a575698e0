"""The whole idea in a few minutes, on virtual slides: train two models without 200X, test them there, look inside."""

from pathlib import Path

HELP = "the whole path on virtual slides, in a few minutes on a CPU"
HELD_OUT = 200


def add_arguments(parser) -> None:
    parser.add_argument("--output-dir", type=Path, default=Path("demo"), help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=9, help="default: %(default)s")
    parser.add_argument("--image-size", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")


def run(args) -> int:
    import json
    import os

    from PIL import Image

    from magnification_invariant.data import load_virtual_slides
    from magnification_invariant.lomo.grid import make_grid, run_grid
    from magnification_invariant.model_folder import logits_of
    from magnification_invariant.report.pictures import curves, embedding_map, montage, reliability
    from magnification_invariant.report.runs import Run
    from magnification_invariant.report.table import markdown, summarise

    print(
        "These are VIRTUAL slides: procedural drawings of H&E, not patients. They show that the path works; they say\n"
        "nothing about breast cancer. For real images: magdg lomo --data path/to/BreaKHis_v1\n"
    )
    ds = load_virtual_slides(100, size=(350, 230))  # half of BreaKHis' pixels are enough at this input size
    cells = make_grid(
        ["erm", "dann"],
        [HELD_OUT],
        [0],
        [args.seed],
        epochs=args.epochs,
        batch_size=16,  # few images: more steps from them
        image_size=args.image_size,
        threads=os.cpu_count(),
    )
    finished = run_grid(cells, ds, args.output_dir)
    erm, dann = finished[-2:]
    print(f"\nVirtual slides, {HELD_OUT}X never seen in training, patients disjoint:\n")
    print(markdown(summarise(finished)))

    montage(ds, args.output_dir / "slides.png")
    reliability([erm, dann], args.output_dir / "reliability.png")
    curves(map(Run, (erm, dann)), args.output_dir / "curves.png")
    embedding_map(erm, args.output_dir / "embedding_erm.png")
    embedding_map(dann, args.output_dir / "embedding_dann.png")
    print(f"\nPictures: {', '.join(str(path) for path in sorted(args.output_dir.glob('*.png')))}")

    folder = dann / "model"
    logits = logits_of(folder, Image.open(folder / "fixture.png"))
    print(f"\nThe model, loaded back by timm from {folder}, says of fixture.png there: {logits}")
    if logits != json.loads((folder / "fixture.json").read_text())["logits"]:
        print("which is NOT what it said when it was saved")
        return 1
    return 0
