"""Write the embeddings of images by any timm network, for magdg lomo --embeddings; run again, it goes on."""

from pathlib import Path

from magdg.sources import add_data_argument, load_data, positive


def add_arguments(parser) -> None:
    add = parser.add_argument
    add("--model", required=True, metavar="NAME", help="a timm name, hf-hub:owner/name or local-dir:folder")
    add("--out", type=Path, required=True, metavar="FILE", help="what is written, a .parquet file")
    add("--batch-size", type=positive, default=64, metavar="N", help="tiles at a time; default: %(default)s")
    add("--image-size", type=positive, metavar="N", help="side of the network's input; default: its own")
    add_data_argument(parser)


def execute(args) -> int:
    import torch

    from magnification_invariant.lomo.embedded import embed_images, load_network

    ds = load_data(args)
    model, size = load_network(args.model, args.image_size)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    embed_images(ds, model, size, args.out, batch_size=args.batch_size, network=args.model)
    print(f"{args.out}: {len(ds):,} embeddings of {model.num_features} numbers")
    return 0
