"""The files of a checkpoint: what they hold, and that no damage goes unnoticed."""

from __future__ import annotations

import json
import random
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForSeq2SeqLM

from s2s_scale.backends import Backend
from s2s_scale.backends.base import equal_shares
from s2s_scale.checkpoint import (
    DamagedCheckpoint,
    checkpoints,
    newest_verified,
    resolve_resume,
    rotate,
    verify,
    write_manifest,
)
from s2s_scale.checkpoint.atomic import SINGLE, Ranks, seen_by_all
from s2s_scale.checkpoint.manifest import checksum_of
from s2s_scale.checkpoint.portable import StateWriter, check_fits, finalize_shards, write_states
from s2s_scale.checkpoint.tensors import TensorReader, TensorWriter, name_parts
from s2s_scale.errors import UserError
from s2s_scale.models.tiny import FAMILY_NAMES, tiny_model
from tests.support.training import fresh, our_trainer, ragged_rows

DAMAGES = 200


def some_tensors():
    draw = torch.Generator().manual_seed(3)
    kinds = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    tensors = {f"a.{kind}": torch.randn(5, 3, generator=draw).to(kind) for kind in kinds}
    tensors["counts"] = torch.arange(7)
    tensors["flag"] = torch.tensor([True, False])
    tensors["scalar"] = torch.tensor(2.5)
    tensors["turned"] = torch.randn(4, 6, generator=draw).T
    tensors["none"] = torch.empty(0, 3)
    return tensors


@pytest.mark.parametrize("shard_bytes", [1 << 20, 150, 1])
def test_tensors_are_ordinary_safetensors_and_come_back(tmp_path, shard_bytes):
    tensors = some_tensors()
    writer = TensorWriter(tmp_path, "part", shard_bytes=shard_bytes)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    entries = name_parts(tmp_path, "part", writer.finish())
    files = sorted(path.name for path in tmp_path.iterdir())
    assert sorted(entries) == files
    assert {name: checksum_of(tmp_path / name) for name in files} == entries
    shards = [name for name in files if name.endswith(".safetensors")]
    assert len(shards) == {1 << 20: 1, 150: 3, 1: len(tensors)}[shard_bytes] or shard_bytes == 150
    loaded = {}
    for name in shards:
        loaded |= safetensors.torch.load_file(tmp_path / name)
    with TensorReader(tmp_path, "part") as reader:
        assert set(reader) == set(loaded) == set(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype
            assert torch.equal(reader.get(name), tensor)
            assert reader.shape(name) == tuple(tensor.shape)


def test_nothing_to_write_leaves_no_file(tmp_path):
    assert name_parts(tmp_path, "part", TensorWriter(tmp_path, "part").finish()) == {}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("shard_bytes", [1 << 30, 4096])
def test_weights_are_those_that_save_pretrained_writes(tmp_path, family, shard_bytes):
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "stock")
    ours = tmp_path / "ours"
    shutil.copytree(tmp_path / "stock", ours)
    (ours / "model.safetensors").unlink()
    optimizer = torch.optim.AdamW(model.parameters())
    writer = StateWriter(ours, model, shard_bytes=shard_bytes)
    finalize_shards(ours, [write_states(Backend("cpu").state(model, optimizer), writer)])
    expected = safetensors.torch.load_file(tmp_path / "stock" / "model.safetensors")
    with TensorReader(ours, "model") as reader:
        assert set(reader) == set(expected)
        for name, tensor in expected.items():
            assert torch.equal(reader.get(name), tensor), name
    assert not list(ours.glob("master_weights*")), "fp32 weights need no second copy"
    loaded, report = AutoModelForSeq2SeqLM.from_pretrained(ours, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for name, parameter in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], parameter), name


def test_lower_precision_keeps_the_fp32_weights_beside(tmp_path):
    from s2s_scale.backends.base import ParameterState

    model = tiny_model("t5").to(torch.bfloat16)
    fine = {name: torch.randn(p.shape) for name, p in model.named_parameters()}
    writer = StateWriter(tmp_path, model)
    states = (ParameterState(n, w, {}) for n, w in fine.items())
    finalize_shards(tmp_path, [write_states(states, writer)])
    with TensorReader(tmp_path, "model") as low, TensorReader(tmp_path, "master_weights") as high:
        assert len(low) == len(high) == len(fine) > 10
        for name, weight in fine.items():
            assert torch.equal(high.get(name), weight)
            assert torch.equal(low.get(name), weight.bfloat16())


