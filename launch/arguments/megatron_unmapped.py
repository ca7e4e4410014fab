"""Arguments of Megatron-LM that no field of a job file stands for, and what that means for a training.

Names are those of Megatron-LM core_v0.16.1 to core_v0.19.0.
"""

from launch.arguments.imported_job import Effect

_NAMES: tuple[tuple[Effect, str, str], ...] = (
    (
        "is not needed",
        "it is about speed, and the same is computed",
        "transformer-impl attention-backend use-flash-attn use-mcore-models no-masked-softmax-fusion "
        "no-bias-gelu-fusion no-bias-swiglu-fusion no-bias-dropout-fusion no-rope-fusion no-persist-layer-norm "
        "use-flashinfer-fused-rope "
        "no-gradient-accumulation-fusion cross-entropy-loss-fusion cross-entropy-fusion-impl disable-jit-fuser "
        "manual-gc manual-gc-interval empty-unused-memory-level num-workers no-mmap-bin-files overlap-param-gather "
        "overlap-param-gather-with-optimizer-step no-align-param-gather no-align-grad-reduce tp-comm-overlap "
        "tp-comm-overlap-cfg no-overlap-p2p-communication defer-embedding-wgrad-compute wgrad-deferral-limit "
        "distributed-backend use-tp-pp-dp-mapping use-ring-exchange-p2p no-scatter-gather-tensors-in-pipeline "
        "num-distributed-optimizer-instances no-create-attention-mask-in-dataloader ddp-bucket-size ddp-num-buckets "
        "ddp-average-in-collective ddp-pad-buckets-for-high-nccl-busbw disable-gloo-process-groups "
        "high-priority-stream-groups enable-cuda-graph external-cuda-graph nccl-communicator-config-path "
        "use-nccl-ub use-sharp delay-wgrad-compute dataloader-type num-dataset-builder-threads te-rng-tracker "
        "moe-grouped-gemm moe-token-dispatcher-type moe-permute-fusion moe-router-fusion moe-enable-deepep "
        "moe-flex-dispatcher-backend moe-shared-expert-overlap overlap-moe-expert-parallel-comm "
        "moe-use-legacy-grouped-gemm rope-type-fusion use-precision-aware-optimizer lazy-mpu-init "
        "microbatch-group-size-per-virtual-pipeline-stage attention-softmax-in-fp32 cp-comm-type "
        "distribute-saved-activations fsdp-double-buffer init-model-with-meta-device suggested-communication-unit-size "
        "no-gradient-reduce-div-fusion align-grad-reduce align-param-gather batch-p2p-communication "
        "memory-efficient-layer-norm moe-hybridep-num-sms moe-deepep-num-sms use-fused-weighted-squared-relu "
        "apply-query-key-layer-scaling hierarchical-context-parallel-sizes no-use-layer-wise-param-layout "
        "enable-experimental optimizer-cpu-offload optimizer-offload-fraction overlap-cpu-optimizer-d2h-h2d",
    ),
    (
        "is not needed",
        "it is always so",
        "accumulate-allreduce-grads-in-fp32 exit-signal-handler log-interval log-throughput log-progress "
        "no-one-logger use-distributed-ckpt use-dist-ckpt ckpt-format dist-ckpt-format auto-detect-ckpt-format "
        "tensorboard-log-interval tensorboard-queue-size check-for-nan-in-loss-and-grad async-save deterministic-mode "
        "use-cpu-initialization local-rank no-position-embedding save-retain-interval "
        "use-persistent-ckpt-worker train-sync-interval",
    ),
    (
        "is not needed",
        "every step, with its time, loss and gradient norm, is an event in RUN/events.jsonl",
        "log-params-norm log-num-zeros-in-grad log-timers-to-tensorboard log-memory-to-tensorboard "
        "log-validation-ppl-to-tensorboard log-world-size-to-tensorboard log-loss-scale-to-tensorboard "
        "timing-log-level timing-log-option log-learning-rate-to-tensorboard log-batch-size-to-tensorboard "
        "no-log-learning-rate-to-tensorboard no-log-loss-scale-to-tensorboard logging-level log-energy "
        "log-device-memory-used log-memory-interval",
    ),
    (
        "is lost",
        "how checkpoints are written and read is not a setting",
        "ckpt-fully-parallel-save ckpt-fully-parallel-load ckpt-assume-constant-structure no-ckpt-fully-parallel-save "
        "dist-ckpt-strictness dist-ckpt-optim-fully-reshardable no-save-optim no-save-rng non-persistent-save-interval "
        "use-checkpoint-args use-checkpoint-opt-param-scheduler override-opt-param-scheduler verify-integrity "
        "async-ckpt-use-cpu-shm async-strategy non-persistent-ckpt-type replication use-mp-args-from-checkpoint-args "
        "no-use-tokenizer-model-from-checkpoint-args exit-on-missing-checkpoint",
    ),
    (
        "is lost",
        "a run begins with new weights, or with those of training.init_from, a torch_dist checkpoint",
        "load finetune no-load-optim no-load-rng ckpt-step pretrained-checkpoint",
    ),
    (
        "is lost",
        "debugging and tests of the machine are not settings",
        "profile profile-step-start profile-step-end profile-ranks use-pytorch-profiler rerun-mode "
        "error-injection-rate error-injection-type log-straggler straggler-minmax-count straggler-ctrlr-port "
        "disable-straggler-on-startup check-weight-hash-across-dp-replicas-interval test-mode record-memory-history "
        "memory-snapshot-path enable-ft-package calc-ft-timeouts adlr-autoresume adlr-autoresume-interval "
        "exit-interval no-check-for-nan-in-loss-and-grad check-for-spiky-loss check-for-large-grads "
        "skip-train eval-global-batch-size eval-micro-batch-size full-validation iterations-to-skip "
        "nvtx-ranges config-logger-dir enable-one-logger",
    ),
    (
        "is lost",
        "weights and gradients are kept in fp32, and gradients are reduced in fp32",
        "grad-reduce-in-bf16 main-grads-dtype main-params-dtype exp-avg-dtype exp-avg-sq-dtype "
        "ddp-reduce-scatter-with-fp32-accumulation",
    ),
    (
        "changes the training",
        "latent attention is not read from arguments: write model.latent_attention",
        "multi-latent-attention q-lora-rank kv-lora-rank qk-head-dim qk-pos-emb-head-dim v-head-dim "
        "mscale mscale-all-dim rotary-scaling-factor",
    ),
    (
        "changes the training",
        "layers are alike, and attention is the usual one",
        "heterogeneous-layers-config-path linear-attention-freq "
        "experimental-attention-variant "
        "hybrid-override-pattern hybrid-layer-pattern hybrid-attention-ratio hybrid-mlp-ratio attention-output-gate "
        "no-rope-freq softmax-type qk-clip qk-l2-norm spec is-hybrid-model rotary-interleaved "
        "apply-residual-connection-post-layernorm fp32-residual-connection glu-linear-offset "
        "activation-func-clamp-value quick-geglu",
    ),
    (
        "changes the training",
        "there is no multi-token prediction",
        "mtp-num-layers mtp-loss-scaling-factor mtp-use-repeated-layer",
    ),
    ("changes the training", "weights begin with a standard deviation of 0.02", "init-method-xavier-uniform"),
    (
        "changes the training",
        "the arithmetic is bf16",
        "loss-scale initial-loss-scale min-loss-scale loss-scale-window hysteresis fp16-lm-cross-entropy "
        "first-last-layers-bf16 num-layers-at-start-in-bf16 num-layers-at-end-in-bf16",
    ),
    (
        "changes the training",
        "embeddings have the learning rate of all other weights",
        "decoupled-lr decoupled-min-lr use-mup mup-base-hidden-size",
    ),
    (
        "changes the training",
        "the learning rate begins at 0",
        "lr-warmup-init",
    ),
    (
        "changes the training",
        "weight decay is the same for the whole run, and spares vectors",
        "start-weight-decay end-weight-decay weight-decay-incr-style apply-wd-to-qk-layernorm "
        "no-weight-decay-cond-type",
    ),
    ("is not needed", "rotary positions have no limit", "max-position-embeddings"),
    ("is not needed", "files for TensorBoard are in RUN/tensorboard", "tensorboard-dir"),
    (
        "is not needed",
        "the loss of a step is the mean over its tokens, which is the same unless tokens are masked",
        "calculate-per-token-loss",
    ),
    ("changes the training", "norms hold their weights, and weight decay spares them", "apply-layernorm-1p"),
    (
        "changes the training",
        "text is read in order, each sequence once",
        "fim-data fim-rate fim-spm-rate sft",
    ),
    (
        "is lost",
        "stages of a pipeline have equally many layers, or the first and the last have fewer",
        "decoder-first-pipeline-num-layers decoder-last-pipeline-num-layers pipeline-model-parallel-layout "
        "account-for-embedding-in-pipeline-split account-for-loss-in-pipeline-split",
    ),
    ("is not needed", "the vocabulary is padded to a multiple of 128 in every layout", "padded-vocab-size"),
)
_PREFIXES: tuple[tuple[Effect, str, str], ...] = (
    ("changes the training", "the arithmetic is bf16", "fp8- fp4-"),
    ("changes the training", "no field of `model.router` says this", "moe-"),
    ("changes the training", "the optimizer is another", "muon- sgd-"),
    ("changes the training", "this is pretraining, not reinforcement learning", "rl- grpo- langrl- perform-rl"),
    (
        "is not needed",
        "it is not about training",
        "inference- bert- vision- retriever- ict- dino- swin-",
    ),
    ("is lost", "how a model is exported or distilled is not a setting", "export-"),
    ("is lost", "the machine is watched and restarted by `launch.max_restarts`", "inprocess- ft- nvrx- straggler-"),
    ("is not needed", "it is about speed, and the same is computed", "cuda-graph- tp-comm- megatron-fsdp-"),
    ("is lost", "figures go to the trackers of `tracking`", "wandb- log- one-logger- comet- mlflow- app-tag-"),
    ("is lost", "the tokenizer is a `tokenizer.json`", "tiktoken- tokenizer-"),
    ("changes the training", "the linear attention of some layers is not built", "linear- mamba- dsa-"),
)
_BY_NAME = {f"--{name}": (effect, reason) for effect, reason, names in _NAMES for name in names.split()}


def unmapped(argument: str) -> tuple[Effect, str] | None:
    """What it means that an argument, `--name`, has no field, and why. None for one that is not known here."""
    if argument in _BY_NAME:
        return _BY_NAME[argument]
    for effect, reason, prefixes in _PREFIXES:
        if any(argument.startswith(f"--{prefix}") for prefix in prefixes.split()):
            return effect, reason
    return None
