"""The words for torchrun, which is started on each host by itself."""

from __future__ import annotations

import socket
import sys
from collections.abc import Mapping

from s2s_scale.errors import UserError
from s2s_scale.launch.description import Launch, Rank
from s2s_scale.launch.this_host import device_of, local_devices, rank_environment, rendezvous_port
from s2s_scale.launch.wishes import Wishes
from s2s_scale.profiles import LauncherProfile

TORCHRUN_PORT = 29500


def torchrun(
    profile: LauncherProfile,
    words: tuple[str, ...],
    environ: Mapping[str, str],
    wishes: Wishes,
) -> Launch:
    """torchrun on this host; with ``--num_nodes`` as one of the hosts on which it is started."""
    nodes, node = wishes.num_nodes or 1, wishes.node_rank or 0
    _check_node(wishes)
    places = local_devices(profile, environ, wishes)
    notes: tuple[str, ...] = ()
    rendezvous = ["--standalone"]
    if nodes > 1 or wishes.master_port or wishes.master_addr:
        port = wishes.master_port or TORCHRUN_PORT
        if nodes == 1:
            port, notes = rendezvous_port(wishes)
        address = wishes.master_addr or "127.0.0.1"
        rendezvous = [f"--nnodes={nodes}", f"--node-rank={node}"]
        rendezvous += [f"--master-addr={address}", f"--master-port={port}"]
    program = (sys.executable, "-m", "s2s_scale.torchrun")
    flags = (*rendezvous, f"--nproc-per-node={len(places)}", "-m", "s2s_scale")
    host = socket.gethostname()
    return Launch(
        command=(*program, *flags, *words),
        environment=rank_environment(profile, environ, len(places)),
        ranks=tuple(
            Rank(rank=node * len(places) + number, host=host, device=device_of(profile, name))
            for number, name in enumerate(places)
        ),
        in_process=False,
        notes=notes,
    )


def _check_node(wishes: Wishes) -> None:
    """``--num_nodes`` with torchrun needs to know which of them this is, and where the first is."""
    if (wishes.num_nodes or 1) == 1:
        return
    missing = [name for name in ("node_rank", "master_addr") if getattr(wishes, name) is None]
    if missing:
        raise UserError(
            f"--num_nodes {wishes.num_nodes}: torchrun is started on each host and also needs "
            + " and ".join(f"--{name}" for name in missing)
        )
    if not 0 <= int(wishes.node_rank or 0) < int(wishes.num_nodes or 1):
        raise UserError(
            f"--node_rank {wishes.node_rank}: expected 0 to {int(wishes.num_nodes or 1) - 1}"
        )
