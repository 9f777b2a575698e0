"""Publish a finished run on the Hugging Face Hub, and load it back as anybody would.

    python examples/train.py --output-dir runs
    hf auth login
    python examples/push_to_hub.py runs/dann-64px-lomo200-fold0-seed0 me/magdg_resnet18.my_lomo200

`magdg push` does the same, and whole grids.
"""

import argparse
from pathlib import Path

import timm

from magnification_invariant.hub import publish


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("repo", help="repository id, NAMESPACE/NAME")
    parser.add_argument("--private", action="store_true", default=None)
    args = parser.parse_args()

    print(publish(args.run, args.repo, private=args.private) or "unchanged")
    model = timm.create_model(f"hf-hub:{args.repo}", pretrained=True)
    print(f"{args.repo} loads as a {type(model).__name__} with {model.num_classes} classes")


if __name__ == "__main__":
    main()
