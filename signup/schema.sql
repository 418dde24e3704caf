-- Run once by the gunicorn master at every start; safe to run again, and by several at once:
-- IF NOT EXISTS alone fails when two sessions create the table at the same moment.
SET LOCAL statement_timeout = 0;
SELECT pg_advisory_xact_lock(hashtext('signup schema'));

CREATE TABLE IF NOT EXISTS users (
    id           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    email        text NOT NULL CHECK (char_length(email) <= 254),
    email_folded text NOT NULL UNIQUE, -- one account in any letter case: fold_email in validation.py
    first_name   text NOT NULL CHECK (char_length(first_name) <= 100),
    last_name    text NOT NULL CHECK (char_length(last_name) <= 100),
    created_at   timestamptz NOT NULL DEFAULT now(),
    updated_at   timestamptz NOT NULL DEFAULT now()
);

-- A table of older versions has an index on lower(email) instead, whose answer depends on the
-- locale. It stays for as long as an older instance may run beside this one. Here the column may be
-- NULL: until database.py has filled it, and for good where two rows have one email already.
DO $$ BEGIN
    IF NOT EXISTS (
        SELECT FROM pg_attribute WHERE attrelid = 'users'::regclass AND attname = 'email_folded'
    ) THEN
        ALTER TABLE users ADD COLUMN email_folded text UNIQUE;
    END IF;
END $$;
