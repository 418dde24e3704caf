#!/bin/sh
# The `make compose-*` targets: up, build, update, rollback, backup and restore.
#
# .env holds the passwords, the settings, and the version of the image that runs. The containers get
# the passwords as files, so that `docker inspect` shows none. What fails leaves the running replicas,
# the passwords and .env as they were, and says the next step.
set -eu
cd "$(dirname "$0")/.."
umask 077

NAMES="POSTGRES_PASSWORD SIGNUP_DATABASE_PASSWORD GRAFANA_ADMIN_PASSWORD"
MOUNTED="deploy grafana nginx prometheus"
COMMAND=compose-$1

say() { printf '%s: %s\n' "$COMMAND" "$1" >&2; }

fail() {
    say "$1"
    exit 1
}

project() { docker compose config | sed -n '1s/name: //p'; }

replicas() { # [FILTER]: their ids, also of stopped ones, but not of `docker compose run`
    docker ps --all --quiet --no-trunc --filter "label=com.docker.compose.project=$(project)" \
        --filter label=com.docker.compose.service=server --filter label=com.docker.compose.oneoff=False "$@"
}

setting() { # NAME: its value from the environment or .env, as Compose reads it
    docker compose config --environment | sed -n "s/^$1=//p"
}

put() { # NAME VALUE: into .env
    { grep -v "^$1=" .env || true; printf '%s=%s\n' "$1" "$2"; } >.env.new
    mv .env.new .env
}

prepare() { # Docker, and .env
    if [ ! -e .env ]; then
        for name in $NAMES; do
            printf "%s='%s'\n" "$name" "$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')"
        done >.env.new
        mv .env.new .env
        say "wrote $PWD/.env with random passwords; .env.example describes it"
    fi
    docker compose version >/dev/null 2>&1 || fail "Docker Engine with Compose 2.26 or newer is required"
}

check_files() {
    # A checkout under umask 077 hides the files from the containers' users.
    hidden=$(find $MOUNTED -path 'nginx/tls/*' -prune -o \( ! -perm -o=r -o -type d ! -perm -o=x \) -print)
    [ -z "$hidden" ] || fail "the containers can't read $(echo $hidden): chmod go+rX $(echo $hidden)"
    [ -e nginx/tls/privkey.pem ] || return 0
    for file in nginx/tls/fullchain.pem nginx/tls/privkey.pem; do
        [ -f "$file" ] && [ ! -L "$file" ] || fail "$file is no file: see HTTPS in docs/production.md"
        [ "$(find "$file" -uid 101 -perm -u=r -o -gid 101 -perm -g=r -o -perm -o=r)" ] ||
            fail "nginx, user 101, can't read $file: sudo chown 101:101 $file"
    done
    [ -z "$(find nginx/tls/privkey.pem -perm /007 -o -perm /070 ! -gid 101)" ] ||
        fail "others may read nginx/tls/privkey.pem: sudo chown 101:101 nginx/tls/privkey.pem && sudo chmod 0400 nginx/tls/privkey.pem"
}

choose_https() { # with a certificate, in .env
    named=$(setting COMPOSE_FILE)
    case $named in
    *deploy/https.yml*)
        [ -e nginx/tls/privkey.pem ] ||
            fail "nginx/tls/privkey.pem is missing: put it back, or delete COMPOSE_FILE from .env for plain http" ;;
    *)
        [ -e nginx/tls/privkey.pem ] || return 0
        [ -z "$named" ] || fail "COMPOSE_FILE lacks deploy/https.yml, so nginx/tls is not used: append :deploy/https.yml"
        override=$(ls docker-compose.override.yml 2>/dev/null || true)
        named=docker-compose.yml${override:+:$override}:deploy/https.yml
        COMPOSE_FILE=$named docker compose run --rm --no-deps -T --entrypoint nginx proxy \
            -p /tmp -c /etc/nginx/https.conf -t || fail "nginx refuses the certificate: see above"
        put COMPOSE_FILE "$named"
        say "found nginx/tls/privkey.pem: .env names deploy/https.yml, for https on port 443" ;;
    esac
}

