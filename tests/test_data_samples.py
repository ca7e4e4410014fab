import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from data_text import make_job, prose, write_indexed, write_works
from ranks import run_ranks

from copus.data.manifest import FILES, FORMAT_VERSION, Manifest
from copus.data.prepare import prepare
from copus.job import JobError
from copus.manifest import describe

SEQ_LEN = 16


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A prepared folder in which no token id occurs twice: a sequence says where in the data it comes from."""
    folder = tmp_path_factory.mktemp("data") / "prepared"
    folder.mkdir()
    sides = {"train": [300, 1, 700, 150, 5, 44], "valid": [90, 200]}
    first = 0
    for side, lengths in sides.items():
        ends = first + np.cumsum([0, *lengths])
        write_indexed(folder / side, [np.arange(*span) for span in itertools.pairwise(ends)], 60_000)
        first = int(ends[-1])
    (folder / "tokenizer.json").write_text("{}")
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        files=describe(folder, FILES),
        sources=[],
        vocab=60_000,
        eod=0,
        largest_id=1489,
        train_tokens=1200,
        valid_tokens=290,
        works=[],
        dropped=[],
    )
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    return folder.rename(folder.with_name(manifest.digest))


def _reader(prepared: Path, num_samples: int, split: str = "train", seed: int = 5, **more: Path):
    from copus.data.samples import SampleReader

    return SampleReader(prepared, split, SEQ_LEN, num_samples, seed, **more)


def test_order_does_not_depend_on_batches_reader_or_length_of_the_job(prepared, tmp_path):
    reader = _reader(prepared, 200)
    tokens, labels = reader.batch(0, 200)
    assert tokens.shape == labels.shape == (200, SEQ_LEN)
    assert tokens.dtype == labels.dtype == torch.int64

    other = _reader(prepared, 130, cache=tmp_path)  # shorter job, indices of its own
    first = 0
    for count in (1, 8, 3, 64, 32, 22):
        batch_tokens, batch_labels = other.batch(first, count)
        assert torch.equal(batch_tokens, tokens[first : first + count])
        assert torch.equal(batch_labels, labels[first : first + count])
        first += count
    assert first == len(other) == 130
    for index in (129, 0, 75, 74, 129):  # back and forth between passes
        assert torch.equal(other[index][0], tokens[index])


def test_every_pass_sees_all_the_data_once(prepared):
    reader = _reader(prepared, 370)
    assert reader.samples_per_epoch == (1200 - 1) // SEQ_LEN == 74
    orders = []
    for epoch in range(5):
        tokens, labels = reader.batch(epoch * 74, 74)
        assert len(set(tokens.flatten().tolist())) == 74 * SEQ_LEN  # each id at most once: no sample repeated
        assert len(set(labels.flatten().tolist())) == 74 * SEQ_LEN
        assert torch.equal(tokens[:, 1:], labels[:, :-1])
        assert 0 <= int(tokens.min()) <= int(tokens.max()) < 1200
        orders.append(tuple(tokens[:, 0].tolist()))
    assert len(set(orders)) == 5
    assert any(order != tuple(sorted(order)) for order in orders)


def test_labels_are_the_next_token_of_the_document(prepared):
    reader = _reader(prepared, 74)
    ends = set((np.cumsum([300, 1, 700, 150, 5, 44]) - 1).tolist())
    tokens, labels = reader.batch(0, 74)
    inside = ~torch.isin(tokens, torch.tensor(sorted(ends)))
    assert torch.equal(labels[inside], tokens[inside] + 1)
    assert int(inside.sum()) >= 74 * SEQ_LEN - len(ends)


def test_seed_decides_and_sides_are_apart(prepared):
    one, two = (_reader(prepared, 74, seed=seed).batch(0, 74)[0] for seed in (5, 6))
    assert not torch.equal(one, two)
    assert _reader(prepared, 1, seed=2**40)[0][0].shape == (SEQ_LEN,)
    valid = _reader(prepared, 40, split="valid").batch(0, 40)[0]
    assert int(valid.min()) >= 1200


def test_index_outside_the_job_and_data_too_short(prepared):
    reader = _reader(prepared, 10)
    with pytest.raises(IndexError, match="sample 10 of 10"):
        reader.batch(8, 3)
    with pytest.raises(IndexError):
        reader[-1]
    from copus.data.samples import SampleReader

    with pytest.raises(JobError, match=r"data: the valid side has 290 tokens < model\.seq_len\(290\) \+ 1 = 291"):
        SampleReader(prepared, "valid", 290, 1, 5)
    assert SampleReader(prepared, "valid", 289, 1, 5).samples_per_epoch == 1


def test_an_interrupted_index_is_not_trusted(prepared, tmp_path, monkeypatch):
    saved = []
    real = np.save

    def interrupt(*arguments: object, **options: object) -> None:
        real(*arguments, **options)
        saved.append(arguments)
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(np, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        _reader(prepared, 74, cache=tmp_path)
    monkeypatch.setattr(np, "save", real)
    tokens, _ = _reader(prepared, 74, cache=tmp_path).batch(0, 74)
    assert torch.equal(tokens, _reader(prepared, 74).batch(0, 74)[0])


@pytest.mark.parametrize("damage", ["cut", "overwritten", "a file gone", "no manifest"])
def test_a_damaged_index_is_made_again(prepared, tmp_path, damage):
    """Also one of the right size: it would be another order of the samples, and nobody would know."""
    expected, _ = _reader(prepared, 74, cache=tmp_path).batch(0, 74)
    [shuffle] = tmp_path.rglob("0/sequences.npy")
    content = shuffle.read_bytes()
    if damage == "cut":
        shuffle.write_bytes(content[:-4])
    elif damage == "overwritten":
        order = np.load(shuffle)
        np.save(shuffle, np.roll(order, 1))
        assert shuffle.stat().st_size == len(content)
    else:
        (shuffle if damage == "a file gone" else shuffle.with_name("manifest.json")).unlink()
    tokens, _ = _reader(prepared, 74, cache=tmp_path).batch(0, 74)
    assert torch.equal(tokens, expected)
    assert shuffle.read_bytes() == content


def test_reads_what_prepare_wrote(tmp_path):
    corpus = write_works(tmp_path / "text", **{f"work{seed}": prose(seed) for seed in range(4)})
    job = make_job(tmp_path / "cache", {"source": [str(corpus)], "held_out": ["work1"]})
    folder = prepare(job)
    from tokenizers import Tokenizer

    from copus.data.samples import SampleReader

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    reader = SampleReader(folder, "valid", job.model.seq_len, 5, 1)
    for index in range(5):
        assert tokenizer.decode(reader[index][0].tolist()) in prose(1)


def _read_on_rank(prepared: Path, cache: Path) -> tuple[bool, list[list[int]]]:
    import torch.distributed as dist

    if dist.get_rank():  # rank 0 alone writes; the others must not look before it is done
        assert not any(cache.iterdir())
    dist.barrier()
    reader = _reader(prepared, 150, cache=cache)
    dist.destroy_process_group()
    alone = reader.batch(0, 150)[0].tolist()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return dist.is_initialized(), alone


@pytest.mark.dist
def test_ranks_read_the_same_and_outlive_their_groups(prepared, tmp_path):
    results = run_ranks(2, _read_on_rank, prepared, tmp_path)
    expected = _reader(prepared, 150).batch(0, 150)[0].tolist()
    assert results == [(True, expected)] * 2


def test_the_order_is_that_of_megatrons_dataset(prepared):
    """So runs whose data Megatron ordered go on with the same sequences."""
    from copus.backends.megatron import cpu

    cpu.before_import()
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

    class Tokenizer:
        pad, eod, vocab_size, unique_identifiers = -1, 0, 60_000, {"name": "none"}

    prefix = str(prepared / "train")
    reader = _reader(prepared, 3 * 74)
    for epoch in range(3):
        config = GPTDatasetConfig(
            random_seed=int(np.random.SeedSequence([5, epoch]).generate_state(1)[0]),
            sequence_length=SEQ_LEN,
            blend_per_split=[([prefix], None), None, None],
            tokenizer=Tokenizer(),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        documents = GPTDataset.build_low_level_dataset(prefix, config)
        indices = np.arange(len(documents), dtype=np.int32)
        theirs = GPTDataset(documents, "train", indices, None, Split.train, config)
        assert len(theirs) == reader.samples_per_epoch
        for place in range(74):
            tokens, labels = reader[74 * epoch + place]
            assert torch.equal(tokens, theirs[place]["tokens"])
            assert torch.equal(labels, theirs[place]["labels"])


@pytest.mark.parametrize("vocab", [250, 65_499, 65_500])
def test_megatron_writes_the_same_files(vocab, tmp_path):
    from copus.backends.megatron import cpu

    cpu.before_import()
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    documents = [np.random.default_rng(length).integers(0, vocab, length) for length in (3, 1, 40, 7)]
    write_indexed(tmp_path / "ours", documents, vocab)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=DType.optimal_dtype(vocab))
    for document in documents:
        builder.add_document(document, [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()
