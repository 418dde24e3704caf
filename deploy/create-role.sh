#!/bin/sh
# Run by the image of PostgreSQL when it makes its data folder: a role for the service, which may
# make its table and use it, and nothing else.
set -eu
psql --set=ON_ERROR_STOP=1 --set=password="$SIGNUP_DATABASE_PASSWORD" --username=postgres <<'SQL'
CREATE ROLE signup LOGIN PASSWORD :'password' NOSUPERUSER NOCREATEDB NOCREATEROLE;
CREATE DATABASE signup ENCODING 'UTF8';
REVOKE ALL ON DATABASE signup FROM PUBLIC;
GRANT CONNECT ON DATABASE signup TO signup;
\connect signup
REVOKE ALL ON SCHEMA public FROM PUBLIC;
GRANT USAGE, CREATE ON SCHEMA public TO signup;
SQL
