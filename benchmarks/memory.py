"""Memory and time of the loss part against transformers': ``python -m benchmarks.memory``.

The loss part is what follows the decoder: from its hidden states [N, D] over the output projection
[V, D] to the loss, and back to both gradients. transformers: the projection, ``final_logits_bias``
and the ``LabelSmoother`` of its ``Seq2SeqTrainer`` (without smoothing: the model's own
``CrossEntropyLoss``). Ours: ``linear_cross_entropy``; and, where this torch has it, torch's own
``linear_cross_entropy`` in chunks, which knows no smoothing.

Every figure is from a fresh process: inputs are made, a small warm-up runs, then the growth of the
resident set's peak over one forward and backward pass is read from Linux (it includes the
gradients, which all must make), then a second pass is timed. Runs alternate; medians are shown.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers.modeling_outputs import Seq2SeqLMOutput
from transformers.trainer_pt_utils import LabelSmoother

from benchmarks.fresh import MIB, growth_since, process_memory, start_peak
from s2s_scale.loss.linear_cross_entropy import linear_cross_entropy
from s2s_scale.utils import IGNORE_INDEX

TOKENS = (2_048, 8_192)
VOCABULARIES = (32_128, 50_265, 250_054)
WIDTH = 512
ROW = 64
"""Target positions of a row; N tokens are N / 64 rows."""
SAFE_SHARE = 0.6
"""transformers' side runs only where it needs less than this share of the free memory."""
STOCK_COPIES = {0.0: 3, 0.1: 5}
"""About how many tensors of N * V values transformers' side holds at once (to judge the above)."""
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}

Loss = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]


def transformers_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, smoothing: float
) -> Tensor:
    """As BART's forward and ``Trainer.compute_loss`` have it."""
    logits = F.linear(hidden, weight) + bias
    if smoothing:
        smoother = LabelSmoother(epsilon=smoothing)
        return smoother(Seq2SeqLMOutput(logits=logits), labels)  # type: ignore[no-any-return]
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1))


def our_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, smoothing: float
) -> Tensor:
    """What our trainer computes."""
    part = linear_cross_entropy(hidden, weight, labels, bias=bias.view(-1), smoothing=smoothing)
    return part.loss / part.tokens


def torch_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, smoothing: float
) -> Tensor:
    """torch's own, in chunks; in torch 2.13 it falls back to whole logits under smoothing."""
    return F.linear_cross_entropy(  # type: ignore[attr-defined,no-any-return]
        hidden.flatten(0, 1),
        weight,
        labels.flatten(),
        linear_bias=bias.view(-1),
        label_smoothing=smoothing,
        ignore_index=IGNORE_INDEX,
        options=torch.nn.LinearCrossEntropyOptions(),  # type: ignore[attr-defined]
    )


SIDES: dict[str, Loss] = {
    "transformers": transformers_loss,
    "s2s-scale": our_loss,
    "torch": torch_loss,
}


def measure(
    side: str, *, tokens: int, vocabulary: int, smoothing: float, bf16: bool, clock: str
) -> None:
    """In a process of its own: print peak growth in bytes, seconds and the loss, as JSON."""
    generator = torch.Generator().manual_seed(0)
    rows = tokens // ROW
    hidden = torch.randn(rows, ROW, WIDTH, generator=generator).requires_grad_()
    weight = (torch.randn(vocabulary, WIDTH, generator=generator) * WIDTH**-0.5).requires_grad_()
    bias = torch.zeros(1, vocabulary)
    labels = torch.randint(0, vocabulary, (rows, ROW), generator=generator)

    def run(first: int) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = SIDES[side](hidden[:first], weight, bias, labels[:first], smoothing)
        loss.backward()
        value = loss.item()
        hidden.grad = weight.grad = None
        return value

    run(1)
    before = start_peak()
    value = run(rows)
    peak = growth_since(before)
    started = CLOCKS[clock]()
    run(rows)
    seconds = CLOCKS[clock]() - started
    print(json.dumps({"bytes": peak, "seconds": seconds, "loss": value}))


