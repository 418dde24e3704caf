"""Peer (a): Flask, psycopg2's pool and prometheus-flask-exporter, as in its manual.

It runs under gunicorn's gthread worker, 2 workers of 8 threads, with flask_exporter.conf.py.
"""

import os

import psycopg2
from email_validator import EmailNotValidError, validate_email
from flask import Flask, jsonify, request
from prometheus_flask_exporter.multiprocess import GunicornInternalPrometheusMetrics
from psycopg2.pool import ThreadedConnectionPool

app = Flask(__name__)
metrics = GunicornInternalPrometheusMetrics(app)
# One connection per thread: the pool closes returned connections beyond minconn.
pool = ThreadedConnectionPool(8, 12, os.environ["DATABASE_URL"])


@app.post("/signup")
def signup():
    body = request.get_json()
    try:
        email = validate_email(body["email"], check_deliverability=False).normalized
    except EmailNotValidError as error:
        return jsonify(error=str(error)), 400
    connection = pool.getconn()
    try:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(
                "INSERT INTO users (email, email_folded, first_name, last_name)"
                " VALUES (%s, %s, %s, %s) "
                "RETURNING id, email, first_name, last_name, created_at, updated_at",
                (email, email.casefold(), body["first_name"], body["last_name"]),
            )
            names = [column.name for column in cursor.description]
            user = dict(zip(names, cursor.fetchone(), strict=True))
    except psycopg2.errors.UniqueViolation:
        return jsonify(error="email already exists"), 409
    finally:
        pool.putconn(connection)
    return jsonify(message="user created successfully", user=user), 201
