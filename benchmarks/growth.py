"""Whether time and memory grow no faster than the data: a grid on embeddings, a report, a search, at 1, 4 and 16 times
the rows; and how long a whole grid on as many embeddings as BreaKHis has images takes.

    python benchmarks/growth.py                 # time and peak memory, and the exponent of the growth
    python benchmarks/growth.py --grid FOLDER   # 440 cells on 7,909 x 1,024 vectors, and their report

Every measurement is a process of its own: CPU seconds and the most memory that it held, without what importing takes.
"""

import argparse
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

FACTORS = (1, 4, 16)
GRID = "--methods l2 erm dann cdann coral --held-out 40 100 200 400 --folds 0 1 2 3 4 --n-folds 5 --seeds 0 1 2 3 4"


def vectors(path: Path, rows: int, width: int, patients: int = 82, seed: int = 0) -> None:
    """Writes embeddings of patients at four magnifications: a class signal, patients' and domains' effects, noise."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(seed)
    patient, domain = np.arange(rows) % patients, np.arange(rows) // patients % 4
    x = rng.standard_normal((rows, width), np.float32) + 0.6 * rng.standard_normal((patients, width))[patient]
    x += 2.0 * rng.standard_normal((4, width))[domain] / math.sqrt(width)
    x[:, 0] += 2.0 * (patient % 2 - 0.5)
    columns = {"id": [str(row) for row in range(rows)], "patient": patient.astype(str)}
    columns |= {
        "label": np.where(patient % 2, "malignant", "benign"),
        "magnification": np.array([40, 100, 200, 400])[domain],
    }
    columns["embedding"] = pa.FixedSizeListArray.from_arrays(pa.array(x.astype(np.float32).ravel()), width)
    pq.write_table(pa.table(columns), path)


def cell(factor: int, folder: Path) -> Callable[[], object]:
    """A cell of DANN and one of ERM on embeddings."""
    from magnification_invariant.data.vectors import load_embeddings
    from magnification_invariant.engine import FitConfig
    from magnification_invariant.lomo.embedded import VECTOR_FIT
    from magnification_invariant.lomo.grid import make_grid, run_grid

    vectors(folder / "e.parquet", 1000 * factor, 256, 80 * factor)
    cells = make_grid(["erm", "dann"], [200], [0], [0], n_folds=5, model="mag_hidden", fit=FitConfig(**VECTOR_FIT))
    return lambda: run_grid(cells, load_embeddings(folder / "e.parquet"), folder / "runs", say=lambda text: None)


def report(factor: int, folder: Path) -> Callable[[], object]:
    """A report on eight runs."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from fabricated import write_run

    from magnification_invariant.report.contents import sections

    for held_out in (40, 100, 200, 400):
        for method, skill in (("erm", 0.8), ("dann", 1.3)):
            write_run(folder, method, held_out, skill=skill, scaled=1.0, patients=24 * factor)
    return lambda: list(sections(sorted(folder.iterdir())))


def search(factor: int, folder: Path) -> Callable[[], object]:
    """The 5 nearest of 5,000 cases, of 64 queries."""
    from magnification_invariant.predict.search import nearest, unit

    rng = np.random.default_rng(0)
    gallery, queries = (unit(rng.standard_normal((n, 32))).astype(np.float32) for n in (5000 * factor, 64))
    patients = np.arange(len(gallery)) // 10
    return lambda: nearest(queries, gallery, 5, np.arange(64), patients)


PARTS = {"cells on embeddings": cell, "report": report, "search": search}


def megabytes(name: str) -> float:
    """Of this process, as Linux names it: VmRSS now, VmHWM at most."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1e3


def measure(part: str, factor: int) -> None:
    """In a process of its own: prints CPU seconds and megabytes above what was there before."""
    with tempfile.TemporaryDirectory() as folder:
        warm, data = (Path(folder, name) for name in ("warm", "data"))
        for each in (warm, data):
            each.mkdir()
        PARTS[part](1, warm)()  # imports, and what is made once
        work = PARTS[part](factor, data)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        before, started = megabytes("VmRSS"), time.process_time()
        work()
        print(json.dumps({"seconds": time.process_time() - started, "mb": megabytes("VmHWM") - before}))


def exponent(values: list[float]) -> float:
    """Of the power of `FACTORS` that fits best; 1 is linear."""
    return float(np.polyfit(np.log(FACTORS), np.log(np.maximum(values, 1e-9)), 1)[0])


def growth() -> str:
    from magnification_invariant.report.page import markdown_table

    lines = []
    for part in PARTS:
        found = []
        for factor in FACTORS:
            words = [sys.executable, __file__, "--measure", part, str(factor)]
            done = subprocess.run(words, capture_output=True, text=True, check=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
            print(part, factor, found[-1], flush=True)
        for name, unit in (("seconds", "CPU seconds"), ("mb", "MB above the start")):
            values = [each[name] for each in found]
            lines.append([part, unit, *(f"{value:.2f}" for value in values), f"{exponent(values):.2f}"])
    return markdown_table(["", "", *(f"{factor} x" for factor in FACTORS), "exponent"], lines)


def whole_grid(folder: Path) -> str:
    """The 440 cells and their report, by the commands that anybody would type."""
    vectors(folder / "embeddings.parquet", 7909, 1024)
    lines = []
    for command in (
        f"magdg lomo --embeddings embeddings.parquet {GRID} --workers 2 --output-dir runs",
        "magdg report runs --output-dir report",
    ):
        started = time.monotonic()
        subprocess.run([sys.executable, "-m", *shlex.split(command)], cwd=folder, check=True)
        lines.append(f"    {command}\n    # {(time.monotonic() - started) / 60:.1f} min")
    cells = sum(1 for path in (folder / "runs").glob("*/results.json"))
    return f"{cells} cells:\n\n" + "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--grid", type=Path, metavar="FOLDER", help="run the whole grid there; it goes on if it was cut"
    )
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure[0], int(args.measure[1]))
        return
    load = os.getloadavg()[0]
    if args.grid:
        args.grid.mkdir(parents=True, exist_ok=True)
    text = whole_grid(args.grid) if args.grid else growth()
    print(f"{platform.machine()}, {os.cpu_count()} cores, load at the start {load:.1f}\n\n{text}")


if __name__ == "__main__":
    main()
