-- The statements of migrate.py.

-- name: start
SET statement_timeout = 0;
SET application_name = 'signup.migrate';
-- The session of a run that was killed would go on.
SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE pid <> pg_backend_pid()
    AND application_name = 'signup.migrate' AND datname = current_database() AND usename = user;
-- Whether it can be migrated, email_folded is NOT NULL, and its unique index is complete.
WITH indexes AS (
    SELECT replace(pg_get_indexdef(indexrelid, 1, true), '::text', '') AS key, indisvalid
    FROM pg_index
    WHERE indrelid = to_regclass('users') AND indisunique AND indnatts = 1 AND indpred IS NULL
)
SELECT count(*) = 6 AND EXISTS (
        SELECT FROM indexes WHERE key IN ('email', 'lower(email)', 'email_folded')
    ),
    EXISTS (
        SELECT FROM pg_attribute
        WHERE attrelid = to_regclass('users') AND attname = 'email_folded' AND attnotnull
    ),
    EXISTS (SELECT FROM indexes WHERE key = 'email_folded' AND indisvalid)
FROM pg_attribute WHERE attrelid = to_regclass('users')
    AND attname IN ('id', 'email', 'first_name', 'last_name', 'created_at', 'updated_at')
    AND (attname <> 'email' OR attnotnull)
    AND (attname <> 'id' OR atttypid IN ('int4'::regtype, 'int8'::regtype)
        AND (atthasdef OR attidentity <> ''))
    AND NOT EXISTS ( -- another column that an INSERT of the service would have to fill in
        SELECT FROM pg_attribute AS other WHERE other.attrelid = pg_attribute.attrelid
            AND attnum > 0 AND attnotnull AND NOT atthasdef AND attidentity = '' AND attname NOT IN
            ('email', 'email_folded', 'first_name', 'last_name', 'created_at', 'updated_at')
    )

-- name: add column
ALTER TABLE users ADD COLUMN IF NOT EXISTS email_folded text;
-- Older instances leave it out. In the locale C, lower() folds ASCII letters alike in every
-- database; migrate.py folds the others.
CREATE OR REPLACE FUNCTION signup_fold_email() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    NEW.email_folded := lower(NEW.email COLLATE "C");
    RETURN NEW;
END $$;
CREATE OR REPLACE TRIGGER signup_fold_email BEFORE INSERT ON users
    FOR EACH ROW WHEN (NEW.email_folded IS NULL) EXECUTE FUNCTION signup_fold_email()

-- name: rows
SELECT id, email, email_folded FROM users
WHERE id > %s AND (email_folded IS NULL) = %s ORDER BY id LIMIT %s

-- name: fold
UPDATE users SET email_folded = new.folded
FROM unnest(%s::bigint[], %s::text[]) AS new (id, folded) WHERE users.id = new.id

-- name: twice
SELECT array_agg(id ORDER BY id) FROM users WHERE {0} IS NOT NULL
GROUP BY {0} HAVING count(*) > 1 LIMIT 20

-- name: collisions
SELECT array_agg(id ORDER BY id) FROM (
    SELECT * FROM unnest(%s::bigint[], %s::text[])
    UNION SELECT id, email_folded FROM users WHERE email_folded IS NOT NULL
) AS new (id, folded) GROUP BY folded HAVING count(*) > 1 LIMIT 20

-- name: drop incomplete index
-- Of a run that was stopped while it built it.
DO $$ DECLARE name text; BEGIN
    FOR name IN SELECT indexrelid::regclass FROM pg_index
        WHERE indrelid = 'users'::regclass AND NOT indisvalid
            AND pg_get_indexdef(indexrelid, 1, true) = 'email_folded'
    LOOP EXECUTE 'DROP INDEX ' || name;
    END LOOP;
END $$;
SET lock_timeout = 0 -- for the new index: no signup waits behind it

-- name: drop trigger
DROP TRIGGER IF EXISTS signup_fold_email ON users;
DROP FUNCTION IF EXISTS signup_fold_email();
ALTER TABLE users DROP CONSTRAINT IF EXISTS users_email_folded_set;
ALTER TABLE users ADD CONSTRAINT users_email_folded_set CHECK (email_folded IS NOT NULL) NOT VALID

-- name: validate
ALTER TABLE users VALIDATE CONSTRAINT users_email_folded_set

-- name: set not null
-- Without a scan under the lock, because of the constraint.
ALTER TABLE users ALTER email_folded SET NOT NULL;
ALTER TABLE users DROP CONSTRAINT users_email_folded_set

-- name: drop older indexes
-- Dropping a constraint drops its index.
DO $$ DECLARE name text; is_constraint boolean; BEGIN
    FOR name, is_constraint IN
        SELECT COALESCE(quote_ident(conname), indexrelid::regclass::text), conname IS NOT NULL
        FROM pg_index LEFT JOIN pg_constraint ON conindid = indexrelid AND contype = 'u'
        WHERE indrelid = 'users'::regclass AND indisunique AND indnatts = 1 AND indpred IS NULL
            AND replace(pg_get_indexdef(indexrelid, 1, true), '::text', '')
                IN ('email', 'lower(email)')
    LOOP
        IF is_constraint THEN EXECUTE 'ALTER TABLE users DROP CONSTRAINT ' || name;
        ELSE EXECUTE 'DROP INDEX ' || name;
        END IF;
    END LOOP;
END $$
