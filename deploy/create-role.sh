#!/bin/sh
# Creates the database `signup`, and the role `signup` with its password, which may only create and
# use tables there. Run it as a superuser of PostgreSQL. Safe to run again: it creates what is missing.
# If it fails, it has changed nothing, or only created the empty database; another run completes it.
set -eu

fail() { # STATUS MESSAGE
    printf 'create-role.sh: %s\n' "$2" >&2
    exit "$1"
}

usage="usage: SIGNUP_DATABASE_PASSWORD=... sh deploy/create-role.sh [psql's options, as --host, --username]"
with_superuser=0
if [ "${1:-}" = --with-superuser-password ]; then # for compose: sets the superuser's own password too
    shift
    with_superuser=1
    [ -n "${POSTGRES_PASSWORD:-}" ] || fail 2 "--with-superuser-password requires POSTGRES_PASSWORD; $usage"
fi
[ -n "${SIGNUP_DATABASE_PASSWORD:-}" ] || fail 2 "$usage"
command -v psql >/dev/null || fail 1 "psql not found: install PostgreSQL's client programs"

# Variables, so that options and a connection string in the arguments override them.
export PGUSER="${PGUSER:-postgres}" PGDATABASE=postgres PGCONNECT_TIMEOUT="${PGCONNECT_TIMEOUT:-10}"
unset PGCLIENTENCODING # it would convert the passwords

# CREATE DATABASE can't be in a transaction. It comes first; one transaction does the rest.
statements() {
    cat <<'SQL'
DO $$ BEGIN
    IF NOT current_setting('is_superuser')::bool THEN
        RAISE EXCEPTION 'the role "%" is not a superuser', current_user;
    ELSIF EXISTS (SELECT FROM pg_roles WHERE rolname = 'signup' AND rolsuper) THEN
        RAISE EXCEPTION 'the existing role "signup" is a superuser, which the service must not be';
    END IF;
END $$;
SELECT 'CREATE DATABASE signup TEMPLATE template0 ENCODING ''UTF8'''
    WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = 'signup') \gexec
\connect signup
-- psql sends the passwords in clear: keep these statements out of the server's log and statistics.
SET log_statement = none;
SET log_min_duration_statement = -1;
SET log_min_duration_sample = -1;
SET log_transaction_sample_rate = 0;
SET log_min_error_statement = panic;
SET pg_stat_statements.track_utility = off;
SET pgaudit.log = none;
-- printf is part of sh: the passwords are in no process's arguments. psql drops the last newline.
\set password `printf '%s\n' "$SIGNUP_DATABASE_PASSWORD"`
\set superuser_password `printf '%s\n' "${POSTGRES_PASSWORD:-}"`
BEGIN;
SELECT 'CREATE ROLE signup' WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'signup') \gexec
ALTER ROLE signup LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS PASSWORD :'password';
\if :with_superuser
ALTER ROLE CURRENT_USER PASSWORD :'superuser_password';
\endif
REVOKE ALL ON DATABASE signup FROM PUBLIC, signup;
GRANT CONNECT ON DATABASE signup TO signup;
REVOKE ALL ON SCHEMA public FROM PUBLIC;
GRANT USAGE, CREATE ON SCHEMA public TO signup;
COMMIT;
\echo create-role.sh: the database and the role signup are ready
SQL
}

if output=$(statements | psql --no-psqlrc --quiet --set=ON_ERROR_STOP=1 --set=VERBOSITY=terse \
    --set=with_superuser="$with_superuser" --file=- "$@" 2>&1); then
    printf '%s\n' "$output"
else
    case $output in
    *[Pp]eer\ authentication*)
        output="PostgreSQL accepts only the system user of the same name here. Run:
            sudo -u postgres --preserve-env=SIGNUP_DATABASE_PASSWORD sh <deploy/create-role.sh" ;;
    esac
    fail 1 "$(printf %s "$output" | tr -s '[:space:]' ' ')" # as one line
fi
