"""Runs a function on several gloo ranks, with a deadline that nothing outlives.

Ranks are forked from a server that has imported everything once, meet through a file (no port to
be taken), and are killed when one of them fails or time is up; what each one was doing then is in
the error. A test never waits for a rank that hangs.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_PRELOAD = [
    "torch",
    "torch._dynamo",
    "torch.distributed._functional_collectives",
    "torch.distributed.tensor",
    "transformers",
    "moeify.api",
    "tests.zoo_models",
    "tests.distributed.ranks",
    "tests.distributed.warm",
]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(_PRELOAD)

DEADLINE = 240.0
"""Seconds for one call of `run_ranks`, far above what any test needs."""


def run_ranks(
    function: Callable[..., Any],
    world: int,
    *args: Any,
    deadline: float = DEADLINE,
    timeout: float = 60.0,
    dies: tuple[int, ...] = (),
) -> list[Any]:
    """Call `function(rank, *args)` in `world` processes of one gloo group.

    Args:
        function: A module-level function.
        world: Number of ranks.
        args: Its arguments after the rank; must pickle.
        deadline: Seconds after which all ranks are killed.
        timeout: Seconds after which a collective fails.
        dies: Ranks that are expected to be killed; their result is None.

    Returns:
        What each rank returned, by rank.

    Raises:
        AssertionError: A rank failed, died or was still running; says what it was doing.
    """
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            SERVER.Process(
                target=_rank, args=(function, rank, world, args, folder, timeout), daemon=True
            )
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        late = _wait(ranks, time.monotonic() + deadline, dies)
        problems = []
        results: list[Any] = [None] * world
        for rank, process in enumerate(ranks):
            log = Path(folder, f"{rank}.stacks")
            answer = Path(folder, f"{rank}.answer")
            if answer.exists():
                fine, results[rank] = pickle.loads(answer.read_bytes())
                if not fine:
                    problems.append(f"rank {rank} raised\n{results[rank]}")
            elif rank not in dies:
                state = "was stopped" if rank in late else f"ended with {process.exitcode}"
                problems.append(f"rank {rank} {state}\n{log.read_text()[-6000:]}")
    if problems:
        problems.sort(key=lambda text: "raised" not in text.split("\n", 1)[0])
        raise AssertionError("\n".join(problems))
    return results


def _wait(ranks: list[Any], end: float, dies: tuple[int, ...]) -> set[int]:
    """Wait until all ranks have ended; stop them at the deadline, or soon after one failed."""
    running = dict(enumerate(ranks))
    while running and (left := end - time.monotonic()) > 0:
        multiprocessing.connection.wait([p.sentinel for p in running.values()], left)
        for rank in [r for r, p in running.items() if not p.is_alive()]:
            process = running.pop(rank)
            process.join()
            if process.exitcode and rank not in dies:
                end = min(end, time.monotonic() + 5.0)  # its peers may say more
    for process in running.values():
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGABRT)  # faulthandler writes the stacks
    for process in running.values():
        process.join(10)
        process.kill()
        process.join()
    return set(running)


def _rank(
    function: Callable[..., Any],
    rank: int,
    world: int,
    args: tuple[Any, ...],
    folder: str,
    timeout: float,
) -> None:
    stacks = open(Path(folder, f"{rank}.stacks"), "w")  # noqa: SIM115  open until the end
    faulthandler.enable(stacks)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # no host name to resolve
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    torch.manual_seed(0)
    failed = False
    try:
        store = dist.FileStore(str(Path(folder, "store")), world)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout)
        )
        answer = (True, function(rank, *args))
    except BaseException:
        failed = True
        answer = (False, traceback.format_exc())
    temporary = Path(folder, f"{rank}.part")
    temporary.write_bytes(pickle.dumps(answer))
    temporary.rename(Path(folder, f"{rank}.answer"))
    stacks.flush()
    os._exit(1 if failed else 0)  # no teardown: a broken group must not keep a rank alive
