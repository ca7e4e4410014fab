"""The TrainJob (trainer.kubeflow.org/v1alpha1) of a job, and the TrainingRuntime below it, built with the models of
Kubeflow's API."""

import re
from pathlib import Path
from typing import Any

from copus.job import JobConfig
from launch.engines.agent import agent_environment
from launch.engines.base import usual_cpus_per_node
from launch.engines.kubernetes_options import KubernetesOptions
from launch.engines.requeues import AGAIN, HOPELESS

LONGEST = 40
"""Characters of a job's name: pods are called NAME-node-0-0, and that has to be a host name."""
STEP = "node"
"""What Kubeflow's torch runtimes call their job, and its container."""
VOLUME = "copus"
JOBSET_LABEL = "jobset.sigs.k8s.io/jobset-name"
"""On the pods of a job; the JobSet below a TrainJob has its name."""
SHARED_MEMORY = "shared-memory"
MODULE = "launch.engines.kubernetes_node"
API_VERSION = "trainer.kubeflow.org/v1alpha1"
FAILURES_PER_NODE = 6
"""Failures of pods that Kubernetes counts, and takes, for each node of a job: those that copus itself did not see."""


def job_name(run: Path, suffix: str) -> str:
    """A name for a job of a run, one that a host can have; `suffix`, letters and digits, tells it from others."""
    plain = re.sub(r"[^a-z0-9]+", "-", run.name.lower()).strip("-")
    return f"{f'copus-{plain}'[: LONGEST - 1 - len(suffix)].rstrip('-')}-{suffix}"


def train_job(name: str, run: Path, job: JobConfig, options: KubernetesOptions) -> dict[str, Any]:
    """The manifest, as plain values. Nothing of this machine's environment is in it."""
    from kubeflow_trainer_api import models

    trainer = models.TrainerV1alpha1Trainer(
        image=options.image,
        command=[options.python, "-m", MODULE],
        args=[str(run)],
        env=_environment(name, job, options),
        num_nodes=job.cluster.nodes,
        num_proc_per_node=job.cluster.accelerators_per_node,
        resources_per_node=_resources(job, options),
    )
    made = models.TrainerV1alpha1TrainJob(
        api_version=API_VERSION,
        kind="TrainJob",
        metadata=models.IoK8sApimachineryPkgApisMetaV1ObjectMeta(
            name=name,
            namespace=options.namespace,
            labels={**options.labels, "app.kubernetes.io/managed-by": "copus"},
            annotations=options.annotations or None,
        ),
        spec=models.TrainerV1alpha1TrainJobSpec(
            runtime_ref=models.TrainerV1alpha1RuntimeRef(
                api_group="trainer.kubeflow.org",
                kind="TrainingRuntime" if options.runtime is None else "ClusterTrainingRuntime",
                name=options.runtime or name,
            ),
            trainer=trainer,
            runtime_patches=[_patch(name, options)],
        ),
    )
    values: dict[str, Any] = made.to_dict()
    return values


