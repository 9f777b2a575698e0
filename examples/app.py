"""The page, as a Hugging Face Space serves it: this file as app.py, and a requirements.txt with one line,
``magnification-invariant[app]``.

    python examples/app.py                                     # the packaged weights, of virtual slides
    MODEL=runs/dann-64px-lomo200-fold0-seed0/model python examples/app.py
"""

import os

from magnification_invariant.predict.app import LAUNCH, build

demo = build(os.environ.get("MODEL"))

if __name__ == "__main__":
    demo.launch(**LAUNCH)
