"""Labels that do not count, attention and positions within documents, conversations: in the data, and in a step."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_text import make_job, prose, write_works
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from copus.backends.huggingface import build_causal_lm, mean_loss
from copus.backends.microbatches import hidden_scores
from copus.backends.step_contract import NOT_COUNTED, StepRequest
from copus.data.chat import encode_conversation, template_text
from copus.data.indexed import IndexedDocuments
from copus.data.manifest import read_manifest
from copus.data.prepare import prepare
from copus.data.prepared import check_data
from copus.data.samples import Options, SampleReader, open_data
from copus.data.tokenizer import END_OF_DOCUMENT, train_tokenizer
from copus.job import DataConfig, JobConfig, JobError
from copus.noise.step_estimate import estimate_step
from tests.megatron_jobs import RULES, backend_of, random_batches, tiny_job
from tests.ranks import run_ranks

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
CHAT_ML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CONVERSATION = [
    {"role": "user", "content": "who wrote it"},
    {"role": "assistant", "content": "a poet"},
    {"role": "user", "content": "when"},
    {"role": "assistant", "content": "long ago"},
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of very different lengths."""
    folder = tmp_path_factory.mktemp("text")
    works = {f"work{seed}": prose(seed, 9 + 12 * (seed % 3)) for seed in range(40)}
    job = make_job(folder / "cache", {"source": [str(write_works(folder / "text", **works))], "held_out": ["work5"]})
    return prepare(job)


@pytest.mark.parametrize("seq_len", [16, 70])
def test_masks_and_positions_are_those_of_megatrons_dataset(prepared: Path, seq_len: int) -> None:
    from copus.backends.megatron import cpu

    cpu.before_import()
    from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids

    options = Options(eod_mask_loss=True, reset_position_ids=True, reset_attention_mask=True)
    reader = SampleReader(prepared, "train", seq_len, 60, 3, options=options)
    tokens, labels, positions, documents = reader.batch(0, 60)
    plain = SampleReader(prepared, "train", seq_len, 60, 3).batch(0, 60)
    assert len(plain) == 2
    assert torch.equal(plain[0], tokens)
    eod = read_manifest(prepared).eod
    assert int((tokens == eod).sum()) > 10
    for row in range(60):
        hidden, counted, theirs = _get_ltor_masks_and_position_ids(tokens[row], eod, True, True, True, True)
        assert torch.equal(labels[row] != NOT_COUNTED, counted.bool())
        assert torch.equal(labels[row][counted.bool()], plain[1][row][counted.bool()])
        assert torch.equal(positions[row], theirs)
        assert torch.equal(hidden_scores(documents[row : row + 1])[0], hidden)


def test_what_is_not_reset_counts_on(prepared: Path) -> None:
    reader = SampleReader(prepared, "train", 40, 5, 3, options=Options(reset_position_ids=True))
    _, labels, positions, documents = reader.batch(0, 5)
    assert int(documents.max()) == 0
    assert int((positions == 0).sum()) > 5
    assert int(labels.min()) >= 0
    reader = SampleReader(prepared, "train", 40, 5, 3, options=Options(reset_attention_mask=True))
    _, _, positions, documents = reader.batch(0, 5)
    assert torch.equal(positions, torch.arange(40).expand(5, 40))
    assert int(documents.max()) > 0


def test_bos_and_eos_are_where_a_document_begins_and_ends(tmp_path: Path) -> None:
    corpus = write_works(tmp_path / "text", **{f"work{seed}": prose(seed) for seed in range(4)})
    data = {"source": [str(corpus)], "bos_token": "<s>", "eos_token": "</s>"}
    folder = prepare(make_job(tmp_path / "cache", data))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert (tokenizer.token_to_id("</s>"), tokenizer.token_to_id("<s>")) == (0, 1)
    documents = IndexedDocuments(folder / "train")
    for number, length in enumerate(documents.lengths.tolist()):
        ids = documents.read(number, 0, length)
        assert (ids[0], ids[-1]) == (1, 0)
        assert (ids == 0).sum() == (ids == 1).sum() == 1
    own = tmp_path / "tokenizer.json"
    train_tokenizer([prose(1)], 290).save(str(own))
    with pytest.raises(JobError, match=r"data\.bos_token\(<s>\): .*tokenizer\.json has no such token"):
        prepare(make_job(tmp_path / "other", {"source": [str(corpus)], "tokenizer": str(own), "bos_token": "<s>"}))


