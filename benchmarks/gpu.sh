#!/usr/bin/env bash
# usage: benchmarks/gpu.sh [option…] build|test|sanitize|bench|all
#
# For a machine with a GPU and no network. Each stage takes less than nine minutes; what does not fit is listed.
#
#   build            install the wheel, which is built first unless it is given; build mamba-ssm's extension if given
#   test             tests/test_gpu.py, tests/test_optimized_cuda.py
#   sanitize         compute-sanitizer's memcheck and racecheck over small cases, as many as there is time for
#   bench            bench-operators, then bench-networks, each in half the time; both are stages of their own too
#   all              build, test, sanitize, bench-operators, bench-networks
#
#   --wheel FILE     install this wheel instead of building one
#   --mamba-ssm FILE source distribution of mamba-ssm, whose scan is to be timed too
#   --output FOLDER  for JSON lines, charts, logs [default: build/gpu/results]
#   --select TEXT    only tests and operators whose name holds TEXT
#   --seconds N      for a stage [default: 500]
#   --dry-run        no GPU: CUDA kernels emulated, Triton's interpreted, tiny shapes; the figures mean nothing
#   -h, --help       this text
#
# PYTHON is the Python that has torch [default: python3]; build needs setuptools and ninja in it, test needs pytest,
# hypothesis and scikit-learn. Nothing is installed into it: all goes to build/gpu. What else is on PYTHONPATH is compared
# with: VMamba's selective_scan_cuda_oflex, WTConv's fused_haar_cuda_ext, accelerated-scan, the published network's model.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
state=$root/build/gpu
python=${PYTHON:-python3}
wheel='' mamba_ssm='' output=$state/results select='' seconds=500 dry_run='' stages=()

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"; }
say() { echo "gpu.sh: $*" >&2; }
fail() { say "$1"; exit "${2:-1}"; }
has() { "$python" -c 'import sys; from importlib.util import find_spec; sys.exit(not all(map(find_spec, sys.argv[1:])))' "$@"; }
absolute() { [[ -e $1 ]] || fail "there is no file $1" 2; realpath "$1"; }

options=()
while (($#)); do
  case $1 in
    -h | --help) usage; exit ;;
    --dry-run) dry_run=1 options+=("$1") ;;
    --wheel | --mamba-ssm | --output | --select | --seconds)
      (($# > 1)) || fail "$1 needs a value; see --help" 2
      case $1 in
        --wheel) wheel=$(absolute "$2"); options+=("$1" "$wheel") ;;
        --mamba-ssm) mamba_ssm=$(absolute "$2"); options+=("$1" "$mamba_ssm") ;;
        --output) output=$(realpath -m "$2"); options+=("$1" "$output") ;;
        --select) select=$2 options+=("$1" "$2") ;;
        --seconds) seconds=$2 options+=("$1" "$2") ;;
      esac
      shift ;;
    build | test | sanitize | bench | bench-operators | bench-networks | all) stages+=("$1") ;;
    *) fail "there is no stage or option $1; see --help" 2 ;;
  esac
  shift
