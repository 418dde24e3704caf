#!/bin/sh
# A role for the service, which may make its table and use it, and nothing else; and its database.
# It may run again and again: what is missing is made, and the passwords become what is asked for.
set -eu
psql --set=ON_ERROR_STOP=1 --quiet --username=postgres --dbname=postgres <<'SQL'
\getenv admin POSTGRES_PASSWORD
\getenv password SIGNUP_DATABASE_PASSWORD
SELECT 'CREATE ROLE signup' WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'signup') \gexec
ALTER ROLE signup LOGIN PASSWORD :'password' NOSUPERUSER NOCREATEDB NOCREATEROLE;
ALTER ROLE postgres PASSWORD :'admin';
SELECT 'CREATE DATABASE signup ENCODING ''UTF8'''
    WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = 'signup') \gexec
REVOKE ALL ON DATABASE signup FROM PUBLIC;
GRANT CONNECT ON DATABASE signup TO signup;
\connect signup
REVOKE ALL ON SCHEMA public FROM PUBLIC;
GRANT USAGE, CREATE ON SCHEMA public TO signup;
SQL
