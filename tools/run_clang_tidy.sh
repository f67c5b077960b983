#!/usr/bin/env bash
# run_clang_tidy.sh BUILD_DIR [SECONDS]: clang-tidy over the units of the library that BUILD_DIR's
# compile commands name, two at a time. With SECONDS, units not begun by then are left out and
# counted, so that a slow machine still gets an answer.
set -euo pipefail
build_dir=$1
limit_seconds=${2:-3600}

if ! command -v clang-tidy >/dev/null; then
  echo "clang-tidy not found (apt-get install clang-tidy): nothing checked"
  exit 0
fi

mapfile -t units < <(git ls-files 'src/*.cpp' 'python/csrc/core*.cpp' 'tests/*_test.cpp' |
  while read -r unit; do
    if grep -q "$PWD/$unit\"" "$build_dir/compile_commands.json"; then echo "$unit"; fi
  done)

export build_dir
status=0
printf '%s\n' "${units[@]}" | xargs -P "$(nproc)" -I{} bash -c '
  if [ "$(date +%s)" -ge "$0" ]; then echo "not checked for lack of time: {}"; exit 0; fi
  clang-tidy --quiet -p "$build_dir" --warnings-as-errors="*" "{}" 2>/dev/null
' "$(($(date +%s) + limit_seconds))" || status=1
echo "clang-tidy: ${#units[@]} units"
exit "$status"
