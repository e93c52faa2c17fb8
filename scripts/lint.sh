#!/usr/bin/env bash
# clang-format, clang-tidy, ruff and mypy over the whole tree; a missing tool is named and skipped, a finding fails.
# Usage: lint.sh BUILD, a CMake folder with compile_commands.json.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
build=$1
failed=()

# Runs the check $1 with the tool $2, from .venv if it is there.
check() {
  local name=$1 tool=$2
  shift 2
  PATH=$PWD/.venv/bin:$PATH
  if ! command -v "$tool" >/dev/null; then
    echo "$name: skipped, $tool is missing"
  elif "$@"; then
    echo "$name: clean"
  else
    failed+=("$name")
  fi
}

cpp_files() { find include src tests/cpp bench/cpp examples/cpp "$@"; }
jobs=$(getconf _NPROCESSORS_ONLN)

format_cpp() { cpp_files -regex '.*\.\(h\|cpp\|cuh?\)' | xargs clang-format --dry-run -Werror; }
# The compiler's own warnings are the build's business (-w).
tidy_cpp() { cpp_files -name '*.cpp' | xargs -P "$jobs" -n 1 clang-tidy --quiet --extra-arg=-w -p "$build"; }

check clang-format clang-format format_cpp
check clang-tidy clang-tidy tidy_cpp
check "ruff check" ruff ruff check --quiet .
check "ruff format" ruff ruff format --quiet --check .
check mypy mypy mypy

if [ ${#failed[@]} -gt 0 ]; then
  echo "findings: ${failed[*]}"
  exit 1
fi