done
((${#stages[@]} == 1)) || fail "name one stage: build, test, sanitize, bench, bench-operators, bench-networks or all; see --help" 2
[[ $seconds =~ ^[0-9]+$ ]] || fail "--seconds takes a whole number, not $seconds" 2

[[ $python != */* ]] || python=$(realpath -s "$python")
export PYTHONSAFEPATH=1 # the installed package, not the source tree around it
cd "$root"
if [[ $dry_run ]]; then
  export MOBILEMAMBA_GPU_DRY_RUN=1 TRITON_INTERPRET=1 PYTHONPATH=$root:$root/tests:$root/benchmarks
else
  export PYTHONPATH=$state/site:$root/benchmarks:$state/mamba-ssm${PYTHONPATH:+:$PYTHONPATH} # other projects' kernels
  has torch || fail "$python has no PyTorch: name with PYTHON one that has" 2
  "$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' ||
    fail "PyTorch sees no GPU here: run it on a machine with one, or with --dry-run to try the parts on the CPU" 2
fi
MOBILEMAMBA_COMMIT=${MOBILEMAMBA_COMMIT:-$(git describe --always --dirty --abbrev=40 --exclude '*' 2>/dev/null || true)}
export MOBILEMAMBA_COMMIT
mkdir -p "$output"

# within SECONDS COMMAND…: interrupted when the time is up, so that it says what it did; not in a dry run, which may
# have the emulation to compile
within() { if [[ $dry_run ]]; then "${@:2}"; else timeout --signal=INT --kill-after=10 "$@"; fi; }

installed() {
  [[ $dry_run || -d $state/site/mobilemamba_kernels ]] || fail "the stage build comes first"
}

build() {
  if [[ $dry_run && ! $wheel ]]; then
    within "$seconds" "$python" -c 'import gpu; gpu.stand_in(); import mobilemamba_kernels as k; print(k.report())'
    return
  fi
  if [[ ! $dry_run ]]; then
    TORCH_CUDA_ARCH_LIST=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
    export TORCH_CUDA_ARCH_LIST
  fi
  if [[ ! $wheel ]]; then
    has setuptools ninja &&
      "$python" -c 'import setuptools; raise SystemExit(int(setuptools.__version__.split(".")[0]) < 77)' ||
      fail "building needs setuptools from 77 on and ninja, which are not both installed: give a wheel with --wheel"
    rm -rf build/lib* build/bdist* "$state/wheel" # setuptools would pack what an earlier build left
    MOBILEMAMBA_CUDA=1 within "$seconds" "$python" -m pip wheel -q . --no-build-isolation --no-deps -w "$state/wheel"
    wheel=$(echo "$state"/wheel/*.whl)
  fi
  # Beside the user's Python, not into a virtual environment: within one, another would not see its torch.
  rm -rf "$state/site"
  "$python" -m pip install -q --no-deps --no-index --no-build-isolation --target "$state/site" "$wheel"
  if [[ $dry_run ]]; then
    PYTHONPATH=$state/site env -u MOBILEMAMBA_GPU_DRY_RUN "$python" -c 'import mobilemamba_kernels as k; print(k.__file__)'
    return
  fi
  "$python" - <<'END'
import mobilemamba_kernels as kernels
from mobilemamba_kernels import _library

print(kernels.report())
if _library.CUDA_ERROR:
    raise SystemExit(f"gpu.sh: the wheel has no CUDA kernels that run here: {_library.CUDA_ERROR}")
END
  if [[ $mamba_ssm ]]; then
    rm -rf "$state/mamba-ssm"
    mkdir -p "$state/mamba-ssm"
    within "$((seconds - SECONDS > 30 ? seconds - SECONDS : 30))" \
      "$python" -m gpu mamba-ssm "$mamba_ssm" "$state/mamba-ssm" >"$output/mamba-ssm.log" 2>&1 ||
      say "mamba-ssm's extension could not be built, so it is not compared with; see $output/mamba-ssm.log"
  fi
}

run_tests() {
  local options=(-p no:cacheprovider "--junitxml=$output/tests-$1.xml" -k "$2")
  shift 2
  within "$((seconds - SECONDS > 10 ? seconds - SECONDS : 10))" "$python" -m pytest "$@" "${options[@]}"
}

tests() {
  installed
  has pytest hypothesis sklearn || fail "the tests need pytest, hypothesis and scikit-learn, which are not all installed"
  local chosen="${select:+($select) and }" failed=0
  if [[ $dry_run ]]; then
    run_tests small "(${select:-haar_idwt2d or bidirectional_selective_scan}) and (loaded or bits or opcheck)" \
      -p emulation.plugin tests/test_gpu.py
    return
  fi
  # Most of the time goes to Triton's compiler, of which one runs in every process.
  local parallel=()
  has xdist && parallel=(-n "$(($(nproc) > 12 ? 12 : $(nproc)))")
  run_tests huge "${chosen}huge" tests/test_gpu.py || failed=$?
  ((failed != 5)) || failed=0 # the selection has no such test
  run_tests small "${chosen}not huge" "${parallel[@]}" tests/test_gpu.py tests/test_optimized_cuda.py || failed=$?
  return "$failed"
}

sanitize() {
  installed
  local limit=$((seconds * 8 / 10)) jobs=() backend tool log
  if [[ $dry_run ]]; then
    for backend in cuda triton; do within "$seconds" "$python" -m gpu exercise "$backend"; done
    return
  fi
  command -v compute-sanitizer >/dev/null || fail "compute-sanitizer is not installed; it comes with the CUDA toolkit"
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # so that each tensor is an allocation, with an end that is watched
  for backend in cuda triton; do
    for tool in memcheck racecheck; do
      log=$output/$tool-$backend.log
      local options=(--tool "$tool" --error-exitcode 99)
      [[ $tool == memcheck ]] && options+=(--report-api-errors no)
      [[ $backend == cuda ]] && options+=(--kernel-name kns=mobilemamba)
      within "$seconds" compute-sanitizer "${options[@]}" \
        "$python" -m gpu exercise "$backend" --seconds "$limit" >"$log" 2>&1 &
      jobs+=("$!:$log")
    done
  done
  local job failed=0
  for job in "${jobs[@]}"; do
    wait "${job%%:*}" || failed=1
    echo "${job#*:}: $(tail -n 2 "${job#*:}" | tr '\n' ' ')"
  done
  return "$failed"
}

bench() { # PART SECONDS
  installed
  local options=(--output "$output" --seconds "$2")
  [[ $1 == operators && $select ]] && options+=(--only "$select")
  [[ $dry_run ]] && options+=(--dtype bfloat16)
  within "$(($2 + 40))" "$python" -m gpu "$1" "${options[@]}"
  [[ $1 == operators ]] || "$python" -m gpu kernels --output "$output"
  "$python" -m gpu charts "$output"
}

case ${stages[0]} in
  build) build ;;
  test) tests ;;
  sanitize) sanitize ;;
  bench-operators) bench operators "$((seconds * 9 / 10))" ;;
  bench-networks) bench networks "$((seconds * 9 / 10))" ;;
  bench)
    bench operators "$((seconds * 9 / 20))"
    bench networks "$((seconds * 9 / 20))"
    ;;
  all)
    failed=()
    for stage in build test sanitize bench-operators bench-networks; do
      say "$stage"
      PYTHON=$python "$root/benchmarks/gpu.sh" "${options[@]}" "$stage" || failed+=("$stage")
      [[ ${failed[*]} != build ]] || break
    done
    ((!${#failed[@]})) || fail "failed: ${failed[*]}"
    ;;
esac