def _chat_tokenizer(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    special = (END_OF_DOCUMENT[0], IM_START, IM_END)
    train_tokenizer([prose(1), json.dumps(CONVERSATION)], 300, special).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT_ML}))
    return folder / "tokenizer.json"


def test_the_loss_is_on_what_the_assistant_says(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(_chat_tokenizer(tmp_path / "model")))
    template = template_text(DataConfig(tokenizer=tmp_path / "model" / "tokenizer.json"))
    assert template == CHAT_ML
    ids, said = encode_conversation(tokenizer, template, CONVERSATION, "", "", 0, "line 1")
    learned = tokenizer.decode(ids[said == 1].tolist(), skip_special_tokens=False)
    assert learned == f"a poet{IM_END}\nlong ago{IM_END}\n{END_OF_DOCUMENT[0]}"
    assert (ids == tokenizer.token_to_id(IM_START)).sum() == 4, "names of special tokens in a template are tokens"

    _, said = encode_conversation(tokenizer, template, CONVERSATION[:3], "", "", 0, "line 1")
    assert said[-1] == 0, "nothing is learned after a question"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for", r"data\.chat_template: "),
        ("{{ raise_exception('roles must alternate') }}", r"data\.chat_template: line 1: roles must alternate"),
        ("{{ messages.__class__.__mro__ }}", r"data\.chat_template: line 1: access to attribute '__class__'"),
        ("{{ messages | length }}", r"the text up to message 1 is another one without what follows"),
        ("a text file", r"data\.chat_template: line 1: it leaves out message 1, which the assistant says"),
    ],
    ids=["no template", "refused by the template", "out of the sandbox", "not a continuation", "without the messages"],
)
def test_a_template_that_cannot_be_followed_is_refused(tmp_path: Path, template: str, message: str) -> None:
    tokenizer = Tokenizer.from_file(str(_chat_tokenizer(tmp_path / "model")))
    with pytest.raises(JobError, match=message):
        encode_conversation(tokenizer, template, CONVERSATION, "", "", 0, "line 1")


def _chat_job(tmp_path: Path, lines: list[Any], **data: Any) -> JobConfig:
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = {"source": [str(tmp_path / "chat.jsonl")], "messages_column": "messages", **data}
    return make_job(tmp_path / "cache", data, seq_len=32, tokens=3200, evaluate_sequences=4)


def test_text_beside_conversations_is_refused_and_not_left_out(tmp_path: Path) -> None:
    job = _chat_job(tmp_path, [{"messages": CONVERSATION}], source=[str(tmp_path)])
    (tmp_path / "read.md").write_text("How these were made.")
    with pytest.raises(JobError, match=r"read\.md is text, and data\.messages_column\(messages\) reads conversations"):
        check_data(job)


