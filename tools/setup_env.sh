#!/usr/bin/env bash
# Makes .venv with all that the project needs, and does nothing when it is there and up to date.
# PYTHON names the interpreter to make it with (3.10 to 3.12). To start over: rm -rf .venv
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

log=.venv/setup.log
stamp=.venv/ready        # written last, so that an interrupted set-up goes on where it stopped
needed_gb=10             # .venv takes 6 (CUDA build of torch), the downloads 3 more while pip unpacks them

say() { printf 'set-up: %s\n' "$*"; }
die() { printf 'set-up: %s\n' "$*" >&2; exit 1; }
version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

# What the environment depends on: these three files and, as the install is editable, the place of the repository.
wanted="$(cat constraints.txt setup.cfg tools/setup_env.sh | cksum) $PWD"
gpu=no
if [ -e /dev/nvidiactl ] || [ -e /dev/dxg ]; then gpu=yes; fi

is_ready() {  # an environment made where there is a GPU serves a machine without one, but not the other way round
  [ -x .venv/bin/python ] && [ -f "$stamp" ] || return 1
  local made
  made="$(cat "$stamp")"
  [ "$made" = "$wanted gpu=yes" ] || [ "$made" = "$wanted gpu=$gpu" ]
}

check_python_unchanged() {  # PYTHON must not be ignored in silence
  [ -n "${PYTHON:-}" ] && [ -x .venv/bin/python ] || return 0
  local asked made
  asked="$(version_of "$PYTHON")" || die "PYTHON=$PYTHON does not run; name a Python 3.10, 3.11 or 3.12."
  made="$(version_of .venv/bin/python)"
  [ "$asked" = "$made" ] || die "PYTHON=$PYTHON is Python $asked but .venv was made with $made; remove .venv (rm -rf .venv) to change it."
}

choose_python() {  # sets $python
  local candidate version found="" candidates=(python3 python3.12 python3.11 python3.10)
  if [ -n "${PYTHON:-}" ]; then candidates=("$PYTHON"); fi
  for candidate in "${candidates[@]}"; do
    version="$(version_of "$candidate")" || continue
    case "$version" in
      3.10 | 3.11 | 3.12) python="$candidate"; return ;;
    esac
    found="$found${found:+, }$candidate is $version"
  done
  die "Python 3.10, 3.11 or 3.12 is needed (found: ${found:-none that runs}); install one, or name it: PYTHON=/path/to/python3.11 make ..."
}

check_machine() {
  if [ -x .venv/bin/python ]; then
    python=.venv/bin/python
  elif [ -L .venv/bin/python ]; then
    die "the Python that .venv was made with is gone; remove .venv (rm -rf .venv) and run again."
  else
    choose_python
  fi
  local version
  version="$(version_of "$python")" || die "the Python of .venv does not run; remove .venv (rm -rf .venv) and run again."

  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    die "$python (Python $version) lacks the venv module; install it (Debian, Ubuntu: apt install python$version-venv), or name another Python: PYTHON=..."

  local compiler
  for compiler in ${CXX:-c++ g++ clang++}; do  # of CXX="ccache g++" the first word is enough
    if command -v "$compiler" >/dev/null; then break; fi
    compiler=""
  done
  [ -n "$compiler" ] ||
    die "no C++ compiler found (looked for ${CXX:-c++, g++, clang++}), and onedl-mmcv has to be compiled; install one (Debian, Ubuntu: apt install g++), or name it: CXX=..."
  export CXX="${CXX:-$compiler}"

  "$python" -c 'import os, sys, sysconfig
places = [sysconfig.get_path("include"), sysconfig.get_config_var("INCLUDEPY")]
sys.exit(not any(place and os.path.exists(os.path.join(place, "Python.h")) for place in places))' ||
    die "$python (Python $version) lacks the header Python.h, and onedl-mmcv has to be compiled; install it (Debian, Ubuntu: apt install python$version-dev), or name another Python: PYTHON=..."

  local free_kb used_kb=0 missing_gb
  free_kb="$(df -Pk . | { read -r _; read -r _ _ _ kb _; echo "$kb"; })"
  if [ -d .venv ]; then used_kb="$(du -sk .venv | cut -f1)"; fi
  missing_gb=$((needed_gb - used_kb / 1048576))
  if [ "$missing_gb" -lt 2 ]; then missing_gb=2; fi
  [ "$free_kb" -ge $((missing_gb * 1048576)) ] ||
    die "not enough disk: $PWD needs $missing_gb GB free and has $((free_kb / 1048576)) GB; free some, or move the repository to a larger disk."
}

