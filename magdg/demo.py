"""The whole idea in a few minutes, on virtual slides: train two models without 40X, test them there, look inside."""

from pathlib import Path

from magdg.sources import positive

HELD_OUT = "40"
DATA = "virtual:n_patients=240,images_per_magnification=2,size=350x230"  # half of BreaKHis' pixels are enough at 64
NETWORK = "--model test_magdg_resnet --learning-rate 3e-3 --batch-size 16 --n-folds 3"  # learns in a minute on a CPU


def add_arguments(parser) -> None:
    add = parser.add_argument
    add("--output-dir", type=Path, default=Path("demo"), help="default: %(default)s")
    add("--epochs", type=positive, default=14, help="default: %(default)s")
    add("--image-size", type=positive, default=64, help="default: %(default)s")
    add("--seed", type=int, default=0, help="default: %(default)s")


def execute(args) -> int:
    from magdg import lomo
    from magdg.sources import load_data
    from magnification_invariant.records import Run
    from magnification_invariant.report.pictures import cost, curves, embedding_map, montage, reliability

    print(
        "These are VIRTUAL slides: procedural drawings of H&E, not patients. They show what an unseen magnification\n"
        "costs and what closes the gap; they say nothing about breast cancer.\n"
    )
    parser = lomo.Parser(prog="magdg lomo")
    lomo.add_arguments(parser)
    command = f"--data {DATA} --held-out {HELD_OUT} --folds 0 --seeds {args.seed} {NETWORK}".split()
    command += ["--epochs", str(args.epochs), "--image-size", str(args.image_size)]
    training = parser.parse_args([*command, "--output-dir", str(args.output_dir)])
    cells, finished = lomo.train(training)
    if len(finished) < len(cells):
        return 1
    runs = [run for run in map(Run, finished) if run.is_network]
    text, rows = conclusion(runs)
    print(text)

    cost(rows, f"Virtual slides: networks that never saw {HELD_OUT}X", args.output_dir / "cost.png")
    montage(load_data(training), args.output_dir / "slides.png")
    reliability(runs, args.output_dir / "reliability.png")
    curves(runs, args.output_dir / "curves.png")
    for run in runs:
        embedding_map(run, args.output_dir / f"embedding_{run.method}.png")
    print(f"\nPictures: {', '.join(str(path) for path in sorted(args.output_dir.glob('*.png')))}")
    print(packaged_model(runs[0].model / "fixture.png"))
    print("\nNext, the same tissue at one scale after the other, and the report:")
    print(f"  magdg zoom {runs[-1].folder} --data {DATA}\n  magdg report {args.output_dir}")
    return 0


def conclusion(runs: list) -> tuple[str, dict]:
    """What the unseen magnification costs each network, and what undoing its scale gives back: AUC with intervals.

    Returns:
        A table as Markdown, and its intervals for `report.pictures.cost`.
    """
    from magnification_invariant.records import NORMALISED
    from magnification_invariant.report.page import markdown_table
    from magnification_invariant.report.runs import difference, estimate

    head = ["AUC", f"{HELD_OUT}X, never seen", "the same, shown at a scale that was", "gain, paired by patient", "seen"]
    rows = {
        run.method: {part: estimate([run], "auc", part) for part in ("test", NORMALISED, "test_source")} for run in runs
    }
    lines = []
    for run in runs:
        unseen, normalised, seen = rows[run.method].values()
        gain = difference([run], [run], "auc", NORMALISED, "test")
        shown = ("{:.3f} [{:.3f}, {:.3f}]".format(*value) for value in (unseen, normalised, gain, seen))
        lines.append([run.method, *shown])
    title = f"What {HELD_OUT}X costs, and what undoing its scale gives back (95 % intervals over patients):"
    return f"\n{title}\n\n{markdown_table(head, lines)}", rows


def packaged_model(picture: Path) -> str:
    """What the packaged model, loaded by timm alone, says of an image."""
    import timm
    import torch
    from PIL import Image

    model = timm.create_model("magdg_resnet18", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.inference_mode():
        probability = model(transform(Image.open(picture).convert("RGB")).unsqueeze(0)).softmax(-1)[0]
    labels = model.pretrained_cfg["label_names"]
    said = ", ".join(f"{label} {value:.2f}" for label, value in zip(labels, probability.tolist(), strict=True))
    return (
        f"\ntimm.create_model('magdg_resnet18', pretrained=True), asked about {picture} (virtual tissue, so that the\n"
        f"answer means nothing): {said}"
    )
