# CPU:   docker build -t megatron_infer .
# CUDA:  docker build -t megatron_infer --build-arg BASE=nvidia/cuda:13.0.1-cudnn-devel-ubuntu24.04 .
# Run:   docker run --rm --ipc=host -v /path/to/checkpoint:/model megatron_infer --nproc_per_node 2 sess_megatron.py --model_dir /model
# Serve: docker build -t megatron_infer_serve --target serve . && docker run --rm --ipc=host -p 127.0.0.1:8012:8012 \
#          -v DIR:/model -v KEYS:/keys:ro megatron_infer_serve --model_dir /model --api_key_file /keys
# --ipc=host (or --shm-size=1g): ranks of one host talk through /dev/shm.
ARG BASE=python:3.12-slim-bookworm
FROM ${BASE} AS base
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv python3-dev g++ make \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home engine
USER engine
WORKDIR /home/engine/megatron_infer
COPY --chown=engine . .
RUN make .venv/.built
ENV PATH=/home/engine/megatron_infer/.venv/bin:$PATH

FROM base AS serve
RUN make .venv/.serve
EXPOSE 8012
ENTRYPOINT ["python", "-m", "megatron_infer", "serve", "--host", "0.0.0.0"]

FROM base
ENTRYPOINT ["torchrun", "--standalone"]
CMD ["--nproc_per_node", "1", "sess_megatron.py"]
