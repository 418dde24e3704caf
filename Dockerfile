FROM python:3.13.5-slim-bookworm AS build
RUN python -m venv /venv
COPY requirements.txt .
RUN /venv/bin/pip install --no-cache-dir --disable-pip-version-check -r requirements.txt

FROM python:3.13.5-slim-bookworm
LABEL org.opencontainers.image.title="signup" \
      org.opencontainers.image.description="Signups over HTTP, stored in PostgreSQL, measured for Prometheus"
COPY --from=build /venv /venv
WORKDIR /app
COPY app.py gunicorn.conf.py ./
COPY signup signup
ENV PATH=/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 10001:10001
EXPOSE 3000
# gunicorn gives requests 13 s to end, and docker stop gives it 10: docker stop -t 20.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s CMD ["python", "-c", \
    "import os, urllib.request as r; r.urlopen(f'http://127.0.0.1:{os.environ.get(\"PORT\", 3000)}/healthz', timeout=2)"]
CMD ["gunicorn", "app:app"]
