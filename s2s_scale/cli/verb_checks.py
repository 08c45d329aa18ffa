"""What each verb checks of the values that it is given, before any work."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from s2s_scale.cli.verb_options import DATA_SOURCES

# Options of generate that do nothing unless another is given too.
NEEDS_ANOTHER = {
    "metrics": "reference",
    "search": "reference",
    "temperature": "do_sample",
    "top_k": "do_sample",
    "top_p": "do_sample",
}


def check_train(given: Mapping[str, Any]) -> list[str]:
    return _data_problems(given, *DATA_SOURCES) + check_launch(given)


def check_evaluate(given: Mapping[str, Any]) -> list[str]:
    file = "validation_file" if given.get("split") == "val" else "test_file"
    return _data_problems(given, "data_dir", file, "dataset_name") + check_launch(given)


def check_generate(given: Mapping[str, Any]) -> list[str]:
    problems = []
    for name in ("input", "reference"):
        path = given.get(name)
        if path not in (None, "-") and not Path(path).is_file():
            problems.append(f"--{name}: file '{path}' does not exist; expected a text file")
    output = given.get("output")
    if output not in (None, "-") and Path(output).exists() and not given.get("overwrite"):
        problems.append(f"--output: '{output}' exists; give another name or --overwrite")
    problems += [
        f"--{name}: has no effect without --{needed}; add it"
        for name, needed in NEEDS_ANOTHER.items()
        if given.get(name) is not None and not given.get(needed)
    ]
    problems += _below(given, 1, "num_beams", "max_length", "max_new_tokens", "batch_size")
    problems += _below(given, 1, "num_return_sequences", "no_repeat_ngram_size", "top_k")
    returned, beams = given.get("num_return_sequences"), given.get("num_beams")
    if returned and beams and returned > beams and not given.get("do_sample"):
        problems.append(
            f"--num_return_sequences: {returned} is more than --num_beams {beams}; "
            "raise --num_beams or give --do_sample"
        )
    return problems


def check_new_model(given: Mapping[str, Any]) -> list[str]:
    problems = _data_problems(given, *DATA_SOURCES) + _below(given, 1, "vocab_size")
    languages = [name for name in ("src_lang", "tgt_lang") if not given.get(name)]
    if given.get("architecture") == "mbart" and languages:
        problems.append(
            f"--architecture mbart: needs {' and '.join(f'--{name}' for name in languages)}, "
            "such as --src_lang en_XX --tgt_lang de_DE"
        )
    return problems


def check_plan(given: Mapping[str, Any]) -> list[str]:
    problems = _data_problems(given, *DATA_SOURCES) + _below(given, 0, "epoch")
    return problems + _below(given, 1, "world_size", "first_steps")


def check_launch(given: Mapping[str, Any]) -> list[str]:
    problems = _below(given, 1, "num_processes", "num_nodes", "min_processes")
    problems += _below(given, 0, "node_rank", "max_restarts")
    port = given.get("master_port")
    if port is not None and not 1 <= port <= 65535:
        problems.append(f"--master_port: expected a port from 1 to 65535, got {port}")
    return problems


def _data_problems(given: Mapping[str, Any], *sources: str) -> list[str]:
    """A problem unless one of the options in ``sources`` says where the text is."""
    if any(given.get(name) for name in sources):
        return []
    flags = " or ".join(f"--{name}" for name in sources)
    return [f"no data: expected {flags}"]


def _below(given: Mapping[str, Any], least: int, *names: str) -> list[str]:
    """A problem for each number that is given and smaller than ``least``."""
    return [
        f"--{name}: expected a whole number of at least {least}, got {given[name]}"
        for name in names
        if given.get(name) is not None and given[name] < least
    ]
