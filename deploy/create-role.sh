#!/bin/sh
# Creates the service's database, and a role that may only create and use its table. Safe to run
# again: it creates what is missing, and sets both passwords.
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
