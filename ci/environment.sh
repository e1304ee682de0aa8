# Sourced by the scripts beside it: finds a Python, brings uv, and makes environments in .cache/.
unset PYTHONDONTWRITEBYTECODE # the interpreters that tests start would take twice as long
# The network may be away for a minute: by themselves they give up after some ten seconds.
export UV_HTTP_RETRIES=${UV_HTTP_RETRIES:-6} PIP_RETRIES=${PIP_RETRIES:-8}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=$root/.cache
uv=$cache/uv/bin/uv

find_python() {
    local python recent='import sys; sys.exit(sys.version_info < (3, 11))'
    for python in ${PYTHON:-} python3.11 python3.12 python3.13 python3.14 python3; do
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

# build_wheel: names it in $wheel, and Python's version, which environments are named after, in $version
build_wheel() {
    rm -rf "$cache/wheel"
    "$uv" build --quiet --wheel --python "$python" --out-dir "$cache/wheel" "$root"
    wheel=$(echo "$cache"/wheel/*.whl)
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
}

# make_test_environment WHAT...: with the wheel, for the tests
make_test_environment() {
    local name="$*"
    # The wheel's version stays the same while its contents change.
    make_environment "test/$version/${name//[^A-Za-z0-9.]/_}" --reinstall-package polars-async \
        "$wheel" --group "$root/pyproject.toml:test" "$@"
}

python=$(find_python)
bring_uv
