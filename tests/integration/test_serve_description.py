"""What the server says of itself in OpenAPI, held against what it does: requests that follow from the description, and others."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import builders
import hypothesis
import pytest
from hypothesis import HealthCheck, given
from servers import ADMIN, USER, Running, starting, talkative_model

schemathesis = pytest.importorskip("schemathesis")

one_thread = pytest.fixture(autouse=True)(builders.one_thread)
FEW, MANY = 8, 80
VOCABULARY = 800


@pytest.fixture(scope="module")
def running(tokenizer_folder: Path, tiny_index: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server; what is added to its index stays there."""
    model = talkative_model(tmp_path_factory.mktemp("described") / "toy.model", tokenizer_folder)
    with starting(model, tiny_index, lambda: tmp_path_factory.mktemp("served"))() as one:
        yield one


def tamed(body: Any) -> Any:
    """A request that follows from the description, so that nothing but its limits, which belong to the server, is in the way."""
    if not isinstance(body, dict):
        return body
    body = {
        name: int(value) if name in ("seed", "top_k") and value is not None else value for name, value in body.items()
    }
    body |= {"model": "toy"} if "model" in body else {}
    for name, most in (("k", 4), ("max_tokens", 12), ("max_completion_tokens", 12), ("n", 3), ("logprobs", 5)):
        if isinstance(body.get(name), int | float) and not isinstance(body[name], bool):
            body[name] = 1 + int(body[name]) % most
    if "top_logprobs" in body:
        body["top_logprobs"] = 2
    body.pop("where", None)
    prompt = body.get("prompt")
    if isinstance(prompt, list) and isinstance(prompt[0], list):
        body["prompt"] = [[int(token) % VOCABULARY for token in tokens] for tokens in prompt[:3]]
    elif isinstance(prompt, list):
        body["prompt"] = prompt[:3] if isinstance(prompt[0], str) else [int(token) % VOCABULARY for token in prompt]
    if "messages" in body:
        # Without a limit of its own, an answer of hundreds of tokens would be written.
        body.setdefault("max_tokens", 12)
        body["messages"] = [*body["messages"][:3], {"role": "user", "content": "And then?"}]
    if "documents" in body:
        few = [document for document in body["documents"][:3] if isinstance(document, dict)]
        body["documents"] = [{**document, "id": str(number)} for number, document in enumerate(few)]
        body["update"] = True
    return body


def check(running: Running, examples: int) -> Counter[tuple[str, str, int]]:
    """Sends so many requests of each kind to every route; the replies must be as they are described, and none of them a failure.

    Of the requests that follow from the description, half are `tamed`: their replies are more than errors.

    Returns:
        How many replies there were of each route, kind and status.
    """
    seen: Counter[tuple[str, str, int]] = Counter()
    schema: Any = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
    schema.config.update(request_timeout=60)
    for found in schema.get_all_operations():
        operation = found.ok()
        kinds = ["valid", "tamed", "invalid"]
        if operation.path in ("/healthz", "/readyz"):
            kinds.pop()  # they take nothing that could be wrong
        for kind in kinds:
            send(operation, kind, examples, seen)
    return seen


def send(operation: Any, kind: str, examples: int, seen: Counter[tuple[str, str, int]]) -> None:
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    modes = schemathesis.GenerationMode
    route = f"{operation.method.upper()} {operation.path}"
    key = ADMIN if operation.path.startswith(("/v1/documents", "/v1/admin")) else USER

    @hypothesis.settings(
        max_examples=examples,
        database=None,
        derandomize=True,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    @given(case=operation.as_strategy(generation_mode=modes.NEGATIVE if kind == "invalid" else modes.POSITIVE))
    def one(case: Any) -> None:
        if kind == "tamed":
            case.body = tamed(case.body)
        reply = case.call(headers={"Authorization": f"Bearer {key}"}, timeout=60)
        seen[route, kind, reply.status_code] += 1
        assert reply.status_code < 500, (route, case.body, reply.content)
        # What is refused by limits that the description does not know is no failure.
        case.validate_response(reply, excluded_checks=[positive_data_acceptance])

    one()


def test_replies_are_as_they_are_described_whatever_is_sent(running: Running) -> None:
    seen = check(running, FEW)
    answered = {route for route, kind, status in seen if kind == "tamed" and status == 200}
    with running.http(None) as client:
        described = client.get("/openapi.json").json()["paths"]
        routes = {f"{method.upper()} {path}" for path, methods in described.items() for method in methods}
    assert {route for route, _, _ in seen} == routes
    # No name of a model and no key of a document is ever guessed.
    assert answered == routes - {"GET /v1/models/{name}", "DELETE /v1/documents"}


@pytest.mark.slow
def test_replies_are_as_they_are_described_in_thousands_of_requests(running: Running) -> None:
    assert sum(check(running, MANY).values()) > 1000


def test_nothing_is_described_that_is_never_said(running: Running) -> None:
    with running.http(None) as client:
        described = client.get("/openapi.json").json()
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            assert "422" not in operation["responses"], path
            reply = operation["responses"]["200"]["content"]
            schemas = [content["schema"] for content in reply.values()]
            assert all(schemas), (path, method)
    assert "HTTPValidationError" not in described["components"]["schemas"]
