"""Exploratory: what the parts of adversarial training do, on development slides (patients numbered under 10,000).

One part at a time is changed in the default `dann`: the schedule of the coefficient, its size, steps of the domain head
before each step of the rest, what the head reads, the betas of Adam. Nothing is chosen from this table: defaults and
confirmed recipes stay as they are. A run that was cut goes on where it stopped.

    python benchmarks/ablations.py                                              # all rows, two cells at a time
    python benchmarks/ablations.py --rows dann adaptive --epochs 2 --results runs/trial         # trial
"""

import argparse
import os
import shlex
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from magnification_invariant.models import grad_reverse
from magnification_invariant.tasks import DANN, Player


class OneLength(torch.nn.Module):
    """Features (b, width) at the length of a standard normal vector."""

    def forward(self, pooled):
        return F.normalize(pooled) * pooled.shape[1] ** 0.5


class NormalisedDANN(DANN):
    """The head reads features of one length."""

    @classmethod
    def create_model(cls, arch, **kwargs):
        model = super().create_model(arch, **kwargs)
        model.domain_head.insert(0, OneLength())
        return model


class BetasDANN(DANN):
    """beta_1 = 0.5, as in DCGAN and other games; AdamW's own is 0.9."""

    @property
    def players(self):
        options = {"betas": (0.5, 0.999)}
        return [Player(each.name, each.parameters, each.steps, options) for each in super().players]


class StageDANN(DANN):
    """The head reads the pooled features of the last stage but one: the last stage is not pushed."""

    @classmethod
    def create_model(cls, arch, **kwargs):
        model = super().create_model(arch, **kwargs)
        model.domain_head[0] = torch.nn.Linear(model.feature_info[-2]["num_chs"], model.domain_head[0].out_features)
        return model

    def forward(self, input, target, domain, progress, player=0):
        final, (stage,) = self.model.forward_intermediates(input, indices=[3])
        pooled = self.model.forward_head(final, pre_logits=True)
        coeff = self.coefficient(pooled, target, domain, progress)
        output = self.model.get_classifier()(pooled)
        domain_loss = self.domain_loss(self.model.domain_head(grad_reverse(stage.mean((2, 3)), coeff)), target, domain)
        class_loss = self.class_loss(output, target)
        parts = {"class_loss": class_loss.detach(), "domain_loss": domain_loss.detach(), "coeff": coeff}
        return {"loss": class_loss + domain_loss, "output": output, **parts}


