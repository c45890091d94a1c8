"""Several ranks on this machine's CPU (gloo): how a placement is tested, and tried without GPUs."""

import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(function: Callable[..., Any], ranks: int, *args: Any, timeout_s: float = 300.0) -> list[Any]:
    """Call `function(*args)` in `ranks` fresh processes that share a gloo group; returns their results by rank.

    `function` must be importable (a module-level function); arguments are pickled, results must be tensors or plain
    containers of them. Raises RuntimeError with the rank's traceback when one fails, TimeoutError after `timeout_s`.
    """
    with tempfile.TemporaryDirectory(prefix="kinora-ranks-") as folder:
        context = mp.spawn(_rank, (ranks, folder, timeout_s, function, args), nprocs=ranks, join=False)
        deadline = time.monotonic() + timeout_s
        try:
            while not context.join(timeout=max(0.1, deadline - time.monotonic())):
                if time.monotonic() >= deadline:
                    raise TimeoutError(f"{ranks} ranks of {function.__name__} did not finish in {timeout_s:.0f} s")
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as failure:
            reports = sorted(Path(folder).glob("*.error"), key=lambda file: file.stat().st_mtime_ns)
            reason = reports[0].read_text() if reports else str(failure)  # later ranks only lost their peer
            raise RuntimeError(f"a rank of {function.__name__} failed:\n{reason}") from failure
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
                process.join()
        return [torch.load(Path(folder) / f"rank{rank}.pt", weights_only=True) for rank in range(ranks)]


def _rank(rank: int, ranks: int, folder: str, timeout_s: float, function: Callable[..., Any], args: Any) -> None:
    """Body of one process: join the group, run, leave the result where the parent looks for it."""
    torch.set_num_threads(1)
    os.environ.setdefault(
        "GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0"
    )  # host names may not resolve
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=timeout_s),
    )
    try:
        torch.save(function(*args), Path(folder) / f"rank{rank}.pt")
    except BaseException:
        (Path(folder) / f"rank{rank}.error").write_text(f"rank {rank}: {traceback.format_exc()}")
        raise
    finally:
        dist.destroy_process_group()