pip_install() {  # $1: what the user is told; the rest: arguments of pip install
  local reason
  say "$1"
  shift
  printf '\n## pip install %s\n' "$*" >>"$log"
  .venv/bin/python -m pip install -c constraints.txt "$@" >>"$log" 2>&1 && return
  reason="$(grep -E '^ *(ERROR|error|fatal error):' "$log" | tail -n 1)" || reason="$(tail -n 1 "$log")"
  die "pip failed: ${reason#"${reason%%[![:space:]]*}"} (all of it is in $log; running the same command again goes on from here)"
}

# opencv-python is required by onedl-mmcv and onedl-mmsegmentation, opencv-python-headless by imaug (of onedl-mmdetection);
# both install the same cv2, and the one that came last wins. Only the headless one loads on a machine without libGL.
have_headless_cv2() {
  .venv/bin/python -c 'import re, sys, cv2; sys.exit(not re.search(r"GUI:\s+NONE", cv2.getBuildInformation()))' >>"$log" 2>&1
}

# Importing mmcv.ops fails where they were not compiled, or for another torch.
have_mmcv_ops() {
  .venv/bin/python -c 'import sys, torch
from mmcv.ops import get_compiling_cuda_version
sys.exit(torch.cuda.is_available() and get_compiling_cuda_version() == "not available")' >>"$log" 2>&1
}

# onedl-mmcv compiles its CUDA ops where torch sees a GPU, and that takes nvcc of torch's own CUDA version, which
# few machines have. The packages that torch takes its CUDA libraries from offer it too; CUDA_HOME, if set, is used instead.
prepare_nvcc() {
  .venv/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' >>"$log" 2>&1 || return 0
  mmcv_note="its CUDA ops too: longer"
  [ -z "${CUDA_HOME:-}" ] && .venv/bin/python -m pip show -q cuda-toolkit >>"$log" 2>&1 || return 0
  pip_install "the CUDA compiler" "cuda-toolkit[nvcc,nvvm,crt,cccl]"
  CUDA_HOME="$(.venv/bin/python -c 'import os, nvidia; print(os.path.join(list(nvidia.__path__)[0], "cu13"))')"
  mkdir -p .venv/cuda_link  # the package has libcudart.so.13 only; the linker wants the bare name
  ln -sf "$CUDA_HOME/lib/libcudart.so.13" .venv/cuda_link/libcudart.so
  export CUDA_HOME LIBRARY_PATH="$PWD/.venv/cuda_link${LIBRARY_PATH:+:$LIBRARY_PATH}"
}

check_python_unchanged
if is_ready; then exit 0; fi
check_machine

mkdir -p .venv
exec 9>.venv/lock
if command -v flock >/dev/null && ! flock -n 9; then
  say "another set-up is at work here; waiting for it"
  flock 9
  if is_ready; then exit 0; fi
fi

SECONDS=0
rm -f "$stamp"
: >"$log"
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_USER=0 MAX_JOBS="${MAX_JOBS:-$(getconf _NPROCESSORS_ONLN)}"
export PATH="$PWD/.venv/bin:$PATH"  # the build of onedl-mmcv looks for ninja there; without it, one file is compiled at a time
unset CUDA_VISIBLE_DEVICES  # a GPU that is hidden today may be used tomorrow
if ! .venv/bin/python -m pip --version >>"$log" 2>&1; then
  say "making .venv with $python ($("$python" --version))"
  "$python" -m venv .venv >>"$log" 2>&1 || die "$python -m venv failed: $(tail -n 1 "$log") (all of it is in $log)"
fi

pip_install "torch (with CUDA about 3 GB to download, if it is not there yet); details go to $log" \
  torch torchvision ninja psutil "setuptools>=80,<82" wheel numpy opencv-python
have_headless_cv2 || pip_install "the headless OpenCV" --force-reinstall --no-deps opencv-python-headless

mmcv_note="about 10 minutes on two cores"
if ! have_mmcv_ops; then
  prepare_nvcc
  pip_install "onedl-mmcv (compiling it takes $mmcv_note; afterwards pip's cache has it)" --no-build-isolation onedl-mmcv
  # The cache does not know which torch, or whether a GPU, a wheel was compiled for.
  have_mmcv_ops || pip_install "onedl-mmcv again: the cached one does not fit this machine ($mmcv_note)" \
    --no-build-isolation --no-cache-dir --force-reinstall --no-deps onedl-mmcv
  have_mmcv_ops || die "onedl-mmcv was installed but its compiled ops do not load: $(tail -n 1 "$log") (all of it is in $log)"
fi

pip_install "the other packages and pe_spatial itself" --no-build-isolation -e ".[openmmlab,sam2,export,language,alignment,torchao,dev]"
have_headless_cv2 || die "OpenCV does not load: $(tail -n 1 "$log") (all of it is in $log)"

echo "$wanted gpu=$gpu" >"$stamp"
say "ready in $SECONDS s"
