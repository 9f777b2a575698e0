"""The whole idea in a few minutes, on virtual slides: train two models without 200X, test them there, look inside."""

from pathlib import Path

from magdg.sources import positive

HELD_OUT = "200"
DATA = "virtual:n_patients=100,size=350x230"  # half of BreaKHis' pixels are enough at this input size


def add_arguments(parser) -> None:
    add = parser.add_argument
    add("--output-dir", type=Path, default=Path("demo"), help="default: %(default)s")
    add("--epochs", type=positive, default=9, help="default: %(default)s")
    add("--image-size", type=positive, default=64, help="default: %(default)s")
    add("--seed", type=int, default=0, help="default: %(default)s")


def execute(args) -> int:
    from PIL import Image

    from magdg import lomo
    from magdg.sources import load_data
    from magnification_invariant.files import read_json
    from magnification_invariant.model_folder import logits_of
    from magnification_invariant.records import Run
    from magnification_invariant.report.pictures import curves, embedding_map, montage, reliability

    print(
        "These are VIRTUAL slides: procedural drawings of H&E, not patients. They show that the path works; they say\n"
        "nothing about breast cancer. For real images: magdg lomo --data path/to/BreaKHis_v1\n"
    )
    parser = lomo.Parser(prog="magdg lomo")
    lomo.add_arguments(parser)
    # few images: more steps from them, by a smaller batch
    command = f"--data {DATA} --held-out {HELD_OUT} --folds 0 --seeds {args.seed} --batch-size 16".split()
    command += ["--epochs", str(args.epochs), "--image-size", str(args.image_size)]
    training = parser.parse_args([*command, "--output-dir", str(args.output_dir)])
    cells, finished = lomo.train(training)
    if len(finished) < len(cells):
        return 1
    runs = [run for run in map(Run, finished) if run.is_network]

    montage(load_data(training), args.output_dir / "slides.png")
    reliability(runs, args.output_dir / "reliability.png")
    curves(runs, args.output_dir / "curves.png")
    for run in runs:
        embedding_map(run, args.output_dir / f"embedding_{run.method}.png")
    print(f"\nPictures: {', '.join(str(path) for path in sorted(args.output_dir.glob('*.png')))}")

    model = runs[-1].model
    logits = logits_of(model, Image.open(model / "fixture.png"))
    print(f"\nThe model, loaded back by timm from {model}, says of fixture.png there: {logits}")
    if logits != read_json(model / "fixture.json")["logits"]:
        print("which is NOT what it said when it was saved")
        return 1
    print("\nNext, the same tissue at one scale after the other, and the report:")
    print(f"  magdg zoom {runs[-1].folder} --data {DATA}\n  magdg report {args.output_dir}")
    return 0
