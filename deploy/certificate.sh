#!/bin/sh
# certbot's deploy hook: installs a new certificate for nginx, which then reads it and loses no request.
set -eu
cd "$(dirname "$0")/.."
install -d -m 0755 nginx/tls
install -o 101 -g 101 -m 0444 "$RENEWED_LINEAGE/fullchain.pem" nginx/tls/
install -o 101 -g 101 -m 0400 "$RENEWED_LINEAGE/privkey.pem" nginx/tls/
docker compose kill --signal HUP proxy
