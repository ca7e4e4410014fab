"""The TrainJob (trainer.kubeflow.org/v1alpha1) of a job, built with the models of Kubeflow's API."""

import re
from pathlib import Path
from typing import Any

from copus.job import JobConfig
from launch.engines.agent import agent_environment
from launch.engines.base import usual_cpus_per_node
from launch.engines.kubernetes_options import KubernetesOptions

LONGEST = 40
"""Characters of a job's name: pods are called NAME-node-0-0, and that has to be a host name."""
STEP = "node"
"""What Kubeflow's torch runtimes call their job, and its container."""
VOLUME = "copus"
SHARED_MEMORY = "shared-memory"
MODULE = "launch.engines.kubernetes_node"


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
        api_version="trainer.kubeflow.org/v1alpha1",
        kind="TrainJob",
        metadata=models.IoK8sApimachineryPkgApisMetaV1ObjectMeta(
            name=name,
            namespace=options.namespace,
            labels={**options.labels, "app.kubernetes.io/managed-by": "copus"},
            annotations=options.annotations or None,
        ),
        spec=models.TrainerV1alpha1TrainJobSpec(
            runtime_ref=models.TrainerV1alpha1RuntimeRef(
                api_group="trainer.kubeflow.org", kind="ClusterTrainingRuntime", name=options.runtime
            ),
            trainer=trainer,
            runtime_patches=[_patch(options)],
        ),
    )
    values: dict[str, Any] = made.to_dict()
    return values


def _environment(name: str, job: JobConfig, options: KubernetesOptions) -> list[Any]:
    """Environment of the container; the runtime adds PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR and the like."""
    from kubeflow_trainer_api import models

    plain = {**options.env, **agent_environment(job, options.env), "COPUS_JOB": name, "PYTHONSAFEPATH": "1"}
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


def _patch(options: KubernetesOptions) -> Any:
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
    for number, (name, place) in enumerate(options.volumes.items()):
        further = models.IoK8sApiCoreV1PersistentVolumeClaimVolumeSource(claim_name=name, read_only=True)
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
