"""A user's mistake ends a program with one sentence and exit status 2, in one process or many."""
import contextlib
import os
import sys
import traceback

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from runtime import parallel

PHASES = {"from_pretrained": "loading", "working_copy": "loading", "sample": "sampling",
          "score": "scoring"}  # by function; else the update

@contextlib.contextmanager
def user_errors():
    """Turn ValueError, OSError and a GPU's out of memory into one sentence and exit status 2. With
    several processes all of them show what ended the first. SA_TRACEBACK=1 shows where."""
    try:
        yield
        if dist.is_initialized():
            dist.destroy_process_group()
            leave(0)
    except KeyboardInterrupt:  # before the run has begun; later a signal finishes the step first
        sys.exit(130)
    except (ValueError, OSError, SafetensorError, torch.OutOfMemoryError) as error:
        if os.environ.get("SA_TRACEBACK"):
            raise
        text = out_of_memory(error) if isinstance(error, torch.OutOfMemoryError) else str(error)
        if isinstance(error, OSError) and error.strerror and error.filename:
            text = f"{error.strerror}: {error.filename}"
        if dist.is_initialized():
            end_all(text, 2)
        print(f"error: {text}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        if dist.is_initialized():
            end_all(f"{type(error).__name__}: {error}", 1, traceback.format_exc())
        raise


def out_of_memory(error) -> str:
    """Where it ended, by the functions that ran, and the flag to turn first."""
    running = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    phases = [PHASES[name] for name in running if name in PHASES] or ["the update"]
    return (f"the GPU's memory ended in {phases[0]}, after a peak of "
            f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB: turn on --recompute first, then "
            "--offload, then lower --micro-tokens (in sampling: --slots)")


def end_all(text: str, status: int, details: str = ""):
    """End this process. The first that fails leaves its message in the store: the collectives of
    the others then fail too, and rank 0 shows that message. torchrun stops those that still run."""
    rank, _ = parallel.processes()
    own = f"process {rank}: {text}"
    try:
        first = parallel.store.compare_set("failure", "", own).decode()
    except RuntimeError:  # the store is gone, and so is the machine that held it
        first = own
    if first == own:
        print(f"{details}error: {own}", file=sys.__stderr__)
    elif rank == 0:
        print(f"error: ended by {first}", file=sys.__stderr__)
    if sys.stderr is not sys.__stderr__:  # the log of this process
        print(f"{details}error: {text}", file=sys.stderr)
    leave(status)  # does not wait for collectives that are under way


def leave(status: int):
    """Skip interpreter shutdown, in which a thread of gloo or NCCL sometimes aborts the process."""
    sys.stdout.flush()  # stderr is flushed at every line
    os._exit(status)
