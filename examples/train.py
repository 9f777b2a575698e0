"""Train one model with one magnification held out, and test it there.

    accelerate launch examples/train.py
    accelerate launch examples/train.py --data path/to/BreaKHis_v1 --held-out 40 --method dann --epochs 30

Without arguments: `magdg_resnet18` on virtual slides, 200X held out. Several processes or machines: see the README.
"""

import argparse

from accelerate import Accelerator

from magdg.arguments import (
    add_data_argument,
    add_training_arguments,
    cell_arguments,
    held_out_domains,
    load_data,
)
from magnification_invariant.data import describe
from magnification_invariant.lomo.cell import Cell
from magnification_invariant.lomo.grid import run_grid
from magnification_invariant.report.table import markdown, summarise
from magnification_invariant.tasks import TASKS
from magnification_invariant.tasks.floors import FLOORS


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_argument(parser)
    parser.add_argument("--method", help=f"{', '.join(TASKS)} or module:Class; default: dann, or what --model is for")
    parser.add_argument("--held-out", default="200", help="magnification (or scanner, ...) to test on (default: 200)")
    parser.add_argument("--fold", type=int, default=0, help="group of patients to test on (default: 0)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--expect-processes", type=int, help="stop unless this many processes take part")
    parser.add_argument("--log-with", help="a tracker of Accelerate: tensorboard, wandb, trackio, ...")
    add_training_arguments(parser)
    args = parser.parse_args()
    if args.method is None:
        args.method = next((name for name, task in TASKS.items() if task.arch == args.model), "dann")
    return args


def main() -> None:
    args = parse_args()
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        log_with=args.log_with,
        project_dir=args.output_dir if args.log_with else None,
    )
    if args.log_with:
        accelerator.init_trackers("magdg")
    if args.expect_processes not in (None, accelerator.num_processes):
        raise SystemExit(
            f"{args.expect_processes} processes were expected, {accelerator.num_processes} started: launch with "
            "`torchrun --nproc_per_node N`, or `accelerate launch --multi_gpu --num_processes N`"
        )
    accelerator.print(
        f"{accelerator.num_processes} process(es) on {accelerator.device}, {args.threads} CPU thread(s) each"
    )

    with accelerator.main_process_first():  # the slides are drawn, or the folder is read, once
        ds = load_data(args)
    held_out = held_out_domains(ds, [args.held_out])[0]
    accelerator.print(describe(ds))
    arguments = cell_arguments(args)
    cells = [Cell(method, held_out, args.fold, seed=0, **arguments) for method in FLOORS]
    cells += [Cell(args.method, held_out, args.fold, args.seed, **arguments)]
    finished = run_grid(cells, ds, args.output_dir, accelerator=accelerator, say=accelerator.print)
    accelerator.end_training()  # trackers write what they still hold

    if accelerator.is_main_process:
        print(markdown(summarise(finished)))
        print(f"\nRecords and the model: {args.output_dir / cells[-1].name}")


if __name__ == "__main__":
    main()
