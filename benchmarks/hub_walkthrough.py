"""Walk the way to the Hub and back by the real commands, against the loopback Hub, and write what they print.

    python benchmarks/hub_walkthrough.py RUNS [--output docs/hub.md]

RUNS is a grid of `magdg lomo` with the methods erm and dann, of any models and size. Every command below is run as it
stands, in a process of its own; the Hub is the one of the tests, on 127.0.0.1, and no other address is reachable from
them.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from hub_server import HubServer  # noqa: E402

METHODS = "dann", "erm"
NOISE = re.compile(r"\d+%\||\dit \[|Warning|^\s+warnings.warn|No files have been|^\[transformers\]|^\s*$")


class Walk:
    """Runs commands as a user of the Hub, in `folder`, and keeps what they say as Markdown."""

    def __init__(self, hub: HubServer, folder: Path):
        self.hub, self.folder, self.lines = hub, folder, []
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
        self.env |= hub.env(folder / "home") | {"MAGDG_HUB_NAMESPACE": "me"}
        self.env["PATH"] = f"{Path(sys.executable).parent}:{self.env['PATH']}"

    def say(self, text: str) -> None:
        self.lines += [text, ""]

    def run(self, command: str, *, shown: str | None = None, lines: int = 60, **env: str) -> None:
        """Run a shell command, show it and what it printed; stops the walk if it fails."""
        done = subprocess.run(
            command,
            shell=True,
            executable="/bin/bash",
            cwd=self.folder,
            env=self.env | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        variables = "".join(f"{name}={value} " for name, value in env.items())
        print(f"$ {variables}{command}\n{done.stdout}", flush=True)
        if done.returncode:
            raise SystemExit(f"{command} ended with {done.returncode}")
        printed = [line.split("\r")[-1].rstrip() for line in done.stdout.splitlines()]
        printed = [line for line in printed if not NOISE.search(line)]
        text = "\n".join(printed[:lines] + ["..."] * (len(printed) > lines))
        text = text.replace(str(self.folder), "~").replace(self.hub.endpoint, "https://hub.example")
        self.lines += ["```console", f"$ {variables}{shown or command}", *text.splitlines(), "```", ""]

    def python(self, code: str, *, python: str = "python", **env: str) -> None:
        """Run Python text by an interpreter, and show both."""
        self.lines += ["```python", code.strip(), "```", ""]
        self.run(f"{python} - <<'EOF'\n{code.strip()}\nEOF", shown=f"{python} example.py", **env)


def walk(w: Walk, name: str, other: str) -> None:
    """Everything, with the folders `name` and `other` of two runs."""
    run = f"runs/{name}"
    w.say("# The Hub, there and back")
    w.say(
        "Made by `python benchmarks/hub_walkthrough.py`: every command was run, and this is what it printed but for "
        "progress bars. The Hub is a loopback one, shown as `https://hub.example`; the models are tiny, trained on "
        "virtual slides for a moment, and good for nothing else."
    )
    w.say("## Publish")
    w.say("What would go, before anything does:")
    w.run(f"magdg push {run} me/model --dry-run", lines=14)
    w.say("One commit; the same again changes nothing; a whole grid (fold 0, seed 0) goes by the names of its weights:")
    w.run(f"magdg push {run} me/model")
    w.run(f"magdg push {run} me/model")
    w.run("magdg push runs me --all")
    w.say("Another run, as a pull request, and to a branch:")
    w.run(f"magdg push runs/{other} me/model --create-pr && magdg push runs/{other} me/model --revision erm")
    w.say("## What is there")
    w.python(
        """
from huggingface_hub import HfApi

info = HfApi().model_info("me/model", files_metadata=True)
for file in info.siblings:
    print(f"{file.size:>9,}  {file.rfilename}")
print([commit.title for commit in HfApi().list_repo_commits("me/model")])
"""
    )
    w.say("## Load with bare timm")
    w.say("In a fresh virtual environment that has nothing but timm (and what timm needs):")
    w.run("uv venv --quiet fresh && uv pip install --quiet --python fresh/bin/python timm")
    w.run("fresh/bin/python -c 'import magnification_invariant' 2>&1 | tail -1")
    w.run("magdg pull me/model pulled")
    w.python(
        """
import json, sys, timm, torch
from PIL import Image

model = timm.create_model("hf-hub:me/model", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
with torch.inference_mode():
    logits = model(transform(Image.open("pulled/fixture.png").convert("RGB")).unsqueeze(0))[0].tolist()
print(logits, logits == json.load(open("pulled/fixture.json"))["logits"], type(model))
""",
        python="fresh/bin/python",
    )
    w.say("## Load with transformers")
    w.python(
        """
from transformers import pipeline

classify = pipeline("image-classification", model="me/model")
print(classify("pulled/fixture.png"))  # not calibrated: the card says what to divide the logits by
"""
    )
    w.say("## Load with this package")
    w.python(
        """
import magnification_invariant as mi

classifier = mi.Classifier.from_pretrained("me/model")
(row,) = classifier.predict("pulled/fixture.png", mpp=2.0)
print(row["probability"], row["prediction"], row["warning"], row["signature"])
"""
    )
    w.say("## Is it what was published?")
    w.run("magdg doctor me/model")
    w.say("## The signature")
    w.python(
        """
from magnification_invariant.signatures import SignatureProjector

projector = SignatureProjector.from_pretrained("me/model")
print(len(projector.indices), "of", projector.width, projector.class_names, projector.source)
"""
    )
    w.say("## A search by signature")
    w.python(
        """
from magnification_invariant import load_virtual_slides

print(len(load_virtual_slides(12, images_per_magnification=1, size=(140, 92), write_to="slides")), "images")
"""
    )
    image = "$(find slides -name '*.png' | sort | head -1)"
    w.run(f"magdg search {image} --index index --build me/model --data slides -k 5")
    w.say("## Offline, after one download")
    w.python(
        """
import timm

print(sum(p.numel() for p in timm.create_model("hf-hub:me/model", pretrained=True).parameters()))
""",
        HF_HUB_OFFLINE="1",
    )
    w.say("## Weights that are not published")
    w.say("Nothing else is loaded in their place:")
    create = "timm.create_model('magerm_resnet18', pretrained=True)"
    w.run(f'python -c "import timm, magnification_invariant; {create}" 2>&1 | tail -1')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder of a grid")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "hub.md")
    args = parser.parse_args()
    name, other = (min(args.runs.glob(f"{m}-*-fold0-seed0*/model/signature.json")).parents[1].name for m in METHODS)
    with HubServer() as hub, tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "runs").symlink_to(args.runs.resolve())
        w = Walk(hub, Path(folder))
        walk(w, name, other)
    args.output.write_text("\n".join(w.lines))
    print(f"wrote {args.output}; command: {shlex.join(sys.argv)}")


if __name__ == "__main__":
    main()
