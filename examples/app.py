"""The page in the browser, as a Hugging Face Space serves it: this file as app.py, and in requirements.txt one line,
``magnification-invariant[app]``.

    python examples/app.py                                     # the packaged weights, of virtual slides
    MODEL=runs/dann-lomo200-fold0-seed0 python examples/app.py
"""

import argparse
import os

from magnification_invariant.predict.app import LAUNCH, build


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=os.environ.get("MODEL"), help="model or run folder, or Hub repository")
    args = parser.parse_args()
    build(args.model).launch(**LAUNCH)


if __name__ == "__main__":
    main()
