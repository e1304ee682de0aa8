# Sourced by the scripts beside it: finds a Python, brings uv, and makes environments in .cache/.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=$root/.cache
uv=$cache/uv/bin/uv

find_python() {
    local python recent='import sys; sys.exit(sys.version_info < (3, 11))'
    for python in ${PYTHON:-} python3.11 python3.12 python3.13 python3; do
        if "$python" -c "$recent" 2>/dev/null; then
            echo "$python"
            return
        fi
    done
    echo "$0 needs Python 3.11 or newer, found $(python3 --version 2>&1 || true)" >&2
    return 1
}

bring_uv() {
    [[ -x $uv ]] && return
    "$python" -m venv --clear "$cache/uv"
    "$cache/uv/bin/python" -m pip install -qq --disable-pip-version-check uv
}

# make_environment NAME WHAT...: what is in place already is not fetched again
make_environment() {
    environment=$cache/$1
    shift
    if [[ ! -x $environment/bin/python ]]; then
        "$uv" venv --quiet --clear --python "$python" "$environment"
    fi
    "$uv" pip install --quiet --python "$environment/bin/python" "$@"
}

python=$(find_python)
bring_uv
