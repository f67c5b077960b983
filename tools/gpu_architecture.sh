#!/usr/bin/env bash
# Prints what TQ_CUDA_ARCHITECTURES calls this machine's first NVIDIA GPU; fails where there is none.
set -euo pipefail
nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null |
  sed -n '1 { s/\.//; s/^90$/90a/; p }'
