# nemo_slam on NVIDIA's PyTorch container, which brings torch, Transformer Engine and apex.
#
#   docker build -t nemo_slam .
#   docker run --gpus all --ipc=host -v DATA:/workspace/nemo_slam/data -v RUNS:/workspace/nemo_slam/runs nemo_slam \
#       python3 scripts/speech_pretrain.py --config-name slam_stage1
#
# Any base with Python 3.11 or newer and pip will do: --build-arg BASE_IMAGE=... Without torch in it, torch comes from the
# package index, as constraints.txt pins it.
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:26.02-py3
# hadolint ignore=DL3006
FROM ${BASE_IMAGE}

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]

# The base's own constraint file pins what its makers tested; ours is made from it below and lets NeMo in.
ENV PIP_CONSTRAINT="" \
    PIP_BREAK_SYSTEM_PACKAGES=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore

USER 0
WORKDIR /workspace/nemo_slam

# Requirements first: this large layer is rebuilt only when they change.
COPY pyproject.toml constraints.txt ./
COPY docker ./docker
RUN python3 docker/base_packages.py pin /opt/base-packages.txt constraints.txt /opt/constraints.txt \
 && python3 docker/base_packages.py requirements /tmp/requirements.txt \
 && python3 -m pip install --constraint /opt/constraints.txt --requirement /tmp/requirements.txt \
 && python3 docker/base_packages.py check /opt/base-packages.txt \
 && rm /tmp/requirements.txt

COPY . .
RUN python3 -m pip install --no-deps --editable . \
 && python3 docker/base_packages.py check /opt/base-packages.txt \
 && useradd --create-home --uid 10001 slam \
 && mkdir -p data runs \
 && chown slam:slam . data runs

# The Makefile uses this interpreter instead of making .venv; a later `pip install` cannot replace the base's packages either.
# Caches lie where any user of `docker run --user` may write, one without a home folder too: Numba ends the run otherwise.
ENV READY_PYTHON=python3 \
    PIP_CONSTRAINT=/opt/base-packages.txt \
    NUMBA_CACHE_DIR=/tmp/numba \
    TRITON_CACHE_DIR=/tmp/triton
USER 10001

HEALTHCHECK --interval=5m --timeout=1m --start-period=1m CMD ["python3", "-c", "import torch, slam_kernels, nemo_slam"]
CMD ["python3", "scripts/speech_pretrain.py", "--config-name", "slam_stage1"]
