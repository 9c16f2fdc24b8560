"""How the commands end: signals, a full disk or memory, a closed pipe; each told in one line, with an exit status."""
import os
import signal
import sys
import threading

import torch
from tqdm import tqdm

from util import device as machine
from util import dist
from util.errors import UserError, as_argument, print_error, reason


class Interrupted(KeyboardInterrupt):
    """The first Ctrl-C or SIGTERM, with its number. Nothing needs saving: every epoch ends with a whole checkpoint."""

    @classmethod
    def handle(cls, signum, frame):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
        raise cls(signum)


def open_output() -> None:
    """Make standard output and error take what is printed: nothing where the caller closed them, and every letter of a name."""
    tqdm.set_lock(threading.RLock())  # its own is for several processes too; from Python 3.14 on, another one watches over that
    if sys.stdout is None:
        discard_output()
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # tqdm writes to it
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # names that the terminal's encoding lacks


def discard_output() -> None:
    """Print nothing from here on. After an error of standard output, or the exit would fail at it again."""
    sys.stdout = open(os.devnull, "w")


def train_and_report(run, argv: list[str]) -> int:
    """Call run(argv, progress) and return the exit status. progress["run_dir"]: the run that --resume can continue, or None."""
    in_main_thread = threading.current_thread() is threading.main_thread()  # elsewhere, signals are not ours to handle
    handlers = {number: signal.signal(number, Interrupted.handle) for number in (signal.SIGINT, signal.SIGTERM)
                if in_main_thread and signal.getsignal(number) != signal.SIG_IGN}  # as in a script's background jobs
    try:
        return run_between_handlers(run, argv, list(handlers))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def run_between_handlers(run, argv: list[str], signals: list[int]) -> int:
    """The part of train_and_report while its signals are handled; prints one line where the command ends early."""
    machine.name_user()
    open_output()
    progress, status, stopped = {"run_dir": None}, 2, ""
    too_large = "--batch-size: the memory does not hold it; choose a smaller one"
    try:
        try:
            dist.init()
            if dist.rank() > 0:
                discard_output()  # rank 0 prints for all
            run(argv, progress)
            dist.barrier()
            return 0
        finally:
            for number in signals:
                signal.signal(number, signal.SIG_IGN)  # torchrun ends the others where one has died: not before their message
    except UserError as error:
        message = str(error)
    except OSError as error:
        stopped = f"{error.filename or 'output'}: {error.strerror or error} (to be fixed first)"
        if isinstance(error, BrokenPipeError):
            discard_output()
    except (torch.OutOfMemoryError, MemoryError):
        message = too_large
    except RuntimeError as error:
        # gloo raises plain RuntimeErrors
        if isinstance(error, torch.distributed.DistError) or ("RANK" in os.environ and "gloo" in str(error)):
            stopped = "torchrun: one of the processes ended before the training did"
        elif "allocate memory" in str(error):  # torch's CPU allocator has no type of its own for it
            message = too_large
        elif type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            message = (f"--compile: torch cannot compile here ({reason(error)}); install a C++ compiler and Python's headers "
                       f"(Debian: g++ python3-dev), or leave it out")
        else:
            raise
    except Interrupted as interruption:
        stopped, status = "interrupted", 128 + interruption.args[0]
    if stopped:
        message = f"{stopped}; no training had begun, the same command starts again"
        if run_dir := progress["run_dir"]:
            message = (f"{stopped}; all whole epochs are saved; continue with: {dist.launcher()} training.py --resume "
                       f"{as_argument(run_dir)}")
    if dist.claim_message():
        print_error("training.py" if status == 2 else "\ntraining.py", message)  # on a line of its own, after the terminal's ^C
    return status
