#!/usr/bin/env bash
# The steps of setting up, called by the Makefile:
#   environment      make .venv, install torch, then what building needs
#   package BUILD    install the package, editable, with all extras; CMake's folder is BUILD
#   library BUILD    put the library built in BUILD where the installed package looks for it
# Where everything is installed already, none of them needs a network.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { echo "lighthouse: $*" >&2; }
fail() { say "$*"; exit 1; }
install() { .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@"; }

check_compiler() {
  local source compiler tried=${CXX:-c++ g++ clang++}
  source=$(mktemp -d)
  trap 'rm -rf "$source"' RETURN
  printf '#include <bit>\n#include <concepts>\n#include <span>\nint main() { return std::popcount(0u); }\n' >"$source/main.cpp"
  for compiler in $tried; do
    if $compiler -std=c++20 -o "$source/main" "$source/main.cpp" 2>/dev/null; then return; fi
  done
  fail "a C++20 compiler is missing (tried: $tried). Install g++ 11 or later, or clang 14 or later, or set CXX."
}

# The first Python that is new enough, in `python`.
choose_python() {
  local tried=${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10 python}
  for python in $tried; do
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
      "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$python has no venv module. Install it (Debian, Ubuntu: apt-get install python3-venv), or set PYTHON."
      return
    fi
  done
  fail "Python 3.10 or later is missing (tried: $tried). Install it, or set PYTHON."
}

case $1 in
  environment)
    check_compiler
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
      choose_python
      say "making .venv with $("$python" --version)"
      "$python" -m venv .venv
    fi
    install "pip>=23.1"
    say "installing ${TORCH:=torch>=2.10} (the first time: some minutes and gigabytes)"
    install "$TORCH"
    install "scikit-build-core>=0.11" "cmake>=3.26" "ninja>=1.10"
    ;;
  package)
    say "building and installing the package and its extras"
    SKBUILD_BUILD_DIR=$2 SKBUILD_CMAKE_DEFINE="LIGHTHOUSE_WERROR=ON" install --no-build-isolation -e ".[train,dev]"
    ;;
  library)
    .venv/bin/cmake --install "$2" --component python \
      --prefix "$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("platlib"))')" >/dev/null
    ;;
  *)
    fail "unknown step: $1"
    ;;
esac
