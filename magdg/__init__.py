"""``magdg``: one file a command. A command checks its arguments, composes what the package offers, computes nothing."""

import argparse
import sys
import warnings

from magdg import (
    app,
    demo,
    doctor,
    evaluate,
    explain,
    export,
    lomo,
    predict,
    prepare,
    pull,
    push,
    report,
    search,
    split,
    zoom,
)
from magnification_invariant._version import __version__

COMMANDS = {
    "demo": demo,
    "prepare": prepare,
    "split": split,
    "lomo": lomo,
    "zoom": zoom,
    "report": report,
    "evaluate": evaluate,
    "predict": predict,
    "export": export,
    "explain": explain,
    "app": app,
    "search": search,
    "push": push,
    "pull": pull,
    "doctor": doctor,
}

# Of modules that come with an extra only: its name.
EXTRAS = {"captum": "explain", "gradio": "app", "onnx": "onnx", "onnxscript": "onnx", "onnxruntime": "onnx"}
EXTRAS |= {"openvino": "openvino"}


def main(argv: list[str] | None = None) -> int:
    """Run ``magdg``; returns the exit status."""
    parser = argparse.ArgumentParser(prog="magdg", description="Classifiers that survive an unseen magnification.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.HELP, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    python_way, warnings.formatwarning = warnings.formatwarning, lambda text, *_, **__: f"magdg: warning: {text}\n"
    try:
        return args.run(args) or 0
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on where this one stopped", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        print(f"magdg: error: {error}: pip install 'magnification-invariant[{EXTRAS[error.name]}]'", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:  # bad input: the message says what, where and what to do
        print(f"magdg: error: {error}", file=sys.stderr)
        return 2
    finally:
        warnings.formatwarning = python_way
