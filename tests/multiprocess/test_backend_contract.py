"""Every registered backend keeps what ``Backend`` promises, in one process and on two ranks."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from s2s_scale.backends import BACKENDS
from tests.support.worker import run_ranks

LIBRARIES = {"fairscale_oss": "fairscale", "deepspeed": "deepspeed", "xla": "torch_xla"}
# torch-xla needs a torch of its own: each environment holds the backends that it has.
HERE = [name for name in sorted(BACKENDS) if find_spec(LIBRARIES.get(name, "torch"))]
# Under SPMD one process drives all devices of a host.
CASES = [(name, ranks) for name in HERE for ranks in (1, 2) if (name, ranks) != ("xla", 2)]


@pytest.mark.parametrize(("name", "ranks"), CASES)
def test_contract(tmp_path, name, ranks):
    job = {"backend": "xla:data" if name == "xla" else name}
    run_ranks("tests.support.contract:work", job, ranks=ranks, folder=tmp_path)
