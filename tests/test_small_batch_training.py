"""Runs of the small-batch benchmark that train together do as one run of the job's own would."""

import pytest
import torch

from benchmarks.small_batch import ARMS, JOB, OPTIMIZERS
from benchmarks.small_batch_model import stacked_losses, stacked_weights
from benchmarks.small_batch_training import StackedUpdate, whole_weight
from copus.backends.huggingface import build_causal_lm, mean_loss
from copus.backends.optimizers.build import make_optimizer, step_options
from copus.backends.step_contract import StepRules
from copus.job import JobConfig, load_job

SEEDS = (0, 1)
RATES = (1e-2, 3e-3)


@pytest.fixture(scope="module")
def job() -> JobConfig:
    return load_job(JOB, ["model.hidden=16", "model.ffn_hidden=24", "model.heads=2", "model.vocab=128"])


def batches(job: JobConfig, count: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randint(job.model.vocab, (count, len(SEEDS), 2, job.model.seq_len), generator=random)


def test_stacked_models_have_the_losses_and_gradients_of_transformers_llama(job: JobConfig) -> None:
    weights = {name: weight.requires_grad_() for name, weight in stacked_weights(job.model, SEEDS).items()}
    tokens, labels = batches(job, 2)
    losses = stacked_losses(job.model, weights, tokens, labels)
    losses.sum().backward()
    for run, seed in enumerate(SEEDS):
        alone = build_causal_lm(job.model, torch.float32, torch.device("cpu"), seed)
        loss = mean_loss(alone, tokens[run], labels[run])
        loss.backward()
        torch.testing.assert_close(losses[run], loss)
        for name, weight in alone.named_parameters():
            assert weights[name].grad is not None
            torch.testing.assert_close(weights[name].grad[run], weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: f"{arm.optimizer['kind']}-{arm.rule}")
def test_stacked_updates_are_those_of_a_job(job: JobConfig, arm: object) -> None:
    optimizer = OPTIMIZERS.validate_python(arm.optimizer)  # type: ignore[attr-defined]
    stacked = {name: weight.requires_grad_() for name, weight in stacked_weights(job.model, SEEDS).items()}
    update = StackedUpdate(optimizer, stacked, torch.tensor(RATES))
    alone = [{name: weight[run].detach().clone() for name, weight in stacked.items()} for run in range(len(SEEDS))]
    training = job.training.model_copy(update={"optimizer": optimizer})
    params = [[torch.nn.Parameter(weight) for weight in weights.values()] for weights in alone]
    held = [dict(zip(p, map(whole_weight, a, a.values()), strict=True)) for p, a in zip(params, alone, strict=True)]
    updates = [make_optimizer(training, [{"params": p}], h) for p, h in zip(params, held, strict=True)]
    random, kappa, product = torch.Generator().manual_seed(1), 0.25, 1.0
    for step in range(3):
        gradients = [torch.randn(weight.shape, generator=random) for weight in stacked.values()]
        for run, (optimizer_alone, rate) in enumerate(zip(updates, RATES, strict=True)):
            for param, gradient in zip(params[run], gradients, strict=True):
                param.grad = gradient[run].clone()
            rules = StepRules(0.5 * rate, optimizer.betas_at(kappa), 0.0, product)
            optimizer_alone.param_groups[0].update(step_options(training, rules, step))
            optimizer_alone.step()
        for weight, gradient in zip(stacked.values(), gradients, strict=True):
            weight.grad = gradient
        update.step(0.5, kappa)
        product *= optimizer.betas_at(kappa)[1]
    for run in range(len(SEEDS)):
        for param, weight in zip(params[run], stacked.values(), strict=True):
            torch.testing.assert_close(param, weight[run], rtol=1e-5, atol=1e-7)