ROWS = {
    "erm": ("erm", {}),
    "dann": ("dann", {}),
    "coefficient 0.1": ("dann", {"coeff": 0.1}),
    "coefficient 3": ("dann", {"coeff": 3.0}),
    "adaptive": ("dann", {"coeff_schedule": "adaptive"}),
    "constant": ("dann", {"coeff_schedule": "constant"}),
    "linear": ("dann", {"coeff_schedule": "linear"}),
    "critic_steps 1": ("dann", {"critic_steps": 1}),
    "critic_steps 3": ("dann", {"critic_steps": 3}),
    "normalised features": ("ablations:NormalisedDANN", {}),
    "betas 0.5, 0.999": ("ablations:BetasDANN", {}),
    "head on stage 3": ("ablations:StageDANN", {}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    add("--first-patient", type=int, default=5200, help="default: %(default)s")
    add("--patients", type=int, default=200, help="70 train and 30 validate, of every 200; default: %(default)s")
    add("--images", type=int, default=4, help="of a patient at each magnification; default: %(default)s")
    add("--width", type=int, default=176, help="of the slides in pixels; default: %(default)s")
    add("--held-out", nargs="+", type=int, default=[40, 400], help="default: 40 400")
    add("--seeds", nargs="+", type=int, default=[0, 1], help="default: 0 1")
    add("--epochs", type=int, default=15, help="default: %(default)s")
    add("--image-size", type=int, default=64, help="default: %(default)s")
    add("--model", default="test_magdg_resnet", help="default: %(default)s")
    add("--learning-rate", type=float, default=3e-3, help="default: %(default)s")
    add("--workers", type=int, default=os.cpu_count(), help="cells at a time, a thread each; default: all cores")
    add("--output-dir", type=Path, default=Path("runs/ablations"), help="default: %(default)s")
    add("--results", type=Path, default=Path(__file__).parent / "results", help="default: %(default)s")
    args = parser.parse_args()
    if args.first_patient + args.patients > 10_000:
        parser.error("patients from 10,000 on are for confirmation: nothing is tried on them")

    from magnification_invariant.data import Folds, load_virtual_slides
    from magnification_invariant.engine import FitConfig
    from magnification_invariant.lomo.cell import Cell
    from magnification_invariant.lomo.grid import run_grid
    from magnification_invariant.report.runs import read_runs

    ds = load_virtual_slides(
        args.patients,
        images_per_magnification=args.images,
        first_patient=args.first_patient,
        size=(args.width, round(args.width * 46 / 70)),
    )
    patients = sorted(set(ds["patient"]))
    n_train, n_val = round(0.35 * len(patients)), round(0.15 * len(patients))
    args.output_dir.mkdir(parents=True, exist_ok=True)
    split = args.output_dir / "split.json"
    sides = np.split(patients, [n_train, n_train + n_val])
    fold = {name: side.tolist() for name, side in zip(("train", "val", "test"), sides, strict=True)}
    Folds([fold]).to_json(split)
    fit = FitConfig(epochs=args.epochs, image_size=args.image_size, learning_rate=args.learning_rate)
    shared = {"split": str(split), "model": args.model, "fit": fit}
    runs = {}
    for title in args.rows:
        method, settings = ROWS[title]
        cells = [Cell(method, m, seed=k, **shared).with_settings(settings) for m in args.held_out for k in args.seeds]
        print(title, flush=True)
        runs[title] = read_runs(run_grid(cells, ds, args.output_dir / title.replace(" ", "_"), workers=args.workers))
    write(args, runs)


def write(args: argparse.Namespace, runs: dict) -> None:
    """`ablations.md`: every row with its intervals over patients and its difference to the default."""
    from magnification_invariant.report.page import markdown_table
    from magnification_invariant.report.runs import difference, estimate

    rows = []
    for title, group in runs.items():
        auc, brier = (estimate(group, metric) for metric in ("auc", "brier"))
        seen = estimate(group, "brier", "test_source").value
        row = [title, f"{estimate(group, 'log_loss', 'val').value:.3f}", f"{auc.value:.3f}", f"{seen:.3f}"]
        row.append(f"{brier.value:.3f}")
        if title == "dann" or "dann" not in runs:
            rows.append([*row, "", ""])
            continue
        d = difference(group, runs["dann"])
        rows.append([*row, f"{d.difference:+.4f} [{d.low:+.4f}, {d.high:+.4f}]", f"{d.p_value:.3f}"])
    head = ["", "validation log-loss", "AUC", "Brier, seen", "Brier", "Brier minus dann's [95 %]", "p"]
    text = f"""# Ablations of adversarial training: exploratory

`python benchmarks/ablations.py {shlex.join(sys.argv[1:])}`

Development slides, {args.patients} patients from {args.first_patient} on, {args.model} at {args.image_size} px,
{args.epochs} epochs; held out in turn {" and ".join(f"{m}X" for m in args.held_out)}; seeds {args.seeds};
every other setting the default, learning rate {args.learning_rate}. AUC and Brier of patients
and a magnification that training did not see ("seen": the same patients at the training magnifications),
patient-balanced, temperature-scaled, mean over runs. Intervals are over patients; p-values are not adjusted, and with
{len(runs)} rows one in twenty is small by chance. Where the interval leaves out 0 and p is large, differences cancel
between the classes (see `metrics.paired_difference`). No default follows from this table.

"""
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "ablations.md").write_text(text + markdown_table(head, rows) + "\n")
    print(f"\n{markdown_table(head, rows)}\n\n{args.results / 'ablations.md'}")


if __name__ == "__main__":
    main()
