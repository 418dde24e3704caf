export PYTHON ?=
VENV := .venv
BIN := $(VENV)/bin
RUN_READY := $(VENV)/.run-ready
READY := $(VENV)/.dev-ready
PEERS := .venv-peers
# They make Python look elsewhere for modules, or leave out the tests' assertions.
unexport PYTHONHOME PYTHONPATH PYTHONSAFEPATH PYTHONOPTIMIZE
# Three processes, as the tests mostly wait. tests/conftest.py groups the tests that must share one.
PYTEST := $(BIN)/python -m pytest -n 3 --dist loadgroup --no-loadscope-reorder
QUICK := rooms validation config metrics http hostile openapi rules dashboards compose kubernetes
HOST := http://localhost:3000
REPORT = load-test-$(LOAD).html

.PHONY: help run test test-quick lint check-rules soak fault-drill failover-drill migrate migrate-drill alert-drill load-test-smoke load-test load-test-stress load-tests bench limits capacity previews kubernetes-rules clean \
	hashed-requirements compose-check compose-up compose-update compose-rollback compose-backup compose-restore compose-down compose-build compose-logs

help: ## List the targets
	@awk -F ':.*## ' '/^##@/ { print "\n" substr($$0, 5) } \
		/^[a-z-]+:.*## / { printf "  %-21s%s\n", $$1, $$2 }' Makefile

##@ Service

run: $(RUN_READY) ## Serve on http://localhost:3000, with an embedded PostgreSQL
	@exec $(BIN)/python -m testbed.postgres $(BIN)/python $(BIN)/gunicorn app:app

migrate: $(RUN_READY) ## Migrate an older table in DATABASE_URL, while its service runs; ARGS=--finish afterwards
	@exec $(BIN)/python -m testbed.postgres $(BIN)/python -m signup.migrate $(ARGS)

##@ Tests

test: $(READY) ## Run every test
	$(PYTEST)

test-quick: $(READY) ## Run the unit tests, the HTTP contract and one end-to-end test, while coding
	$(PYTEST) -m "not needs" $(QUICK:%=tests/test_%.py) \
		tests/test_end_to_end.py::test_example_and_concurrent_traffic_counts_exactly

lint: $(READY) ## Check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/python -m mypy app.py gunicorn.conf.py signup testbed drills benchmarks tests

