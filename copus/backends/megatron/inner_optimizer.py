"""Puts the job's optimizer inside Megatron's wrappers, which keep masters, share out state and see to gradients.

Megatron builds them around torch's AdamW (`upstream.use_torch_adam`), and its distributed optimizer refuses others.
Once built, they only call `step` of what they wrap and read its groups.
"""

from typing import Any

from copus.backends.megatron.groups import own_model_rank
from copus.backends.megatron.live_state import held_weight
from copus.backends.megatron.local_tensors import local_tensors
from copus.backends.megatron.main_params import main_params
from copus.backends.optimizers.build import make_optimizer
from copus.job import JobConfig
from profiles.layout import Layout

_OF_MEGATRON = ("params", "wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr", "default_config")
"""What Megatron reads of a group; all else is the inner optimizer's."""


def use_optimizer_of_job(optimizer: Any, chunks: list[Any], job: JobConfig, layout: Layout) -> None:
    """Replace the inner optimizers of Megatron's chain, which have made no step yet."""
    rank = own_model_rank(layout)
    local = dict(pair for chunk in chunks for pair in local_tensors(chunk, job.model, rank))
    held = {main.main: held_weight(main, local[main.param]) for main in main_params(optimizer)}
    for wrapper in optimizer.chained_optimizers:
        if wrapper.optimizer is not None:
            groups = [
                {name: group[name] for name in _OF_MEGATRON if name in group}
                for group in wrapper.optimizer.param_groups
            ]
            for param in (param for group in groups for param in group["params"]):
                if not param.is_leaf:  # the distributed optimizer's range of an fp32 weight, which torch refuses else
                    param.retain_grad()
            wrapper.optimizer = make_optimizer(job.training, groups, held)