def in_fresh_process(side: str, options: dict[str, str]) -> dict[str, float]:
    """What ``measure`` prints in a process of its own."""
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", "--measure", side, *words],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{side} {options}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def fits(tokens: int, vocabulary: int, smoothing: float) -> bool:
    """Whether transformers' side can run here without pushing anything out of memory."""
    need = STOCK_COPIES[smoothing] * tokens * vocabulary * 4
    return need < SAFE_SHARE * process_memory("MemAvailable")


def case(tokens: int, vocabulary: int, options: argparse.Namespace) -> list[str]:
    """A row of the table."""
    words = {"vocabulary": str(vocabulary), "smoothing": str(options.smoothing)}
    words |= {"precision": options.precision, "clock": options.clock}
    smaller = tokens
    while not fits(smaller, vocabulary, options.smoothing):
        smaller //= 2
    sides = ["transformers", "s2s-scale"]
    if hasattr(F, "linear_cross_entropy") and not options.smoothing:
        sides.append("torch")
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for _ in range(options.repeats):
        for side in sides:
            count = smaller if side == "transformers" else tokens
            found[side].append(in_fresh_process(side, words | {"tokens": str(count)}))
    if smaller == tokens:
        losses = [runs[0]["loss"] for runs in found.values()]
        bound = 1e-5 if options.precision == "fp32" else 1e-2
        assert max(losses) - min(losses) <= bound * abs(losses[0]), losses
    middle = {
        (side, key): statistics.median(run[key] for run in runs)
        * (tokens / smaller if side == "transformers" else 1)
        for side, runs in found.items()
        for key in ("bytes", "seconds")
    }
    return _cells(tokens, vocabulary, middle, scaled=smaller != tokens)


def _cells(
    tokens: int, vocabulary: int, middle: dict[tuple[str, str], float], *, scaled: bool
) -> list[str]:
    mark = "*" if scaled else ""
    stock, own = middle["transformers", "bytes"], middle["s2s-scale", "bytes"]
    stock_s, own_s = middle["transformers", "seconds"], middle["s2s-scale", "seconds"]
    torch_cell = ""
    if ("torch", "bytes") in middle:
        torch_cell = f"{middle['torch', 'bytes'] / MIB:,.0f} / {middle['torch', 'seconds']:.2f}"
    return [
        f"{tokens:,}",
        f"{vocabulary:,}",
        f"{stock / MIB:,.0f}{mark}",
        f"{own / MIB:,.0f}",
        f"1/{stock / own:.1f}{mark}",
        f"{stock_s:.2f}{mark}",
        f"{own_s:.2f}",
        f"{own_s / stock_s:.2f}{mark}",
        torch_cell,
    ]


def main() -> None:
    """Print the table, or measure one case."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--measure", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="N")
    parser.add_argument("--vocabulary", type=int, nargs="+", default=VOCABULARIES, help="V")
    parser.add_argument("--smoothing", type=float, default=0.1, choices=STOCK_COPIES)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument(
        "--clock",
        default="wall",
        choices=CLOCKS,
        help="cpu: seconds of all threads together, where others use the machine as well",
    )
    parser.add_argument("--repeats", type=int, default=5, help="alternations (5)")
    parser.add_argument("--quick", action="store_true", help="one alternation, N = 2,048")
    options = parser.parse_args()
    if options.measure:
        measure(
            options.measure,
            tokens=options.tokens[0],
            vocabulary=options.vocabulary[0],
            smoothing=options.smoothing,
            bf16=options.precision == "bf16",
            clock=options.clock,
        )
        return
    if options.quick:
        options.repeats, options.tokens = 1, TOKENS[:1]
    table = Table(
        title=f"loss part, D {WIDTH}, smoothing {options.smoothing:g}, {options.precision}, "
        f"{torch.get_num_threads()} threads, {options.clock} time, torch {torch.__version__}, "
        f"median of {options.repeats}"
    )
    heads = ("N", "V", "transformers MiB", "ours MiB", "ratio", "transformers s", "ours s", "ratio")
    for head in (*heads, "torch's own MiB / s"):
        table.add_column(head, justify="right")
    for tokens in options.tokens:
        for vocabulary in options.vocabulary:
            table.add_row(*case(tokens, vocabulary, options))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    print("*: too large for this machine; measured on a part of the tokens and scaled up")


if __name__ == "__main__":
    main()
