"""WSGI entry point: `gunicorn app:app`."""

from signup import create_app

app = create_app()
