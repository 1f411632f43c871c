#!/usr/bin/env bash
# The tests with the lowest and with the highest versions that setup.py admits, each in a fresh environment.
#
#   .ci/test_matrix.sh [lowest] [highest]       # default: both
#
#   LOWEST_PYTHON    default: a Python 3.10 where there is one, else python3
#   HIGHEST_PYTHON   default: python3
#   HIGHEST_TORCH    default: torch, that is the newest (with gigabytes of CUDA packages unless pip finds a CPU build)
#   FOLDER           of the environments; default: build/matrix. KEEP=1 uses those that are there.
#   TESTS            what pytest is given; default: everything but the tests marked slow
#   WORKERS          default: 2
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
FOLDER="${FOLDER:-build/matrix}"

find_lowest_python() {
    local candidate
    for candidate in python3.10 "$HOME"/.pyenv/versions/3.10.*/bin/python3.10; do
        if "$candidate" -c '' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "no Python 3.10 found: the lowest versions run on $(python3 --version)" >&2
    echo python3
}

run() { # name, python, what pip installs...
    local name="$1" python="$2" environment="$FOLDER/$1"
    shift 2
    if [ -z "${KEEP:-}" ] || [ ! -x "$environment/bin/python" ]; then
        rm -rf "$environment"
        "$python" -m venv "$environment"
        "$environment/bin/python" -m pip install --quiet --upgrade pip
        "$environment/bin/python" -m pip install --quiet "$@" -e '.[test]'
    fi
    echo "== $name: $("$environment/bin/python" --version)"
    "$environment/bin/python" -m pip list --format=freeze |
        grep -E '^(torch|transformers|peft|accelerate|trl|safetensors|huggingface.hub|datasets|numpy|scipy)=='
    # shellcheck disable=SC2086
    "$environment/bin/python" -m pytest -q -n "${WORKERS:-2}" ${TESTS:-tests -m "not slow"}
}

for name in "${@:-lowest highest}"; do
    for leg in $name; do
        case "$leg" in
        lowest) run lowest "${LOWEST_PYTHON:-$(find_lowest_python)}" -r .ci/lowest.txt ;;
        highest) run highest "${HIGHEST_PYTHON:-python3}" "${HIGHEST_TORCH:-torch}" ;;
        *)
            echo "unknown: $leg (lowest or highest)" >&2
            exit 2
            ;;
        esac
    done
done