def test_conversations_are_trained_on_with_their_answers_alone(tmp_path: Path) -> None:
    lines = [
        {
            "messages": [
                {"role": "user", "content": prose(seed, 9)},
                {"role": "assistant", "content": prose(100 + seed, 20)},
            ]
        }
        for seed in range(60)
    ]
    job = _chat_job(tmp_path, lines, tokenizer=str(_chat_tokenizer(tmp_path / "model")))
    folder = prepare(job)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    train, _ = open_data(job, folder)
    _, labels = train(0, 40)
    answers = "".join(line["messages"][1]["content"] for line in lines)
    questions = "".join(line["messages"][0]["content"] for line in lines)
    learned = 0
    for row in range(40):
        counted = labels[row] != NOT_COUNTED
        runs = np.split(labels[row].numpy(), np.flatnonzero(np.diff(counted.numpy().astype(int))) + 1)
        for run in runs:
            if run[0] == NOT_COUNTED:
                continue
            text = tokenizer.decode(run.tolist(), skip_special_tokens=True).strip()
            assert text in answers, text
            assert len(text) < 12 or text not in questions
            learned += len(run)
    assert 0.3 < learned / labels.numel() < 0.95


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"text": "a"}, r'chat\.jsonl:2: expected an object with a list "messages" a line'),
        ({"messages": ["a"]}, r'chat\.jsonl:2: "messages" 0 is no object with the strings "role" and "content"'),
        ({"messages": [{"role": "user"}]}, r'chat\.jsonl:2: "messages" 0 is no object with the strings'),
    ],
)
def test_a_conversation_that_is_none_is_refused_by_its_line(tmp_path: Path, line: dict[str, Any], message: str) -> None:
    job = _chat_job(tmp_path, [{"messages": CONVERSATION}, line])
    with pytest.raises(JobError, match=message):
        prepare(job)
    assert not job.data.cache.exists()


def _uneven_batches(first: int, count: int) -> tuple[torch.Tensor, ...]:
    """Random sequences of three documents, in each of which another number of labels counts."""
    tokens, labels = random_batches(first, count)
    labels = labels.clone()
    places, documents = [], []
    for row in range(count):
        number = first + row
        labels[row, : 3 * (number % 5)] = NOT_COUNTED
        cuts = [0, 3 + number % 4, 9 + number % 3, 16]
        lengths = [b - a for a, b in itertools.pairwise(cuts)]
        places.append(torch.cat([torch.arange(length) for length in lengths]))
        documents.append(torch.arange(3).repeat_interleave(torch.tensor(lengths)))
    return tokens, labels, torch.stack(places), torch.stack(documents)


def _reference(job: JobConfig) -> tuple[float, float]:
    """Loss and |g|² of the first global batch, the loss a mean over the labels that count, each document by itself."""
    model = build_causal_lm(job.model, torch.float32, torch.device("cpu"), seed=job.training.seed)
    tokens, labels, _, documents = _uneven_batches(0, 8)
    losses, counted = [], 0
    for row in range(8):
        for document in range(3):
            inside = documents[row] == document
            logits = model(input_ids=tokens[row][inside][None]).logits[0]
            own = labels[row][inside]
            losses.append(torch.nn.functional.cross_entropy(logits, own, ignore_index=NOT_COUNTED, reduction="sum"))
            counted += int((own != NOT_COUNTED).sum())
    loss = torch.stack(losses).sum() / counted
    loss.backward()
    return loss.item(), sum(float(weight.grad.double().square().sum()) for weight in model.parameters())


def _masked_job(backend: str, layout: dict[str, Any]) -> JobConfig:
    job = tiny_job(2, layout, backend=backend)
    data = job.data.model_copy(update={"eod_mask_loss": True, "reset_position_ids": True, "reset_attention_mask": True})
    return job.model_copy(update={"data": data})


def _masked_steps(backend: str, layouts: list[dict[str, Any]]) -> list[tuple[float, ...]]:
    from tests.fsdp_jobs import fsdp_backend_of

    figures = []
    for layout in layouts:
        job = _masked_job(backend, layout)
        built = backend_of(job) if backend == "megatron" else fsdp_backend_of(job)
        first = built.train_step(_uneven_batches, StepRequest(0, RULES, noise_source="microbatch"))
        second = built.train_step(_uneven_batches, StepRequest(8, RULES))
        assert first.parts is not None
        ratio = first.parts.grad_sq / first.grad_sq
        mean_sq = float(first.parts.squared_norms.mean())
        figures.append(
            (first.loss, first.grad_sq, second.loss, built.held_out_loss(_uneven_batches, 8), ratio, mean_sq)
        )
        built.close()
    return figures


