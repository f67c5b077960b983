#!/usr/bin/env bash
# check_on_gpu.sh [LOGS]: everything that needs a GPU, in one call. Builds for this GPU, then runs
# the C++ and the Python CUDA tests, compute-sanitizer over a reduced matrix, and the benchmarks
# beside cuDNN. A line for each piece; whole logs and results in the folder LOGS (build/gpu/logs).
#
# PARTS="tests sanitizers" leaves the others out. PYTHON needs torch, transformers, pybind11 and
# pytest; CMake must find GoogleTest and Google Benchmark (CMAKE_PREFIX_PATH).
set -uo pipefail
cd "$(dirname "$0")/.."

build=build/gpu
logs=$(realpath -m "${1:-$build/logs}")
parts=${PARTS:-tests python sanitizers benchmarks}
python=$(command -v "${PYTHON:-python3}") || { echo "${PYTHON:-python3}: not found"; exit 1; }
if ! architecture=$(tools/gpu_architecture.sh); then
  echo "No NVIDIA GPU found (nvidia-smi lists none). \`make cuda-compile\` compiles without one."
  exit 1
fi
mkdir -p "$logs"
# A test that finds no GPU is a failure here; none asks a model hub.
export TURBOQUANT_REQUIRE_GPU=1 HF_HUB_OFFLINE=1

failed=0
begun=()

# begin NAME COMMAND...: in the background, with a log of its own.
begin() {
  local name=$1
  shift
  ("$@" >"$logs/$name.log" 2>&1; echo $? >"$logs/$name.status") &
  begun+=("$name")
}

# finish PATTERN: wait for all that has begun; of each its status and the last line like PATTERN.
finish() {
  local name status
  wait
  for name in "${begun[@]}"; do
    status=$(<"$logs/$name.status")
    [ "$status" = 0 ] || failed=$((failed + 1))
    echo "$SECONDS s, $name: exit $status, $(grep -E "$1" "$logs/$name.log" | tail -n 1)"
  done
  begun=()
}

wanted() { [[ " $parts " == *" $1 "* ]]; }

build_all() {
  cmake --preset release -B "$build" -DTQ_ENABLE_CUDA=ON "-DTQ_CUDA_ARCHITECTURES=$architecture" \
    -DTQ_BUILD_PYTHON=ON "-DPython_EXECUTABLE=$python" -DTQ_INSTALL=OFF &&
    cmake --build "$build" --parallel "$(nproc)" --target turboquant_cuda_tests \
      turboquant_cuda_benchmarks tq_python_core tq_torch_ops
}
begin build build_all
finish '^\[|[Ee]rror'
[ "$failed" = 0 ] || { tail -n 40 "$logs/build.log"; exit 1; }
tests=$build/tests/cuda/turboquant_cuda_tests
benchmarks=$build/bench/cuda/turboquant_cuda

if wanted tests; then
  shards=6 # they share one GPU and check on the CPU
  for ((i = 0; i < shards; i++)); do
    begin "tests-$i" env GTEST_TOTAL_SHARDS=$shards GTEST_SHARD_INDEX=$i "$tests"
  done
  finish 'PASSED|FAILED TEST'
fi

if wanted python; then
  while read -r file; do
    begin "python-$(basename "$file" .py)" env PYTHONPATH=$build/python "$python" -m pytest "$file" \
      -q -p no:cacheprovider
  done < <(find tests/python -name '*_cuda.py')
  finish ' in [0-9.]+s'
fi

if wanted sanitizers; then
  attention='CudaDecodeAttention.TheDefaultRecipe:CudaDecodeAttention.RaggedAndEmptyRows'
  attention+=':CudaDecodeAttention.SlidingWindowSoftcapAndSinkLogits:CudaSharedPages.RaggedAndEmptyRows'
  attention+=':CudaDecodeAttention.PoisonedTokensReachOnlyTheQueriesThatSeeThem'
  whole_splits='CudaDecodeAttention.BitsDoNotDependOnWhoTakesASplit'
  extend='CudaExtendAttention.TheDefaultRecipe:CudaExtendAttention.RaggedAndEmptyRows'
  codec='HeadDims/CudaEncodeAppend*/80:HeadDims/CudaDequantize*/80:CudaFixedAppend.Replays*'
  # sanitize NAME TOOL TESTS: the longest take three minutes alone.
  sanitize() {
    local barriers=()
    [ "$2" != synccheck ] || barriers=(--num-cuda-barriers 200000)
    begin "$2-$1" timeout 900 compute-sanitizer --tool "$2" "${barriers[@]}" --error-exitcode 1 \
      "$tests" "--gtest_filter=$3"
  }
  for tool in memcheck racecheck initcheck synccheck; do
    sanitize attention $tool "$attention"
    sanitize extend $tool "$extend"
    sanitize codec $tool "$codec"
  done
  sanitize whole-splits memcheck "$whole_splits"
  sanitize whole-splits racecheck "$whole_splits"
  finish 'ERROR SUMMARY|RACECHECK SUMMARY'
fi

if wanted benchmarks; then
  # measure NAME COMMAND...: alone, for it is timed.
  measure() {
    begin "$@"
    finish '.'
    cat "$logs/$1.log"
  }
  measure decode-attention "${benchmarks}_decode_attention_bench" --only "fp16 scales" \
    --replays 31 --json "$logs/decode_attention.json"
  measure cudnn "$python" bench/cuda/decode_attention_baseline.py "$logs/decode_attention.json" \
    --output "$logs/decode_attention_table.json"
  measure decode-shapes "${benchmarks}_decode_attention_bench" --only "4+4 fp16 scales" --more 1 \
    --replays 31 --json "$logs/decode_shapes.json"
  measure decode-step "${benchmarks}_decode_step_bench"
  measure encode "${benchmarks}_encode_bench"
fi

echo "$failed failed; logs in $logs"
[ "$failed" = 0 ]