@pytest.mark.parametrize("shard_bytes", [1 << 30, 4096])
def test_the_shares_of_several_ranks_make_one_set_of_files(tmp_path, shard_bytes):
    model = tiny_model("marian")
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.tensor([[5, 2]]), labels=torch.tensor([[6, 2]])).loss.backward()
    optimizer.step()
    states = list(Backend("cpu").state(model, optimizer))
    for name, ranks in (("alone", 1), ("shared", 3)):
        (folder := tmp_path / name).mkdir()
        writers = equal_shares({s.name: s.weight.numel() for s in states}, ranks)
        written = []
        for rank in range(ranks):
            writer = StateWriter(folder, model, shard_bytes=shard_bytes, rank=rank)
            written.append(write_states((s for s in states if writers[s.name] == rank), writer))
        content = finalize_shards(folder, written)
        files = {path.name for path in folder.iterdir()}
        assert set(content.entries) == files and not any("part" in name for name in files)
        assert content.entries == {name: checksum_of(folder / name) for name in files}
        assert (folder / "model.safetensors.index.json").exists() == (
            ranks > 1 or shard_bytes == 4096
        )
    for stem in ("model", "optimizer"):
        with (
            TensorReader(tmp_path / "alone", stem) as alone,
            TensorReader(tmp_path / "shared", stem) as shared,
        ):
            assert set(alone) == set(shared) and len(alone) > 10
            for name in alone:
                assert torch.equal(alone.get(name), shared.get(name)), name


@pytest.mark.parametrize("shared", [True, False])
def test_a_folder_of_the_same_name_on_another_host_is_not_taken_for_a_shared_one(tmp_path, shared):
    folders = [tmp_path / "host-0", tmp_path / ("host-0" if shared else "host-1")]
    for folder in folders:
        folder.mkdir(exist_ok=True)
    said: list[list[str | None]] = [[], []]
    barrier = threading.Barrier(2, timeout=20)

    def asked(rank):
        def gather(value):
            said[rank].append(value)
            barrier.wait()
            values = [one[-1] for one in said]
            barrier.wait()
            return values

        return seen_by_all(folders[rank], Ranks(main=rank == 0, gather=gather), count=2)

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(asked, range(2))) == [shared, shared]
    assert not list(tmp_path.glob("*/*")) and not list(tmp_path.glob("*/.*"))