# GOGC=400 runs fewer garbage collections and saves a fifth of the CPU time.
check-rules: ## Check the configuration of Prometheus and Alertmanager, and test the rules
	@for program in promtool:prometheus amtool:prometheus-alertmanager \
		prometheus-blackbox-exporter:prometheus-blackbox-exporter; do \
		command -v $${program%:*} >/dev/null || { \
		echo "$${program%:*} is missing: apt-get install $${program#*:}" >&2; exit 1; }; done
	promtool check config prometheus/prometheus.yml prometheus/example-static.yml
	promtool check rules --lint=all --lint-fatal prometheus/rules/*.yml
	printf '%s\n' prometheus/tests/*.yml | GOGC=400 xargs -n 1 -P "$$(nproc)" promtool test rules
	amtool check-config prometheus/alertmanager.yml
	prometheus-blackbox-exporter --config.check --config.file=prometheus/blackbox.yml

##@ Drills

soak: $(READY) ## Replace 200 workers under load: in the service, in a foreign one, and there without slots.py
	$(BIN)/python -m drills.soak 200

fault-drill: $(READY) ## Cause every database fault under load, and kill PostgreSQL
	$(BIN)/python -m drills.faults

failover-drill: $(READY) ## Fail over from the primary to its standby under load, in four ways
	$(BIN)/python -m drills.failover

migrate-drill: $(READY) ## Migrate a million rows under load, killed three times
	$(BIN)/python -m drills.migrate

alert-drill: $(READY) ## Cause every alert that can be caused, until it fires and resolves in Alertmanager
	$(BIN)/python -m drills.alerts

##@ Load and measurements

load-test-smoke: LOAD = smoke
load-test-smoke: load-tests ## Locust: 5 users for 30 seconds; HOST= sets the target

load-test: LOAD = load
load-test: load-tests ## Locust: 10, 50 and 100 users for 5 minutes

load-test-stress: LOAD = stress
load-test-stress: load-tests ## Locust: up to 1,000 users for 10 minutes; SECONDS= shortens it

load-tests: $(READY)
	@$(BIN)/python -c 'import requests, sys; requests.get(sys.argv[1], timeout=10)' $(HOST) 2>/dev/null || { \
		echo "no response from $(HOST): start the service with make run, or set HOST=" >&2; exit 1; }
	LOAD=$(LOAD) SECONDS=$(SECONDS) $(BIN)/python -m locust --locustfile benchmarks/locustfile.py --headless \
		--host $(HOST) --stop-timeout 30 --html $(REPORT)

bench: $(READY) $(PEERS)/bin/guide ## Compare the service with its peers; ROUNDS= and SECONDS= set the length
	$(BIN)/python -m benchmarks.bench

limits: $(READY) $(PEERS)/bin/guide ## Measure 1 to 200 clients, scrapes, 200,000 signups, and other settings
	$(BIN)/python -m benchmarks.limits

$(PEERS)/bin/guide: benchmarks/peers/guide.go | $(PEERS)/.ready
	@GO111MODULE=off GOPATH=/usr/share/gocode go build -o $@ $< || echo "the Go peer is left out:" \
		"apt-get install golang-go golang-github-lib-pq-dev golang-github-prometheus-client-golang-dev" >&2

capacity: $(READY) ## Measure one core, one machine, and a table of a million rows
	$(BIN)/python -m benchmarks.capacity

##@ Generated files

previews: $(READY) ## Render the dashboard previews from three minutes of real data
	$(BIN)/python -m drills.previews

kubernetes-rules: ## Generate the Kubernetes PrometheusRule from prometheus/rules
	@{ printf '%s\n' '# Generated from prometheus/rules by `make kubernetes-rules`.' \
		'apiVersion: monitoring.coreos.com/v1' 'kind: PrometheusRule' \
		'metadata:' '  name: signup-server' 'spec:' '  groups:'; \
		cd prometheus/rules; sed -e '/^#/d' -e '/^groups:/d' -e '/./s/^/  /' alerts.yml recording.yml slo.yml; \
	} > deploy/kubernetes/prometheus-rule.yaml

hashed-requirements: $(READY) ## Generate deploy/requirements-hashed.txt, for the image
	@{ echo '# Generated from requirements.txt by `make hashed-requirements`, for the image.'; \
		$(BIN)/uv pip compile --quiet --generate-hashes --no-annotate --no-header --python-version 3.14 \
			requirements.txt; } > deploy/requirements-hashed.txt

##@ Containers

compose-check: $(READY) ## Start, scale and break the compose stack on a Docker engine
	$(BIN)/python -m drills.compose

compose-up: ## Start the service and its monitoring, or apply changed files and settings
	@deploy/compose.sh up

compose-build: ## Build the service's image, with a new version
	@deploy/compose.sh build

compose-update: ## Roll out a new image or settings: check new replicas, then stop the old ones
	@deploy/compose.sh update

compose-rollback: ## Go back to the version before; TO= names another
	@deploy/compose.sh rollback

compose-backup: ## Write the database to a dated file in backups/
	@deploy/compose.sh backup

compose-restore: ## Read the database from FILE=
	@deploy/compose.sh restore

compose-logs: ## Follow the containers' logs
	docker compose logs --follow

compose-down: ## Stop the containers and keep the data
	docker compose down

##@ Clean-up

clean: ## Remove the environments and caches, and keep the data
	rm -rf $(VENV) $(PEERS) .engine .pytest_cache .mypy_cache .ruff_cache

# testbed/setup.sh looks at each start whether there is anything to do.
$(VENV)/.%-ready: always
	@testbed/setup.sh $*

$(PEERS)/.ready: always
	@testbed/setup.sh peers

always:
