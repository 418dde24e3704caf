-- Run once by the gunicorn master at every start; safe to run again, and by several at once:
-- IF NOT EXISTS alone fails when two sessions create the table at the same moment.
SELECT pg_advisory_xact_lock(hashtext('signup schema'));

CREATE TABLE IF NOT EXISTS users (
    id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    email      text NOT NULL CHECK (char_length(email) <= 254),
    first_name text NOT NULL CHECK (char_length(first_name) <= 100),
    last_name  text NOT NULL CHECK (char_length(last_name) <= 100),
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now()
);

CREATE UNIQUE INDEX IF NOT EXISTS users_email_key ON users (lower(email));