def training_runtime(name: str, job: JobConfig, options: KubernetesOptions) -> dict[str, Any]:
    """The runtime of a job that names none, as plain values: torch's policy, and what a TrainJob cannot say.

    A pod that ends to be started again (`AGAIN`), or that Kubernetes itself takes away, does not count as a failure, so
    that no number of evictions ends the job; one that says that another start is of no use (`HOPELESS`) ends it.
    """
    from kubeflow_trainer_api import models

    def on_exit(code: int) -> Any:
        return models.IoK8sApiBatchV1PodFailurePolicyOnExitCodesRequirement(
            container_name=STEP, operator="In", values=[code]
        )

    taken_away = models.IoK8sApiBatchV1PodFailurePolicyOnPodConditionsPattern(type="DisruptionTarget", status="True")
    rules = [
        models.IoK8sApiBatchV1PodFailurePolicyRule(action="FailJob", on_exit_codes=on_exit(HOPELESS)),
        models.IoK8sApiBatchV1PodFailurePolicyRule(action="Ignore", on_exit_codes=on_exit(AGAIN)),
        models.IoK8sApiBatchV1PodFailurePolicyRule(action="Ignore", on_pod_conditions=[taken_away]),
    ]
    pod = models.IoK8sApiCoreV1PodSpec(
        containers=[models.IoK8sApiCoreV1Container(name=STEP, image=options.image)],
        restart_policy="Never",  # a policy of failures needs that; the job makes a new pod
        priority_class_name=options.priority_class,
        host_network=options.host_network or None,
        dns_policy="ClusterFirstWithHostNet" if options.host_network else None,
    )
    step = models.IoK8sApiBatchV1JobTemplateSpec(
        metadata=models.IoK8sApimachineryPkgApisMetaV1ObjectMeta(
            labels={"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
        ),
        spec=models.IoK8sApiBatchV1JobSpec(
            backoff_limit=FAILURES_PER_NODE * job.cluster.nodes,
            pod_failure_policy=models.IoK8sApiBatchV1PodFailurePolicy(rules=rules),
            template=models.IoK8sApiCoreV1PodTemplateSpec(spec=pod),
        ),
    )
    made = models.TrainerV1alpha1TrainingRuntime(
        api_version=API_VERSION,
        kind="TrainingRuntime",
        metadata=models.IoK8sApimachineryPkgApisMetaV1ObjectMeta(
            name=name, namespace=options.namespace, labels={"app.kubernetes.io/managed-by": "copus"}
        ),
        spec=models.TrainerV1alpha1TrainingRuntimeSpec(
            ml_policy=models.TrainerV1alpha1MLPolicy(
                num_nodes=job.cluster.nodes, torch=models.TrainerV1alpha1TorchMLPolicySource()
            ),
            template=models.TrainerV1alpha1JobSetTemplateSpec(
                spec=models.JobsetV1alpha2JobSetSpec(
                    replicated_jobs=[models.JobsetV1alpha2ReplicatedJob(name=STEP, template=step)]
                )
            ),
        ),
    )
    values: dict[str, Any] = made.to_dict()
    return values


def _environment(name: str, job: JobConfig, options: KubernetesOptions) -> list[Any]:
    """Environment of the container; the runtime adds PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR and the like."""
    from kubeflow_trainer_api import models

    plain = {**options.env, **agent_environment(job, options.env), "COPUS_JOB": name}
    variables = [models.IoK8sApiCoreV1EnvVar(name=key, value=value) for key, value in plain.items()]
    address = models.IoK8sApiCoreV1ObjectFieldSelector(field_path="status.podIP")
    sources = {"POD_IP": models.IoK8sApiCoreV1EnvVarSource(field_ref=address)}
    for variable, place in options.secrets.items():
        secret, _, key = place.partition("/")
        selector = models.IoK8sApiCoreV1SecretKeySelector(name=secret, key=key)
        sources[variable] = models.IoK8sApiCoreV1EnvVarSource(secret_key_ref=selector)
    return variables + [models.IoK8sApiCoreV1EnvVar(name=key, value_from=source) for key, source in sources.items()]


def _resources(job: JobConfig, options: KubernetesOptions) -> Any:
    from kubeflow_trainer_api import models

    ranks = job.cluster.accelerators_per_node
    wanted: dict[str, str | int] = {"cpu": usual_cpus_per_node(job)}
    if job.cluster.accelerator != "cpu":
        wanted[options.accelerator_resource] = ranks
    amounts = {
        name: models.IoK8sApimachineryPkgApiResourceQuantity(str(amount))
        for name, amount in (wanted | options.resources).items()
    }
    return models.IoK8sApiCoreV1ResourceRequirements(limits=amounts, requests=amounts)


def _together(name: str, topology_key: str) -> Any:
    """All pods of a job on nodes that have the same value of a label."""
    from kubeflow_trainer_api import models

    term = models.IoK8sApiCoreV1PodAffinityTerm(
        label_selector=models.IoK8sApimachineryPkgApisMetaV1LabelSelector(match_labels={JOBSET_LABEL: name}),
        topology_key=topology_key,
    )
    return models.IoK8sApiCoreV1Affinity(
        pod_affinity=models.IoK8sApiCoreV1PodAffinity(required_during_scheduling_ignored_during_execution=[term])
    )


def _patch(name: str, options: KubernetesOptions) -> Any:
    """What differs from the runtime: the volumes, and where the pods may run."""
    from kubeflow_trainer_api import models

    claim = models.IoK8sApiCoreV1PersistentVolumeClaimVolumeSource(claim_name=options.claim)
    # Containers have 64 MiB of /dev/shm unless told otherwise; NCCL needs more as soon as two ranks share a node.
    memory = models.IoK8sApiCoreV1EmptyDirVolumeSource(medium="Memory")
    mounts = [
        models.IoK8sApiCoreV1VolumeMount(name=VOLUME, mount_path=options.mount),
        models.IoK8sApiCoreV1VolumeMount(name=SHARED_MEMORY, mount_path="/dev/shm"),
    ]
    volumes = [
        models.IoK8sApiCoreV1Volume(name=VOLUME, persistent_volume_claim=claim),
        models.IoK8sApiCoreV1Volume(name=SHARED_MEMORY, empty_dir=memory),
    ]
    for number, (claim_name, place) in enumerate(options.volumes.items()):
        further = models.IoK8sApiCoreV1PersistentVolumeClaimVolumeSource(claim_name=claim_name, read_only=True)
        volume = f"{VOLUME}-{number}"
        volumes.append(models.IoK8sApiCoreV1Volume(name=volume, persistent_volume_claim=further))
        mounts.append(models.IoK8sApiCoreV1VolumeMount(name=volume, mount_path=place, read_only=True))
    security = None
    if options.capabilities:
        added = models.IoK8sApiCoreV1Capabilities(add=options.capabilities)
        security = models.IoK8sApiCoreV1SecurityContext(capabilities=added)
    pod = models.TrainerV1alpha1PodSpecPatch(
        containers=[
            models.TrainerV1alpha1ContainerPatch(
                name=STEP,
                volume_mounts=mounts,
                security_context=security,
            )
        ],
        volumes=volumes,
        termination_grace_period_seconds=options.grace_seconds,
        service_account_name=options.service_account,
        node_selector=options.node_selector or None,
        affinity=_together(name, options.topology_key) if options.topology_key else None,
        tolerations=[models.IoK8sApiCoreV1Toleration.from_dict(toleration) for toleration in options.tolerations]
        or None,
        image_pull_secrets=[models.IoK8sApiCoreV1LocalObjectReference(name=name) for name in options.image_pull_secrets]
        or None,
    )
    metadata = None
    if options.labels or options.annotations:
        metadata = models.IoK8sApimachineryPkgApisMetaV1ObjectMeta(
            labels=options.labels or None, annotations=options.annotations or None
        )
    job = models.TrainerV1alpha1JobTemplatePatch(
        spec=models.TrainerV1alpha1JobSpecPatch(
            template=models.TrainerV1alpha1PodTemplatePatch(metadata=metadata, spec=pod)
        )
    )
    step = models.TrainerV1alpha1ReplicatedJobPatch(name=STEP, template=job)
    template = models.TrainerV1alpha1JobSetTemplatePatch(
        spec=models.TrainerV1alpha1JobSetSpecPatch(replicated_jobs=[step])
    )
    return models.TrainerV1alpha1RuntimePatch(
        manager="copus.io/launch",
        training_runtime_spec=models.TrainerV1alpha1TrainingRuntimeSpecPatch(template=template),
    )
