# The original entrypoint's contract for its volume: data in a folder per major version, created if
# missing, and a password for every client except those on 127.0.0.1.
set -eu
export PGDATA="/var/lib/postgresql/$(cat /major)/docker"
if [ "$1" = postgres ] && [ "$(id -u)" = 0 ]; then
    mkdir -p "$PGDATA"
    chown -R postgres:postgres /var/lib/postgresql
    chmod 700 "$PGDATA"
    mkdir -p /var/run/postgresql
    exec setpriv --reuid=postgres --regid=postgres --init-groups sh "$0" "$@"
fi
if [ "$1" = postgres ] && [ ! -s "$PGDATA/PG_VERSION" ]; then
    initdb --username=postgres --pwfile="${POSTGRES_PASSWORD_FILE:?}"
    echo "host all all all scram-sha-256" >>"$PGDATA/pg_hba.conf"
fi
exec "$@"