@pytest.mark.dist
@pytest.mark.parametrize(
    ("backend", "layouts"),
    [
        ("megatron", [{"dp": 2}, {"tp": 2}]),
        pytest.param("megatron", [{"pp": 2}, {"dp": 2, "zero": 1}], marks=pytest.mark.slow),
        ("fsdp", [{"dp": 2, "zero": 3}]),
        pytest.param("fsdp", [{"tp": 2}], marks=pytest.mark.slow),
    ],
)
def test_the_loss_is_the_mean_over_what_counts_whatever_the_layout(backend: str, layouts: list[dict[str, Any]]) -> None:
    expected = _reference(_masked_job(backend, layouts[0]))
    all_figures = run_ranks(2, _masked_steps, backend, layouts)
    assert all_figures[0] == all_figures[1]
    for loss, grad_sq, after, held_out, ratio, _ in all_figures[0]:
        assert (loss, grad_sq) == pytest.approx(expected, rel=2e-5)
        assert ratio == pytest.approx(1, rel=1e-4), "the parts are in the scale of the gradient"
        assert after == pytest.approx(all_figures[0][0][2], rel=2e-5)
        assert held_out == pytest.approx(all_figures[0][0][3], rel=2e-5)
    if backend == "megatron":  # micro-batches of one sequence on every layout
        means = [figures[-1] for figures in all_figures[0]]
        assert means == pytest.approx([means[0]] * len(means), rel=1e-4)


def test_attention_within_documents_is_what_each_document_alone_would_see() -> None:
    """A sequence of three documents has the losses of the three."""
    job = tiny_job(1)
    model = build_causal_lm(job.model, torch.float32, torch.device("cpu"), seed=1)
    tokens, labels, positions, documents = _uneven_batches(0, 4)
    with torch.no_grad():
        together = mean_loss(model, tokens, labels, positions, documents) * labels.numel()
        apart = 0.0
        for row in range(4):
            for document in range(3):
                inside = documents[row] == document
                part = mean_loss(model, tokens[row][inside][None], labels[row][inside][None])
                apart += float(part) * int(inside.sum())
    assert float(together) == pytest.approx(apart, rel=1e-5)


@given(st.integers(0, 2**31), st.sampled_from([0.0, 0.3, 0.8]))
def test_counts_that_differ_bias_the_noise_scale_by_the_square_of_their_variation(seed: int, variation: float) -> None:
    """B_simple is too large by CV² sequences, CV the coefficient of variation of the counted tokens of a sequence: what
    docs/data.md says. Gradients of a sequence are its count times (G + noise)."""
    random = np.random.default_rng(seed)
    size, steps, parts = 20, 400, 64
    gradient = np.ones(size)
    shape = (steps, parts)
    counts = np.ones(shape) if variation == 0 else random.gamma(1 / variation**2, variation**2, shape)
    noise = random.normal(0, 1, (steps, parts, size))
    per_sequence = counts[..., None] * gradient + np.sqrt(counts)[..., None] * noise
    scaled = per_sequence / counts.mean(1)[:, None, None]
    estimates = [estimate_step(float(step.mean(0) @ step.mean(0)), np.square(step).sum(1), 1) for step in scaled]
    b_simple = sum(e.noise_trace for e in estimates) / sum(e.grad_sq for e in estimates)
    truth = size / (gradient @ gradient)  # tr Σ of counts · noise over |G|², the counts' mean being 1
    assert b_simple == pytest.approx(truth + variation**2, rel=0.08)


def test_a_backend_that_does_not_heed_masks_says_so_before_anything_starts() -> None:
    from copus.backends.description import BackendDescription

    class Plain(BackendDescription):
        def check_model(self, model: Any) -> None: ...

        def load(self) -> type[Any]:
            return object

    Plain().check_data(DataConfig())
    with pytest.raises(ValueError, match=r"reset_attention_mask\(true\): not supported by this backend"):
        Plain().check_data(DataConfig(reset_attention_mask=True))
