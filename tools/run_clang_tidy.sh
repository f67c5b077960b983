#!/usr/bin/env bash
# run_clang_tidy.sh BUILD_DIR [SECONDS]: clang-tidy over the library's units that BUILD_DIR's
# compile commands name, in parallel. Units not begun after SECONDS are named and left out, so that
# a slow machine still gets an answer.
set -euo pipefail
export build_dir=$1
export deadline=$((EPOCHSECONDS + ${2:-3600}))

if ! command -v clang-tidy >/dev/null; then
  echo "clang-tidy not found (apt-get install clang-tidy): nothing checked"
  exit 0
fi

check() {
  if [ "$EPOCHSECONDS" -ge "$deadline" ]; then
    echo "not checked for lack of time: $1"
    return 0
  fi
  # g++'s own warning flags mean nothing to clang.
  clang-tidy --quiet -p "$build_dir" --warnings-as-errors='*' \
    --extra-arg=-Wno-unknown-warning-option "$1" 2>/dev/null
}
export -f check

# The tests' units cost ten times as much, GoogleTest's macros being what they are; the headers are
# checked through the library's.
mapfile -t units < <(git ls-files 'src/*.cpp' | while read -r unit; do
  grep -qF "$PWD/$unit\"" "$build_dir/compile_commands.json" && echo "$unit"
done)
echo "clang-tidy: ${#units[@]} units"
[ "${#units[@]}" -gt 0 ]
printf '%s\0' "${units[@]}" | xargs -0 -P "$(nproc)" -n 1 bash -c 'check "$1"' check
