"""A client of the loopback Hub: Python text, run in a process that starts warm (torch is imported already).

Libraries read the Hub's address when they are imported, so a client is a process of its own; forked from one server
process that has imported what does not read it, it costs a fraction of a fresh interpreter.
"""

import multiprocessing
import os
import sys
from pathlib import Path

from hub_server import HubServer

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torchvision", "torch.fx", "numpy", "scipy.special", "PIL.Image", "pyarrow"])

# What every client starts with. `fault` is `HubServer.fail`, over the wire.
_PRELUDE = """
import json, os, time, urllib.request
from pathlib import Path

time.sleep = lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.01))  # the Hub's client waits between tries

def fault(pattern=None, what=None, times=1):  # without a pattern all is well again
    content = json.dumps({"pattern": pattern, "what": what, "times": times} if pattern else {}).encode()
    urllib.request.urlopen(urllib.request.Request(os.environ["HF_ENDPOINT"] + "/faults", content)).read()

def refused(what, *arguments, **options):
    try:
        what(*arguments, **options)
    except (OSError, ValueError) as error:
        print("REFUSED", str(error).splitlines()[0])
    else:
        raise AssertionError(f"{what} did not fail")
"""


def start_client(hub: HubServer, folder: Path, code: str, **env: str) -> multiprocessing.Process:
    """Starts Python text as a client of the Hub, in `folder`; its output goes to `folder`/printed.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= hub.env(folder / "home") | env
    process = _CONTEXT.Process(target=_run, args=(_PRELUDE + code, environment, folder))
    process.start()
    return process


def run_client(hub: HubServer, folder: Path, code: str, **env: str) -> str:
    """Runs Python text as a client of the Hub, in `folder`; gives back what it prints."""
    process = start_client(hub, folder, code, **env)
    process.join(600)
    printed = (folder / "printed.txt").read_text()
    assert process.exitcode == 0, printed
    return printed


def _run(code: str, env: dict[str, str], folder: Path) -> None:
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    output = os.open("printed.txt", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    assert "huggingface_hub" not in sys.modules  # it would have read another address
    exec(compile(code, "<client>", "exec"), {"__name__": "client"})
