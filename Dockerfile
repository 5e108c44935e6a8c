# CPU image:  docker build -t lightning_opt .
# CUDA image: docker build -t lightning_opt --build-arg BASE=nvidia/cuda:13.0.1-runtime-ubuntu24.04 .
ARG BASE=python:3.12-slim
FROM ${BASE}

# torch is named apart from the rest, so that a CPU build can be given: --build-arg TORCH="torch==2.13.0+cpu --index-url <PyTorch's CPU index>"
ARG TORCH=torch==2.13.0
ENV DEBIAN_FRONTEND=noninteractive PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1

# g++ lets torch.compile build the fused optimizer step on CPUs; util-linux gives the evaluation sandbox its namespaces
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ git make util-linux $(command -v python3 >/dev/null || echo python3 python3-dev python3-venv) \
 && (python3 -m venv --help >/dev/null 2>&1 || apt-get install -y --no-install-recommends python3-venv) \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 10001 lightning

USER lightning
WORKDIR /home/lightning/lightning_opt
RUN python3 -m venv /home/lightning/venv
ENV PATH=/home/lightning/venv/bin:$PATH
RUN pip install ${TORCH}
COPY --chown=lightning pyproject.toml constraints.txt README.md ./
COPY --chown=lightning lightning_opt lightning_opt
RUN pip install -c constraints.txt -e '.[run]'
COPY --chown=lightning . .

ENTRYPOINT ["python", "train.py"]
