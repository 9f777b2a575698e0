"""``magdg``: one file a command. A command checks its arguments, composes what the package offers, computes nothing.

A command's file is imported when it is called, and what it composes when it runs, so that help and mistakes are
answered at once.
"""

import argparse
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from importlib import import_module

COMMANDS = {
    "demo": "the whole path on virtual slides, in a few minutes on a CPU",
    "prepare": "check a copy of BreaKHis",
    "split": "write patient folds to a file that --split reads",
    "embed": "write the embeddings of images by any timm network",
    "lomo": "train and test methods on a magnification they never saw",
    "zoom": "predict tested patients at one scale after the other",
    "report": "write a report on finished runs: HTML, Markdown and PNG",
    "evaluate": "evaluate a model on data, or anyone's table of predictions",
    "predict": "predict files, folders, a data set or whole slides with a trained model",
    "export": "write a model as ONNX, in 32 or 8 bits",
    "explain": "draw what in an image speaks for a class",
    "app": "predict in the browser",
    "search": "find similar cases by signature",
    "push": "publish a finished run on the Hugging Face Hub",
    "pull": "fetch a model from the Hub into a folder",
    "doctor": "check a model folder or Hub repository on this machine",
}

# Of modules that come with an extra only: its name.
EXTRAS = {"gradio": "app", "openvino": "openvino", "h5py": "hdf5", "openslide": "wsi"}
EXTRAS |= dict.fromkeys(("onnx", "onnxscript", "onnxruntime"), "onnx")


class Terminated(KeyboardInterrupt):
    """SIGTERM came. It ends a command, and the workers that this has started, as Ctrl-C does."""


def main(argv: list[str] | None = None) -> int:
    """Run ``magdg``; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        return exit_status(lambda: _run(argv[0], argv[1:]))
    if argv[:1] == ["--version"]:
        from importlib.metadata import version

        print(version("magnification-invariant"))
        return 0
    parser = argparse.ArgumentParser(prog="magdg", description="Classifiers that survive an unseen magnification.")
    parser.add_argument("--version", action="store_true", help="show the version and end")
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, line in COMMANDS.items():
        commands.add_parser(name, help=line)
    parser.parse_args(argv)  # shows help, or says what is wrong, and ends
    parser.error("the command comes first")


def _run(name: str, argv: list[str]) -> int:
    command = import_module(f"magdg.{name}")
    parser = getattr(command, "Parser", argparse.ArgumentParser)(prog=f"magdg {name}", description=command.__doc__)
    command.add_arguments(parser)
    return command.execute(parser.parse_args(argv))


def exit_status(execute: Callable[[], int | None]) -> int:
    """What `execute` returns; else, with a line that says why, 2 for bad input, 130 for Ctrl-C, 143 for SIGTERM."""
    in_main_thread = threading.current_thread() is threading.main_thread()  # elsewhere no signal can be handled
    python_handler = signal.signal(signal.SIGTERM, _terminate) if in_main_thread else None
    python_format, warnings.formatwarning = warnings.formatwarning, lambda text, *_, **__: f"magdg: warning: {text}\n"
    try:
        return execute() or 0
    except KeyboardInterrupt as error:
        status, word = (143, "terminated") if isinstance(error, Terminated) else (130, "interrupted")
        print(f"\n{word}; the same command goes on where this one stopped", file=sys.stderr)
        return status
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        hint = "" if "pip install" in str(error) else f": pip install 'magnification-invariant[{EXTRAS[error.name]}]'"
        print(f"magdg: error: {error}{hint}", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:  # bad input: the message says what, where and what to do
        print(f"magdg: error: {error}", file=sys.stderr)
        return 2
    finally:
        warnings.formatwarning = python_format
        if in_main_thread:
            signal.signal(signal.SIGTERM, python_handler or signal.SIG_DFL)


def _terminate(signum, frame):
    signal.signal(signum, signal.SIG_IGN)  # it comes once to each process of a group, and once more from its launcher
    raise Terminated
