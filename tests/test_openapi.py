"""signup/openapi.json documents every endpoint and every response of the service."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import requests
import schemathesis
from schemathesis.config import GenerationConfig, ProjectConfig, ProjectsConfig, SchemathesisConfig
from schemathesis.specs.openapi.checks import positive_data_acceptance
from schemathesis.specs.openapi.definitions import OPENAPI_31_VALIDATOR

import signup
from signup import create_app
from testbed.database import broken_table, count_users
from testbed.service import OPENMETRICS, Service

DOCUMENT: dict[str, Any] = json.loads(Path(signup.__file__).with_name("openapi.json").read_text())
USER = DOCUMENT["paths"]["/signup"]["post"]["requestBody"]["content"]["*/*"]["example"]

# Deterministic; max_examples counts random requests per endpoint, besides the systematic ones.
GENERATION = GenerationConfig(max_examples=50, deterministic=True, database="none")
PROJECT = ProjectConfig(generation=GENERATION, request_timeout=30)
API = schemathesis.openapi.from_dict(
    DOCUMENT, config=SchemathesisConfig(projects=ProjectsConfig(default=PROJECT))
)


def test_document_is_valid_openapi() -> None:
    OPENAPI_31_VALIDATOR.validate(DOCUMENT)  # the OpenAPI Initiative's schema


def test_examples_match_their_schemas() -> None:
    def check(node: Any) -> int:
        if isinstance(node, list):
            return sum(map(check, node))
        if not isinstance(node, dict):
            return 0
        values = [example["value"] for example in node.get("examples", {}).values()]
        values += [node["example"]] if "example" in node else []
        schema = {"components": DOCUMENT["components"], **node.get("schema", {})}
        for value in values:
            jsonschema_rs.validate(schema, value, validate_formats=True)
        return len(values) + sum(map(check, node.values()))

    assert check(DOCUMENT) > 20


def test_document_lists_exactly_the_served_endpoints(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.setenv("SIGNUP_CONNECTIONS", "1")
    app = create_app()
    implied = {"HEAD", "OPTIONS"}  # Flask adds both to GET endpoints
    served = {
        (rule.rule, method) for rule in app.url_map.iter_rules() for method in rule.methods or ()
    }
    documented = {
        (path, method.upper()) for path, item in DOCUMENT["paths"].items() for method in item
    }
    assert {(path, method) for path, method in served if method not in implied} == documented


def test_document_is_served(service: Service) -> None:
    response = service.get("/openapi.json")
    assert response.status_code == 200
    assert response.headers["Content-Type"] == "application/json"
    assert response.json() == DOCUMENT


@pytest.fixture(scope="module", autouse=True)
def every_response_is_counted(service: Service, database_url: str) -> Iterator[None]:
    yield
    service.check_equalities(count_users(database_url))


@API.parametrize()
def test_every_response_is_documented(case: schemathesis.Case[Any], service: Service) -> None:
    response = case.call(base_url=service.url)
    if case.formatted_path == "/signup":
        service.answers[response.status_code] += 1
    # The JSON schema can't express every rule for emails and names: the service may refuse a match.
    case.validate_response(response, excluded_checks=[positive_data_acceptance])


def test_rare_responses_follow_the_document(service: Service, database_url: str) -> None:
    with broken_table(database_url):
        failed = service.signup(json=USER)
    responses = [failed, service.signup(data=b" " * 16385), service.signup("PATCH")]
    assert [response.status_code for response in responses] == [500, 413, 405]
    for response in responses:
        API["/signup"]["POST"].validate_response(response)
    for path in ("/", "/healthz", "/readyz", "/metrics", "/openapi.json"):
        response = requests.put(service.url + path, timeout=30)
        assert response.status_code == 405
        API[path]["GET"].validate_response(response)
    for accept, kind in (("*/*", "text/plain"), (OPENMETRICS, "application/openmetrics-text")):
        case = API["/metrics"]["GET"].Case(headers={"Accept": accept})
        answer = case.call_and_validate(base_url=service.url)
        assert answer.headers["content-type"][0].split(";")[0] == kind
