#!/usr/bin/env bash
# Serves the model directory $MODEL on 127.0.0.1:$PORT from what install.sh put into $ENGINES.
set -euo pipefail
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
export PATH="$ENGINES/vllm/bin:$PATH"
PYTHONPATH=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/sglang_site
export PYTHONPATH
exec python -m sglang.launch_server --model-path "$MODEL" --served-model-name base \
  --host 127.0.0.1 --port "$PORT" --device cpu --dtype bfloat16 \
  --attention-backend torch_native --sampling-backend pytorch --lora-backend torch_native \
  --cuda-graph-backend-decode disabled --cuda-graph-backend-prefill disabled \
  --disable-overlap-schedule --skip-server-warmup --mem-fraction-static 0.4 \
  --max-total-tokens 2048 --context-length 256 --enable-lora --max-lora-rank 16 \
  --lora-target-modules q_proj k_proj v_proj o_proj gate_proj up_proj down_proj \
  --max-loras-per-batch 2 --max-loaded-loras 4 "$@"
