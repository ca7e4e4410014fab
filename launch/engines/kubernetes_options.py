"""What the Kubernetes engine takes in `launch.options`."""

from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, ValidationInfo, field_validator, model_validator

from launch.engines.base import EngineOptions
from launch.engines.environment import EnvironmentName, check_names, check_variables

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$")]
"""A name of an object in Kubernetes."""
Quantity = str | int
"""As Kubernetes writes it: 8, "500m", "64Gi"."""
Label = Annotated[str, Field(pattern=r"^([a-z0-9.-]{1,253}/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$")]
"""A key of a label or an annotation."""
LabelValue = Annotated[str, Field(pattern=r"^([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?$")]


Place = Annotated[str, Field(pattern=r"^/[A-Za-z0-9._/-]*$")]
"""An absolute path in the pods."""


class KubernetesOptions(EngineOptions):
    """What the job runs in, and where it may run."""

    image: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@-]*$", max_length=500)
    """Container image with copus, torch and megatron-core in it."""
    claim: Name
    """PersistentVolumeClaim (ReadWriteMany for several nodes) that runs and data lie on."""
    mount: str = Field(pattern=r"^/[A-Za-z0-9._/-]*$")
    """Where the claim is mounted, in the pods and on the machine that submits: an absolute path. launch.runs, data and
    profile.table have to be below it."""
    namespace: Name = "default"
    """Namespace of the job, and of the claim."""
    context: str | None = None
    """Context of the kubeconfig; else the current one, or that of the pod that submits."""
    runtime: Name | None = None
    """ClusterTrainingRuntime that the job is built on, one with torch's policy; else a TrainingRuntime of the job's
    own, in its namespace, in which evictions do not count as failures."""
    python: str = "python3"
    """Python in the image."""
    accelerator_resource: str = Field(default="nvidia.com/gpu", pattern=r"^[a-z0-9./-]+$")
    """What the cluster calls an accelerator."""
    resources: dict[str, Quantity] = Field(default_factory=dict)
    """Resources of a node of the job, requested and limited alike: {memory: 64Gi}. Accelerators and CPUs (at
    least 8 for each GPU) follow from the job unless they are named."""
    env: dict[EnvironmentName, str] = Field(default_factory=dict)
    """Environment variables. No secrets: everybody who may read jobs can read these."""
    secrets: dict[EnvironmentName, Annotated[str, Field(pattern=r"^[a-z0-9.-]+/[A-Za-z0-9._-]+$")]] = Field(
        default_factory=dict
    )
    """Environment variables from secrets in the namespace: {WANDB_API_KEY: SECRET/KEY}."""
    service_account: Name | None = None
    """Service account of the pods; else the namespace's."""
    image_pull_secrets: list[Name] = Field(default_factory=list)
    """Secrets that the image is pulled with."""
    labels: dict[Label, LabelValue] = Field(default_factory=dict)
    """Labels of the TrainJob and its pods: {kueue.x-k8s.io/queue-name: research, kueue.x-k8s.io/priority-class: high}.
    """
    annotations: dict[Label, str] = Field(default_factory=dict)
    """Annotations of the TrainJob and its pods."""
    volumes: dict[Name, Place] = Field(default_factory=dict)
    """Further PersistentVolumeClaims that the pods may read, and where they have them: {corpora: /corpora}."""
    capabilities: list[Annotated[str, Field(pattern=r"^[A-Z_]+$")]] = Field(default_factory=list)
    """Linux capabilities of the containers: [IPC_LOCK], which RDMA needs to pin memory."""
    node_selector: dict[str, str] = Field(default_factory=dict)
    """Labels that nodes need to have."""
    tolerations: list[dict[Literal["key", "operator", "value", "effect", "tolerationSeconds"], str | int]] = Field(
        default_factory=list
    )
    """Taints of nodes that the pods put up with: [{key: gpu, operator: Exists}]."""
    priority_class: Name | None = None
    """Priority class of the pods. Needs a runtime of the job's own."""
    host_network: bool = False
    """Whether the pods use the network of their nodes, as some RDMA networks want it. Needs a runtime of the job's own.
    """
    topology_key: Label | None = None
    """Label of nodes that has the same value on all nodes of the job: topology.kubernetes.io/zone, or that of a rack.
    """
    max_requeues: NonNegativeInt = 3
    """Starts in a row without a new checkpoint, evictions not counted, after which the job fails for good."""
    grace_seconds: int = Field(default=120, gt=0, le=86_400)
    """Time for a checkpoint when a pod is evicted: its terminationGracePeriodSeconds."""

    @field_validator("mount")
    @classmethod
    def _plain(cls, value: str) -> str:
        if ".." in PurePosixPath(value).parts or value.rstrip("/") == "":
            raise ValueError(f"{value!r} is no folder to mount a volume at")
        return value.rstrip("/")

    @field_validator("env")
    @classmethod
    def _not_secret(cls, value: dict[str, str]) -> dict[str, str]:
        check_variables(value, "name the one in the cluster, secrets: {{{name}: SECRET/KEY}}")
        return value

    @field_validator("secrets")
    @classmethod
    def _not_overridden(cls, value: dict[str, str], info: ValidationInfo) -> dict[str, str]:
        check_names(value)
        for name in value:
            if name in info.data.get("env", {}):
                raise ValueError(f"{name} is in env too")
        return value

    @model_validator(mode="after")
    def _of_own_runtime(self) -> "KubernetesOptions":
        for name, value in (("priority_class", self.priority_class), ("host_network", self.host_network)):
            if value and self.runtime is not None:
                raise ValueError(f"{name}({value}): a job cannot change this in runtime({self.runtime}): set it there")
        return self

    @field_validator("volumes")
    @classmethod
    def _places(cls, value: dict[str, str], info: ValidationInfo) -> dict[str, str]:
        taken = {info.data.get("mount", ""): "mount", "/dev/shm": "the shared memory"}
        for claim, place in value.items():
            path = PurePosixPath(place)
            if ".." in path.parts or path == PurePosixPath("/"):
                raise ValueError(f"{claim}({place}) is no folder to mount a volume at")
            if str(path) in taken:
                raise ValueError(f"{claim}({place}) is the place of {taken[str(path)]} already")
            taken[str(path)] = claim
        return value
