-- The gunicorn master runs this at every start. The lock lets several masters do so at once:
-- IF NOT EXISTS alone fails if two sessions create the table at the same time.
SET LOCAL statement_timeout = 0;
SELECT pg_advisory_xact_lock(hashtext('signup schema'));

CREATE TABLE IF NOT EXISTS users (
    id           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    email        text NOT NULL CHECK (char_length(email) <= 254),
    email_folded text NOT NULL UNIQUE, -- by fold_email: one account in any letter case
    first_name   text NOT NULL CHECK (char_length(first_name) <= 100),
    last_name    text NOT NULL CHECK (char_length(last_name) <= 100),
    created_at   timestamptz NOT NULL DEFAULT now(),
    updated_at   timestamptz NOT NULL DEFAULT now()
);

-- Older versions of the table have a unique index on lower(email) instead, which depends on the
-- locale. Keep it while older instances may still run. The column added here is NULL until
-- database.py has filled it, and stays NULL where two rows already have the same email.
DO $$ BEGIN
    IF NOT EXISTS (
        SELECT FROM pg_attribute WHERE attrelid = 'users'::regclass AND attname = 'email_folded'
    ) THEN
        ALTER TABLE users ADD COLUMN email_folded text UNIQUE;
    END IF;
END $$;
