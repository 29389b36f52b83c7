# qpref in a container, for a CPU or, with the NVIDIA Container Toolkit, for GPUs.
#
#     docker build -t qpref .
#     docker run --rm --gpus all -v "$PWD":/data -v qpref-cache:/cache qpref train my.toml
#
# Without a GPU, leave out --gpus. torch's wheels for Linux bring CUDA's libraries; the host needs NVIDIA's driver alone.
FROM python:3.11-slim

ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 QPREF_CACHE=/cache/qpref HF_HOME=/cache/huggingface

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY qpref ./qpref
COPY plugins ./plugins
RUN pip install .

# Files that a run writes into /data belong to this user; `--user "$(id -u):$(id -g)"` makes them yours.
RUN useradd --create-home --uid 1000 qpref && mkdir -p /cache /data && chmod 1777 /cache /data
COPY recipes /recipes
USER qpref
WORKDIR /data
VOLUME /cache
ENTRYPOINT ["qpref"]
CMD ["--help"]
