-- The statements of database.py; a line with a name starts each.

-- name: insert_user
INSERT INTO users (email, email_folded, first_name, last_name, created_at, updated_at)
VALUES (%s, %s, %s, %s, now(), now())
ON CONFLICT (email_folded) DO NOTHING RETURNING CAST(id AS bigint), CAST(created_at AS timestamptz)

-- name: encoding and table
SELECT current_setting('server_encoding'), to_regclass(%s)

-- name: session
SELECT set_config('statement_timeout', %s, false),
    set_config('default_transaction_isolation', 'read committed', false)
WHERE pg_backend_pid() = %s

-- name: transaction
SET TRANSACTION ISOLATION LEVEL READ COMMITTED; SET LOCAL statement_timeout = {};
