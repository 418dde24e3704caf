CREATE TABLE users (
    id           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    email        text NOT NULL CHECK (char_length(email) <= 254),
    email_folded text NOT NULL UNIQUE, -- by fold_email: one account in any letter case
    first_name   text NOT NULL CHECK (char_length(first_name) <= 100),
    last_name    text NOT NULL CHECK (char_length(last_name) <= 100),
    created_at   timestamptz NOT NULL DEFAULT now(),
    updated_at   timestamptz NOT NULL DEFAULT now()
);
