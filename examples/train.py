"""Train one model with one magnification held out, and test it there.

    accelerate launch examples/train.py
    accelerate launch examples/train.py --data path/to/BreaKHis_v1 --held-out 40 --method dann --epochs 30

Without arguments: `magdg_resnet18` on virtual slides, 200X held out. Several processes or machines: see docs/train.md.
"""

import argparse
import sys

from accelerate import Accelerator

from magdg import exit_status
from magdg.options import Parser, add_training_arguments, grid_settings
from magdg.sources import add_data_argument, held_out_domains, load_data
from magnification_invariant.data import describe
from magnification_invariant.lomo.grid import make_grid, run_grid
from magnification_invariant.report.table import markdown, summarise
from magnification_invariant.tasks import TASKS


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_argument(parser)
    parser.add_argument("--method", default="dann", help=f"{', '.join(TASKS)} or module:Class; default: %(default)s")
    parser.add_argument("--held-out", default="200", help="magnification (or scanner, ...) to test on (default: 200)")
    parser.add_argument("--fold", type=int, default=0, help="group of patients to test on (default: 0)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--expect-processes", type=int, help="stop unless this many processes take part")
    parser.add_argument("--log-with", help="a tracker of Accelerate: tensorboard, wandb, trackio, ...")
    add_training_arguments(parser)
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    settings = grid_settings(args, [args.method])
    accelerator = Accelerator(
        mixed_precision=settings.get("mixed_precision"),
        log_with=args.log_with,
        project_dir=args.output_dir if args.log_with else None,
    )
    if args.log_with:
        accelerator.init_trackers("magdg")
    if args.expect_processes not in (None, accelerator.num_processes):
        raise ValueError(
            f"{args.expect_processes} processes were expected, {accelerator.num_processes} started: launch with "
            "`torchrun --nproc_per_node N`, or `accelerate launch --multi_gpu --num_processes N`"
        )
    accelerator.print(
        f"{accelerator.num_processes} process(es) on {accelerator.device}, {settings['threads']} CPU thread(s) each"
    )

    with accelerator.main_process_first():  # the slides are drawn, or the folder is read, once
        ds = load_data(args)
    accelerator.print(describe(ds))
    cells = make_grid([args.method], held_out_domains(ds, [args.held_out]), [args.fold], [args.seed], **settings)
    shared = {"accelerator": accelerator, "data_source": args.data, "say": accelerator.print}
    finished = run_grid(cells, ds, args.output_dir, **shared)
    accelerator.end_training()  # trackers write what they still hold

    if accelerator.is_main_process:
        print(markdown(summarise(finished)))
        print(f"\nRecords and the model: {args.output_dir / cells[-1].name}")
    return 0 if len(finished) == len(cells) else 1


if __name__ == "__main__":
    sys.exit(exit_status(main))
