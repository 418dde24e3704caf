PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PEERS := .venv-peers
# Three processes: waiting is most of what tests do. See tests/conftest.py for what stays in one.
PYTEST := $(BIN)/python -m pytest -n 3 --dist loadgroup --no-loadscope-reorder
QUICK := rooms validation config metrics http openapi rules dashboards compose kubernetes
HOST := http://localhost:3000
MOUNTED := deploy grafana nginx prometheus
REPORT = load-test-$(LOAD).html

.PHONY: help run test test-quick lint check-rules soak fault-drill failover-drill alert-drill load-test-smoke load-test load-test-stress load-tests bench limits capacity previews kubernetes-rules clean \
	hashed-requirements compose-check compose-up compose-update compose-down compose-build compose-logs

help: ## This list
	@awk -F ':.*## ' '/^##@/ { print "\n" substr($$0, 5) } \
		/^[a-z-]+:.*## / { printf "  %-18s%s\n", $$1, $$2 }' Makefile

##@ Service

run: $(READY) ## The service on http://localhost:3000
	@exec $(BIN)/python -m testbed.postgres $(BIN)/python $(BIN)/gunicorn app:app

##@ Tests

test: $(READY) ## Every test
	$(PYTEST)

test-quick: $(READY) ## Units, the contract, and the service run once: for the loop while coding
	$(PYTEST) -m "not needs" $(QUICK:%=tests/test_%.py) \
		tests/test_end_to_end.py::test_guide_and_concurrent_traffic_counts_exactly

lint: $(READY) ## Style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy app.py gunicorn.conf.py signup testbed drills benchmarks tests

# GOGC: fewer garbage collections, and a fifth less CPU.
check-rules: ## The configuration and the rules of Prometheus and Alertmanager, and the rules' tests
	@for program in promtool:prometheus amtool:prometheus-alertmanager \
		prometheus-blackbox-exporter:prometheus-blackbox-exporter; do \
		command -v $${program%:*} >/dev/null || { \
		echo "$${program%:*} is missing: apt-get install $${program#*:}" >&2; exit 1; }; done
	promtool check config prometheus/prometheus.yml
	promtool check rules --lint=all --lint-fatal prometheus/rules/*.yml
	printf '%s\n' prometheus/tests/*.yml | GOGC=400 xargs -n 1 -P "$$(nproc)" promtool test rules
	amtool check-config prometheus/alertmanager.yml
	prometheus-blackbox-exporter --config.check --config.file=prometheus/blackbox.yml

##@ Drills

soak: $(READY) ## 200 worker replacements under load, with slots and with a file set for each pid
	$(BIN)/python -m drills.soak 200

fault-drill: $(READY) ## Every fault of the database under load, and PostgreSQL killed
	$(BIN)/python -m drills.faults

failover-drill: $(READY) ## A primary that fails over to its standby under load, in four ways
	$(BIN)/python -m drills.failover

alert-drill: $(READY) ## Every alert that can be caused, from its cause to Alertmanager and back
	$(BIN)/python -m drills.alerts

##@ Load and measurements

load-test-smoke: LOAD = smoke
load-test-smoke: load-tests ## Locust, 5 users for 30 seconds; HOST= for another target

load-test: LOAD = load
load-test: load-tests ## Locust, 10, 50 and 100 users for 5 minutes

load-test-stress: LOAD = stress
load-test-stress: load-tests ## Locust, up to 1,000 users for 10 minutes; SECONDS= for less

load-tests: $(READY)
	@$(BIN)/python -c 'import requests, sys; requests.get(sys.argv[1], timeout=10)' $(HOST) 2>/dev/null || { \
		echo "nobody answers at $(HOST): start the service with make run, or set HOST=" >&2; exit 1; }
	LOAD=$(LOAD) SECONDS=$(SECONDS) $(BIN)/locust --locustfile benchmarks/locustfile.py --headless \
		--host $(HOST) --stop-timeout 30 --html $(REPORT)

bench: $(READY) $(PEERS)/bin/guide ## This service beside its peers; ROUNDS= and SECONDS= of each
	$(BIN)/python -m benchmarks.bench

limits: $(READY) $(PEERS)/bin/guide ## From 1 to 200 clients, under scrapes, over 200,000 signups, with other settings
	$(BIN)/python -m benchmarks.limits

$(PEERS)/.ready: benchmarks/peers/requirements.txt requirements.txt
	@$(PYTHON) -m venv $(PEERS)
	@$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

$(PEERS)/bin/guide: benchmarks/peers/guide.go $(PEERS)/.ready
	@GO111MODULE=off GOPATH=/usr/share/gocode go build -o $@ $< || echo "the peer in Go is left out:" \
		"apt-get install golang-go golang-github-lib-pq-dev golang-github-prometheus-client-golang-dev" >&2

capacity: $(READY) ## What one core and one machine can do, and with a million rows
	$(BIN)/python -m benchmarks.capacity

##@ Made files

previews: $(READY) ## New previews of the dashboards, from real data of three minutes
	$(BIN)/python -m drills.previews

kubernetes-rules: ## The rules on the service, as an object of Kubernetes
	@{ printf '%s\n' '# Made of prometheus/rules by `make kubernetes-rules`.' \
		'apiVersion: monitoring.coreos.com/v1' 'kind: PrometheusRule' \
		'metadata:' '  name: signup-server' 'spec:' '  groups:'; \
		cd prometheus/rules; sed -e '/^#/d' -e '/^groups:/d' -e '/./s/^/  /' alerts.yml recording.yml slo.yml; \
	} > deploy/kubernetes/prometheus-rule.yaml

##@ Containers

hashed-requirements: $(READY) ## deploy/requirements-hashed.txt of requirements.txt, for the image
	@{ echo '# Made of requirements.txt by `make hashed-requirements`, for the image.'; \
		$(BIN)/uv pip compile --quiet --generate-hashes --no-annotate --no-header --python-version 3.14 \
			requirements.txt; } > deploy/requirements-hashed.txt

compose-check: $(READY) ## The compose stack on a Docker engine: started, scaled and broken
	$(BIN)/python -m drills.compose

compose-up: ## The service and what watches it, in containers
	@hidden=$$(find $(MOUNTED) ! -perm -o=r -o -type d ! -perm -o=x); [ -z "$$hidden" ] || { \
		echo "the containers can't read" $$hidden": chmod -R go+rX $(MOUNTED)" >&2; exit 1; }
	docker compose up --detach --wait

# The pause is for nginx, which asks DNS each second.
compose-update: ## The service's image and settings anew: new replicas first, then the old ones go
	@set -ex; old=$$(docker compose ps --quiet server); n=$$(echo "$$old" | wc -l); \
	docker compose up --detach --wait --no-deps --no-recreate --scale server=$$((2 * n)) server; \
	sleep 3; docker stop $$old; docker rm $$old; \
	docker compose up --detach --no-deps --no-recreate --scale server=$$n server

compose-down: ## Ends them, and keeps the data
	docker compose down

compose-build: ## The service's image
	docker compose build

compose-logs: ## What the containers say
	docker compose logs --follow

##@ Clean-up

clean: ## Removes the environment and the caches, and keeps the data
	rm -rf $(VENV) $(PEERS) .engine .pytest_cache .mypy_cache .ruff_cache

$(READY): requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or newer is needed: install it, or name it: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
		echo "$(PYTHON) can't make virtual environments: install its venv (Debian: apt-get install python3-venv)" >&2; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt || { \
		echo "A package of requirements-dev.txt can't be installed: pip needs to reach a package index (see pip config, PIP_INDEX_URL)" >&2; exit 1; }
	@touch $@
