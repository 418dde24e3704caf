FROM python:3.14.8-slim-trixie AS build
COPY deploy/requirements-hashed.txt .
# pip is in a separate environment, which the image does not contain.
RUN python -m venv /pip && python -m venv --without-pip /venv && \
    /pip/bin/pip --python /venv/bin/python install --no-cache-dir --disable-pip-version-check \
    --only-binary :all: --require-hashes -r requirements-hashed.txt
WORKDIR /app
COPY app.py gunicorn.conf.py ./
COPY signup signup
RUN chmod -R u=rwX,go=rX /app # regardless of the checkout's umask

FROM python:3.14.8-slim-trixie
ARG VERSION
LABEL org.opencontainers.image.title="signup" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.description="Signups over HTTP, stored in PostgreSQL, measured for Prometheus" \
      org.opencontainers.image.base.name="python:3.14.8-slim-trixie"
RUN rm -rf /usr/local/bin/pip* /usr/local/lib/python3*/ensurepip /usr/local/lib/python3*/site-packages/pip*
COPY --from=build /venv /venv
COPY --from=build /app /app
WORKDIR /app
ENV PATH=/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 10001:10001
EXPOSE 3000
# gunicorn's graceful_timeout of 13 s exceeds the 10 s of docker stop: use docker stop -t 20.
STOPSIGNAL SIGTERM
# Neither through a proxy that the environment names, nor to port 80 if PORT is empty.
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s CMD ["python", "-c", \
    "import os, http.client as h; c = h.HTTPConnection('127.0.0.1', int(os.environ.get('PORT') or 3000), timeout=2); c.request('GET', '/healthz'); exit(c.getresponse().status != 200)"]
CMD ["gunicorn", "app:app"]