def test_ranks_that_cannot_tell_each_other_share_no_folder(tmp_path):
    assert seen_by_all(tmp_path, SINGLE, count=1)
    assert not seen_by_all(tmp_path, SINGLE, count=2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run with checkpoint-2 and checkpoint-4."""
    folder = tmp_path_factory.mktemp("run")
    model = fresh("bart")
    rows = ragged_rows(model, 16)
    values = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    our_trainer(model, folder, rows, **values).train()
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-2", "checkpoint-4"]
    return folder


def test_no_file_of_a_checkpoint_is_a_pickle(saved):
    names = {path.name for path in (saved / "checkpoint-4").iterdir()}
    assert {"model.safetensors", "optimizer.safetensors", "manifest.json"} <= names
    assert {name.rpartition(".")[2] for name in names} == {"safetensors", "json"}


def damage(folder, chance):
    """Change a random place of a random file of ``folder``; what was done."""
    path = chance.choice(sorted(p for p in folder.rglob("*") if p.is_file()))
    content = bytearray(path.read_bytes())
    kind = chance.choice(["flip", "truncate", "delete", "append"])
    place = chance.randrange(len(content))
    if kind == "delete":
        path.unlink()
        return f"delete {path.name}"
    if kind == "flip":
        content[place] ^= 1 << chance.randrange(8)
    elif kind == "truncate":
        del content[place:]
    else:
        content += b"\0"
    path.write_bytes(content)
    return f"{kind} {path.name} at {place}"


def problem_of(folder):
    try:
        verify(folder)
    except DamagedCheckpoint as error:
        return str(error)
    return None


def test_each_of_200_damages_is_found(saved, tmp_path):
    whole = saved / "checkpoint-4"
    verify(whole)
    files = {p.name: p.read_bytes() for p in whole.iterdir()}
    copy = tmp_path / "checkpoint-4"
    shutil.copytree(whole, copy)
    missed = []
    kinds = set()
    for seed in range(DAMAGES):
        done = damage(copy, random.Random(seed))
        kinds.add(tuple(done.split()[:2]))
        if problem_of(copy) is None:
            missed.append(done)
        for name, content in files.items():
            (copy / name).write_bytes(content)
    assert missed == []
    assert len(kinds) > 20, "many files in all four ways"
    verify(copy)


@pytest.fixture
def own(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def flip(path, place=-1):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_latest_skips_what_is_damaged_and_says_why(own):
    flip(own / "checkpoint-4" / "optimizer.safetensors")
    notes = []
    assert resolve_resume("latest", own, notes.append) == own / "checkpoint-2"
    assert len(notes) == 1
    assert notes[0].startswith("checkpoint-4 is skipped: ")
    assert "optimizer.safetensors: found checksum" in notes[0] and "; expected " in notes[0]
    with pytest.raises(DamagedCheckpoint, match=r"4/optimizer.safetensors: found checksum"):
        resolve_resume(str(own / "checkpoint-4"), own)
    (own / "checkpoint-2" / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"checkpoint-4 is skipped.*checkpoint-2 is skipped"):
        resolve_resume("latest", own)


def test_the_limit_never_deletes_the_last_one_that_is_whole(own):
    flip(own / "checkpoint-4" / "model.safetensors")
    assert rotate(own, limit=1, best=None) == []
    assert newest_verified(own) == own / "checkpoint-2"


def test_the_limit_deletes_the_oldest_but_the_best(own):
    shutil.copytree(own / "checkpoint-4", own / "checkpoint-6")
    shutil.copytree(own / "checkpoint-4", own / "checkpoint-8")
    removed = rotate(own, limit=2, best=str(own / "checkpoint-2"))
    assert removed == [own / "checkpoint-4", own / "checkpoint-6"]
    assert [path.name for path in checkpoints(own)] == ["checkpoint-2", "checkpoint-8"]


def rewritten(folder, **changes):
    """A manifest with other content and a right checksum of its own."""
    from s2s_scale.checkpoint import manifest

    content = json.loads((folder / "manifest.json").read_text()) | changes
    content.pop("own checksum")
    digest = manifest.new_checksum()
    digest.update(manifest._dump(content))
    content["own checksum"] = digest.hexdigest()
    (folder / "manifest.json").write_bytes(manifest._dump(content))


def test_a_newer_format_is_refused(own):
    rewritten(own / "checkpoint-4", version=2)
    with pytest.raises(
        DamagedCheckpoint, match=r"version 2; expected 1 or older; .*newer s2s-scale"
    ):
        verify(own / "checkpoint-4")


@pytest.mark.parametrize("name", ["../notes.txt", "/etc/hostname", "a/../../b", "a\\b", "./x"])
def test_a_name_that_points_outside_is_refused(own, name):
    entry = {"bytes": 1, "xxh3_128": "0"}
    rewritten(own / "checkpoint-4", files={name: entry})
    with pytest.raises(DamagedCheckpoint, match="names the file .* expected files inside"):
        verify(own / "checkpoint-4")


def test_a_link_that_points_outside_is_refused(own, tmp_path):
    folder = own / "checkpoint-4"
    (tmp_path / "outside").write_bytes((folder / "config.json").read_bytes())
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(tmp_path / "outside")
    with pytest.raises(DamagedCheckpoint, match="names the file 'config.json'"):
        verify(folder)


def test_another_vocabulary_names_the_first_parameter_and_both_shapes(saved):
    from s2s_scale.checkpoint.portable import PortableCheckpoint

    backend = Backend("cpu")
    folder = saved / "checkpoint-4"
    with PortableCheckpoint(folder) as portable:
        same = fresh("bart")
        check_fits(folder, portable.reader_for(same), backend.whole_shapes(same))
        other = tiny_model("bart", vocab_size=50)
        pattern = r"model.shared.weight has shape \[\d+, \d+\] in the checkpoint; expected \[50, "
        with pytest.raises(UserError, match=pattern):
            check_fits(folder, portable.reader_for(other), backend.whole_shapes(other))
        foreign = tiny_model("t5")
        with pytest.raises(UserError, match="is missing in the checkpoint"):
            check_fits(folder, portable.reader_for(foreign), backend.whole_shapes(foreign))


def test_a_manifest_of_nothing_is_still_verified(tmp_path):
    write_manifest(tmp_path, step=1)
    assert verify(tmp_path).files == {}
