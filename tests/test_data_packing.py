"""Conversations packed whole into sequences (`data.packing: best-fit`), also while layouts change."""

import json
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

import copus.data.samples as samples
from copus.backends.step_contract import NOT_COUNTED, StepRequest
from copus.data.packing import best_fit
from copus.data.prepare import prepare
from copus.data.samples import Options, SampleReader
from copus.job import JobError
from tests.data_text import make_job, prose
from tests.megatron_jobs import RULES, backend_of, configuration, tiny_job
from tests.ranks import run_ranks


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 20), st.randoms())
def test_every_token_is_in_one_sequence_and_only_long_documents_are_cut(
    lengths: list[int], capacity: int, random: Random
) -> None:
    order = list(range(len(lengths)))
    random.shuffle(order)
    packed = best_fit(np.array(lengths), np.array(order), capacity)
    seen = [np.zeros(length, int) for length in lengths]
    for document, first, last in zip(packed.documents, packed.firsts, packed.lasts, strict=True):
        assert first % capacity == 0
        seen[document][first:last] += 1
    assert all((tokens == 1).all() for tokens in seen)
    sizes = np.add.reduceat(packed.lasts - packed.firsts, packed.bounds[:-1])
    assert (sizes <= capacity).all()
    assert (sizes > 0).all()
    assert len(sizes) == len(best_fit(np.array(lengths), np.arange(len(lengths)), capacity).bounds) - 1
    halves = np.sort(sizes)[: len(sizes) // 2 * 2].reshape(-1, 2) if len(sizes) > 1 else np.empty((0, 2))
    assert (halves.sum(axis=1) > capacity).sum() >= len(halves) - 1, "two sequences that fit into one are one"


def test_a_conversation_goes_where_it_leaves_the_least_room() -> None:
    packed = best_fit(np.array([6, 5, 4, 3, 12]), np.arange(5), 10)
    in_sequences = [
        list(zip(packed.documents[first:last].tolist(), packed.firsts[first:last].tolist(), strict=True))
        for first, last in zip(packed.bounds, packed.bounds[1:], strict=False)
    ]
    assert in_sequences == [[(0, 0), (2, 0)], [(1, 0), (3, 0), (4, 10)], [(4, 0)]]


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of 60 conversations."""
    folder = tmp_path_factory.mktemp("chat")
    lines = [
        {"messages": [{"role": "user", "content": prose(seed)[:40]}, {"role": "assistant", "content": answer}]}
        for seed in range(60)
        for answer in [prose(100 + seed)[: 20 + 7 * (seed % 13)]]
    ]
    (folder / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = {"source": [str(folder / "chat.jsonl")], "messages_column": "messages", "packing": "best-fit"}
    return prepare(make_job(folder / "cache", data))


def test_padding_does_not_count_and_the_order_depends_on_the_seed_alone(chat: Path, tmp_path: Path) -> None:
    options = Options(reset_position_ids=True, reset_attention_mask=True, packs=True)
    reader = SampleReader(chat, "train", 96, 400, 5, options=options)
    tokens, labels, positions, documents = reader.batch(0, 40)
    joined = SampleReader(chat, "train", 96, 400, 5)
    assert tokens.shape == labels.shape == positions.shape == documents.shape == (40, 96)
    again = SampleReader(chat, "train", 96, 12, 5, cache=tmp_path, options=options)
    assert all(map(torch.equal, again.batch(3, 9), (part[3:12] for part in (tokens, labels, positions, documents))))
    other = SampleReader(chat, "train", 96, 40, 6, options=options)
    assert not torch.equal(other.batch(0, 40)[0], tokens)

    epoch = reader.samples_per_epoch
    assert epoch >= joined.samples_per_epoch
    counted = int((reader.batch(0, epoch)[1] != NOT_COUNTED).sum())
    learned = int(np.fromfile(chat / "train.mask", np.uint8).sum())
    lengths = np.concatenate([dataset._documents.lengths for dataset in reader._datasets])
    cut = int((lengths > 97).sum())
    assert learned - cut <= counted < learned, "all that the assistant says but the first token after a cut; no padding"
    for row in range(40):
        for document in documents[row].unique().tolist():
            inside = positions[row][documents[row] == document]
            assert inside.tolist() == list(range(len(inside)))


def test_what_was_packed_is_not_packed_again(chat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = Options(packs=True)
    first = SampleReader(chat, "train", 64, 40, 5, options=options)
    monkeypatch.setattr(samples, "best_fit", lambda *arguments: pytest.fail("packed again"))
    again = SampleReader(chat, "train", 64, 40, 5, options=options)
    assert again.samples_per_epoch == first.samples_per_epoch
    assert torch.equal(again.batch(0, 40)[0], first.batch(0, 40)[0])


def _train_on_chat(layouts: list[dict[str, int]], folder: Path) -> tuple[list[float], list[list[int]]]:
    """Losses of two steps in each layout, and the samples that this rank read in each step: the end of the first pass,
    and the beginning of the second."""
    job = tiny_job(dist.get_world_size(), layouts[0], {"seq_len": 96, "vocab": 300}, micro_batch=2)
    options = Options(reset_position_ids=True, reset_attention_mask=True, packs=True)
    data = job.data.model_copy(update={"reset_position_ids": True, "reset_attention_mask": True})
    backend = backend_of(job.model_copy(update={"data": data}))
    reader = SampleReader(folder, "train", 96, 400, 5, options=options)
    read: list[int] = []

    def batches(first: int, count: int) -> tuple[torch.Tensor, ...]:
        read.extend(range(first, first + count))
        return reader.batch(first, count)

    losses, reads = [], []
    sample = reader.samples_per_epoch - 13
    for layout in layouts:
        backend.move(configuration(8, 2, **layout))
        for _ in range(2):
            read.clear()
            losses.append(backend.train_step(batches, StepRequest(sample, RULES)).loss)
            reads.append([number - sample for number in read])
            sample += 8
    return losses, reads


@pytest.mark.dist
def test_a_live_move_neither_skips_nor_repeats_a_packed_conversation(chat: Path) -> None:
    """From tensor to data parallel between two steps: the samples of every step, and the losses of one rank."""
    (one, whole), *_ = run_ranks(1, _train_on_chat, [{}, {}], chat)
    assert [sorted(samples) for samples in whole] == [list(range(8))] * 4
    (first, of_first), (second, of_second) = run_ranks(2, _train_on_chat, [{"tp": 2}, {"dp": 2}], chat)
    assert [sorted(samples) for samples in of_first[:2] + of_second[:2]] == [list(range(8))] * 4
    assert [sorted(a + b) for a, b in zip(of_first[2:], of_second[2:], strict=True)] == [list(range(8))] * 2
    assert first == second == pytest.approx(one, rel=1e-4)
    assert len(set(one)) == 4


def test_packing_is_for_conversations(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"packing\(best-fit\) is for conversations: give messages_column too"):
        make_job(tmp_path, {"packing": "best-fit"})
