# The image that `launch.options.image` of a Kubernetes job names, or a container of Slurm's: docker build --tag copus .
# On GPUs the torch of the package index brings its CUDA libraries; only the driver has to be on the nodes. A vendor's
# image with a torch of its own: --build-arg BASE=… --build-arg CONSTRAINTS=
ARG BASE=python:3.11-slim

FROM ${BASE} AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY copus copus
COPY planner planner
COPY profiles profiles
COPY launch launch
RUN python3 -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM ${BASE}
# torch.compile and DeepSpeed compile kernels when they are first used.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
ARG EXTRAS=data,deepspeed,fsdp,wandb
ARG CONSTRAINTS=constraints.txt
COPY constraints.txt /tmp/
COPY --from=build /wheels /wheels
RUN cd /tmp && python3 -m pip install --no-cache-dir ${CONSTRAINTS:+--constraint "$CONSTRAINTS"} \
        "$(echo /wheels/copus-*.whl)[${EXTRAS}]" \
    && rm -r /wheels /tmp/constraints.txt \
    && python3 -c 'import copus.worker, launch.engines.kubernetes_node, launch.engines.slurm_node'
CMD ["copus", "--help"]