stale_secrets() { # the names whose file has not the value of .env
    for name in $NAMES; do
        value=$(setting "$name")
        [ "$value" ] || fail "$name is missing in .env: see .env.example"
        [ "$value" = "$(cat "secrets/$name" 2>/dev/null)" ] || echo "$name"
    done
}

write_secrets() {
    stale=$(stale_secrets)
    mkdir -p secrets/alertmanager
    chmod 755 secrets/alertmanager # `secrets` itself keeps others out
    for name in $stale; do
        file=secrets/$name
        [ ! -e "$file" ] || [ -e "$file.before" ] || cp "$file" "$file.before"
        setting "$name" | tr -d '\n' >"$file"
        chmod 644 "$file"
    done
}

set_passwords() { # in PostgreSQL, if it is the stack's own
    ! docker compose config --services | grep -qx role || docker compose run --rm --no-deps -T role
}

build() {
    version=$(date -u +%Y%m%d-%H%M%S)
    commit=$(git rev-parse --short HEAD 2>/dev/null) && version=$version-$commit
    SIGNUP_VERSION=$version docker compose build server
    put SIGNUP_VERSION "$version"
    say "built signup-server:$version"
}

up() {
    [ "$(setting SIGNUP_VERSION)" ] || build
    if [ -z "$(replicas --filter status=running)" ]; then
        start
        return
    fi
    changed=$(stale_secrets && ls secrets/*.before secrets/keep 2>/dev/null || true) # of a killed update
    for name in $NAMES; do # of a checkout from before secrets/
        [ -e "secrets/$name" ] || write_secrets
    done
    # All but the replicas, which an update replaces.
    docker compose up --detach --wait --no-deps $(docker compose config --services | grep -vx -e server -e role)
    wanted=$(docker compose config --hash server | cut -d ' ' -f 2)
    for replica in $(replicas); do
        hash=$(docker inspect --format '{{index .Config.Labels "com.docker.compose.config-hash"}}' "$replica")
        [ "$hash" = "$wanted" ] || changed=yes
    done
    [ -z "$changed" ] || replace
    docker compose up --detach --wait --no-deps --no-recreate server
}

start() { # where no replica runs
    write_secrets
    docker compose up --detach --wait
    rm -f secrets/*.before secrets/keep
}

check() { # CONTAINER: wait until it is healthy, then compare its own answers
    for _ in $(seq 90); do
        state=$(docker inspect --format '{{.State.Status}} {{.RestartCount}} {{.State.Health.Status}}' "$1")
        case $state in
        "running 0 healthy")
            printf %s "$known" | docker exec --interactive "$1" python -c "$(cat deploy/canary.py)"
            return ;;
        "running 0 starting") sleep 1 ;;
        *) break ;;
        esac
    done
    docker logs --tail 5 "$1" >&2 || true
    say "a new replica did not start ($state)"
    return 1
}

remove() { # CONTAINER...: after its requests
    docker stop "$@" >/dev/null
    docker rm --volumes "$@" >/dev/null
}

remove_all_but() { # CONTAINER...: of the replicas
    for replica in $(replicas); do
        case $* in *"$replica"*) ;; *) remove "$replica" ;; esac
    done
}

undo() {
    trap '' INT TERM HUP
    remove "$canary" 2>/dev/null || true
    remove_all_but $old || true
    rm -f secrets/keep
    restored=yes
    for file in secrets/*.before; do
        [ -e "$file" ] || continue
        cat "$file" >"${file%.before}"
        set_passwords >&2 && rm -f "$file" || restored=
    done
    put SIGNUP_VERSION "$running"
    next="mend the cause above, then run make compose-build compose-update, or for the same image make compose-update TO=$new"
    [ "$restored" ] ||
        fail "the update to $new failed, and PostgreSQL may have the new password, so that the old replicas can't open connections: $next"
    fail "the update to $new failed; the old replicas, of $running, serve as before: $next"
}

replace() { # start new replicas, check each, and only then stop the old ones
    new=${TO:-$(setting SIGNUP_VERSION)}
    docker image inspect "signup-server:$new" >/dev/null || fail "the image signup-server:$new is gone: make compose-build"
    [ ! -e secrets/keep ] || remove_all_but $(cat secrets/keep) # an update was killed
    old=$(replicas) # also one that has crashed
    running=$(setting SIGNUP_VERSION)
    [ -z "$old" ] || running=$(docker inspect --format '{{.Config.Image}}' "${old%%[!0-9a-f]*}")
    case $running in *:*) running=${running#*:} ;; signup-server) running=latest ;; esac
    if [ -z "$(replicas --filter status=running)" ]; then
        put SIGNUP_VERSION "$new"
        start
    else
        surge
    fi
    [ "$new" = "$running" ] || put SIGNUP_PREVIOUS_VERSION "$running"
    say "signup-server:$new serves"
}

surge() {
    canary=$(project)-canary
    docker rm --force --volumes "$canary" >/dev/null 2>&1 || true
    trap undo EXIT
    trap 'exit 130' INT TERM HUP
    echo "$old" >secrets/keep
    put SIGNUP_VERSION "$new"
    write_secrets
    set_passwords
    # A body that has to be answered with 409.
    known=$(docker compose exec -T db psql --username=postgres --dbname=signup --tuples-only --command \
        "SELECT json_build_object('email', email, 'first_name', 'x', 'last_name', 'x') FROM users ORDER BY id DESC LIMIT 1" || true)
    [ "$known" ] || say "no email is registered in the service db, so no new replica is asked for a 409"
    # `run` gives a container no name that nginx or Prometheus asks for.
    docker compose run --detach --no-deps --name "$canary" server
    check "$canary"
    remove "$canary"
    docker compose up --detach --no-deps --no-recreate --scale server=$((2 * $(echo "$old" | wc -l))) server
    for replica in $(replicas); do
        case $old in *"$replica"*) ;; *) check "$replica" ;; esac
    done
    trap - EXIT INT TERM HUP
    replicas | grep -vxF "$old" >secrets/keep
    sleep 3 # nginx asks DNS each second: it has found the new replicas
    remove $old
    rm -f secrets/*.before secrets/keep
}

backup() {
    mkdir -p backups
    file=backups/signup-$(date -u +%Y%m%d-%H%M%S).dump
    docker compose exec -T db pg_dump --username=postgres --format=custom signup >"$file.part" || {
        rm "$file.part"
        fail "pg_dump failed: see above"
    }
    mv "$file.part" "$file"
    say "wrote $file: copy it to another machine"
}

psql() { docker compose exec -T db psql --username=postgres --dbname=signup --tuples-only --no-align --command "$1"; }

restore() {
    [ -r "${FILE:-}" ] || fail "FILE=${FILE:-} can't be read: make compose-restore FILE=backups/..."
    if [ -z "$(docker compose ps --quiet db)" ]; then # into a new volume, before any signup
        write_secrets
        docker compose up --detach --wait --no-deps db
        set_passwords
    fi
    if [ "$(docker compose ps --quiet proxy)" ]; then # no signup may come in between
        trap 'docker compose start proxy' EXIT
        docker compose stop proxy
    fi
    table=$(psql "SELECT to_regclass('users')") || fail "the database can't be read: see above"
    users=0
    [ -z "$table" ] || users=$(psql 'SELECT count(*) FROM users')
    [ "$users" = 0 ] || [ "${REPLACE:-}" ] || fail "a restore would delete the table's $users users: to do so, add REPLACE=yes"
    docker compose exec -T db pg_restore --username=postgres --dbname=signup --clean --if-exists \
        --single-transaction <"$FILE" || fail "pg_restore failed and has changed nothing: see above"
    say "restored $(psql 'SELECT count(*) FROM users') users"
}

[ "$1" = backup ] || {
    exec 9<docker-compose.yml
    flock --nonblock 9 || fail "another make compose-... is changing the stack: wait for its end"
}
[ "$1" != up ] || check_files
prepare
case $1 in
up)
    choose_https
    up ;;
update) replace ;;
rollback)
    TO=${TO:-$(setting SIGNUP_PREVIOUS_VERSION)}
    [ "$TO" ] || fail "no version before this one is known: make compose-rollback TO=..., see docker image ls signup-server"
    replace ;;
build | backup | restore) "$1" ;;
esac
