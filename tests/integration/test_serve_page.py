"""The server's page in a browser: what people see, point at, type and are told, against a running server."""

import contextlib
import http.client
import itertools
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import builders
import numpy as np
import pytest
import torch
from builders import speak_up, toy_model_config

from retro.checkpoint import save_model
from retro.model import Retro
from retro.serve.config import Keys, ServeConfig
from retro.serve.server import Server, serve
from retro.threshold import Threshold, save_threshold
from retro.tokenizer import Tokenizer

pytestmark = builders.in_a_browser
one_thread = pytest.fixture(autouse=True)(builders.one_thread)

USER, ADMIN = "user-key-0123456789", "admin-key-0123456789"
QUESTION = "When did the 1973 oil crisis begin?"
MARKUP = "<img src=x>"


@dataclass(frozen=True)
class Running:
    """A server in a thread of this process."""

    url: str
    """Of the page."""
    server: Server

    def post(self, path: str, body: dict[str, Any]) -> Any:
        with contextlib.closing(self.send(path, body)) as connection:
            return json.loads(connection.getresponse().read())

    def send(self, path: str, body: dict[str, Any]) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(self.url.split("/")[2], timeout=60)
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        return connection

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Inside it, a request is being answered that takes long."""
        body = {"model": "toy", "prompt": "The oil", "max_tokens": 90_000, "k": 0, "stream": True}
        with contextlib.closing(self.send("/v1/completions", body)) as connection:
            reply = connection.getresponse()
            assert reply.read(1)
            yield
            reply.close()


Start = Callable[..., contextlib.AbstractContextManager[Running]]


@pytest.fixture(scope="module")
def model_folder(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, large enough that passages change what is said; it never says EOS."""
    tokenizer = Tokenizer.load(str(tokenizer_folder))
    config = toy_model_config(
        vocab_size=tokenizer.vocab_size, dim=32, num_layers=3, cca_layers=(2, 3), tie_embeddings=False
    )
    model = Retro(config)
    speak_up(model, std=1.5)
    with torch.no_grad():
        assert model.head is not None
        model.head.weight[tokenizer.eos_id] = 0.0
    folder = tmp_path_factory.mktemp("page") / "toy.model"
    save_model(folder, model, tokenizer)
    return folder


@pytest.fixture(scope="module")
def markup_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says `<img src=x>` over and over: each token follows from the one before it alone."""
    tokenizer = builders.toy_tokenizer()
    ids = tokenizer.encode(MARKUP).ids.tolist()
    assert len(set(ids)) == len(ids)
    model = Retro(toy_model_config(vocab_size=tokenizer.vocab_size, tie_embeddings=False))
    assert model.head is not None
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.zero_()
        model.embedding.weight[:, len(ids) - 1] = 1.0  # after any other token, as after the last one, comes the first
        for place, (now, then) in enumerate(zip(ids, [*ids[1:], ids[0]], strict=True)):
            model.embedding.weight[now] = torch.eye(16)[place]
            model.head.weight[then] = torch.eye(16)[place]
    folder = tmp_path_factory.mktemp("page") / "markup.model"
    save_model(folder, model, tokenizer)
    return folder


@pytest.fixture(scope="module")
def start(model_folder: Path, tiny_index: Path, tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Starts a server of its own for a test, with a copy of the index that may be changed."""

    @contextlib.contextmanager
    def started(model: Path = model_folder, *, key: str | None = None, **settings: Any) -> Iterator[Running]:
        index = tmp_path_factory.mktemp("served") / "wiki.index"
        shutil.copytree(tiny_index, index)
        keys = Keys.read(key=key, admin_key=ADMIN)
        values: dict[str, Any] = {"port": 0, "model_name": "toy", "num_passages": 3, **settings}
        config = ServeConfig(**values)
        began: list[tuple[Server, int]] = []
        failed: list[BaseException] = []

        def run() -> None:
            try:
                serve(model, {"wiki": index}, config, keys, on_start=lambda server, port: began.append((server, port)))
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        wait_until(lambda: bool(failed) or (bool(began) and began[0][0].started))
        if failed:
            raise failed[0]
        server, port = began[0]
        try:
            yield Running(f"http://127.0.0.1:{port}/", server)
        finally:
            server.should_exit = True
            thread.join(timeout=30)
        assert not thread.is_alive()
        assert failed == []

    return started


@pytest.fixture(scope="module")
def running(start: Start) -> Iterator[Running]:
    """A server whose index no test changes."""
    with start() as one:
        yield one


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    # Not the browser's own waiting for an expression: the page's policy forbids to evaluate one in it.
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens the page of a server; at the end no script has failed, and nothing was asked of anybody else."""
    contexts: list[Any] = []
    failures: list[str] = []
    asked: list[str] = []

    def opened(url: str, *, prefix: str = "", width: int = 1280, bypass_csp: bool = False, **settings: Any) -> Any:
        context = browser.new_context(
            viewport={"width": width, "height": 800}, bypass_csp=bypass_csp, reduced_motion="reduce", **settings
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)  # of machines that do much else
        page.on("pageerror", lambda error: failures.append(str(error)))
        page.on("dialog", lambda dialog: failures.append(dialog.message))
        # Refused styles and scripts are told here; so are replies that are errors, which tests provoke.
        page.on("console", lambda said: failures.extend([said.text] * ("Failed to load resource" not in said.text)))
        page.on("request", lambda sent: asked.extend([sent.url] * (not sent.url.startswith((url, "data:")))))
        if prefix:  # as a proxy does that shows the server under one
            page.route(
                f"{url}{prefix}/**", lambda route: route.continue_(url=route.request.url.replace(f"{prefix}/", "", 1))
            )
            url += f"{prefix}/"
        page.goto(url)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert failures == []
    assert asked == []


def ask(page: Any, question: str = QUESTION) -> None:
    """Asks, and waits for the whole answer."""
    page.fill("#question", question)
    page.keyboard.press("Enter")
    answered(page)


def answered(page: Any) -> None:
    page.locator(".answer:not([aria-busy]) .meta:visible").first.wait_for()
    wait_until(lambda: page.locator(".answer[aria-busy]").count() == 0)


def texts(page: Any, selector: str) -> list[str]:
    return [" ".join(text.split()) for text in page.locator(selector).all_inner_texts()]


def percent(share: float) -> str:
    return "< 1%" if 0 < share < 0.005 else f"{int(100 * share + 0.5)}%"


def shown(text: str) -> str:
    """As a browser gives the text of an element."""
    return " ".join(text.split())


# What an answer looks like


def test_an_answer_is_seen_while_it_is_written_and_read_aloud_in_pieces(
    open_page: Callable[..., Any], running: Running
) -> None:
    page = open_page(running.url)
    page.locator("#question:focus").wait_for()
    page.evaluate(
        """() => { window.seen = []; new MutationObserver(() => {
            const text = document.querySelector('.text.writing')?.textContent;
            if (text && text !== window.seen.at(-1)) window.seen.push(text);
        }).observe(document.getElementById('answers'), { subtree: true, childList: true, characterData: true }); }"""
    )
    ask(page)
    seen = page.evaluate("window.seen")
    final = page.locator(".answer .text").text_content()
    assert len(seen) > 3
    assert all(len(one) < len(two) and two.startswith(one) for one, two in itertools.pairwise(seen))
    assert seen[-1].strip() == final
    assert page.locator("[aria-live=polite]").text_content().strip() == final
    assert page.locator("#status").text_content() == "Answered, from 3 passages."


def test_passages_stand_beside_the_answer_with_score_share_and_highlight(
    open_page: Callable[..., Any], running: Running
) -> None:
    reply = running.post("/v1/ask", {"question": QUESTION, "k": 3})
    page = open_page(running.url)
    ask(page)
    passages = reply["passages"]
    assert any(p["span"] for p in passages)
    assert texts(page, "#ask-passages h3") == [shown(p["title"]) for p in passages]
    assert texts(page, "#ask-passages .source") == [
        f"score {float(p['score']):#.3g} \u00b7 {p['key']}" for p in passages
    ]
    assert texts(page, "#ask-passages .body") == [shown(p["text"]) for p in passages]
    marks = [shown(p["text"][slice(*p["span"])]) for p in passages if p["span"]]
    assert texts(page, "#ask-passages mark") == marks
    assert texts(page, "#ask-passages .share") == [percent(p["share"]) for p in passages]
    assert shown(page.locator(".answer .text").inner_text()) == shown(reply["answer"])
    assert f"Confidence {percent(reply['confidence'])}" in page.locator(".meta").inner_text()


def test_pointing_at_a_word_or_focusing_it_shows_what_it_drew_on(
    open_page: Callable[..., Any], running: Running
) -> None:
    reply = running.post("/v1/ask", {"question": QUESTION, "k": 3})
    text = "".join(token["text"] for token in reply["tokens"])
    owner = np.repeat(np.arange(len(reply["tokens"])), [len(token["text"]) for token in reply["tokens"]])
    share_nP = np.array([token["shares"] for token in reply["tokens"]])
    words = [np.unique(owner[slice(*m.span())]) for m in re.finditer(r"\S+", text)]
    share_WP = np.array([share_nP[own].mean(axis=0) for own in words])
    page = open_page(running.url)
    ask(page)
    overall = texts(page, "#ask-passages .share")
    assert page.locator(".word").count() == len(words)

    def check(word: int) -> None:
        assert texts(page, "#ask-passages .share") == [percent(share) for share in share_WP[word]]
        widths = page.locator("#ask-passages .bar").evaluate_all("all => all.map(bar => parseFloat(bar.style.width))")
        np.testing.assert_allclose(widths, 100 * share_WP[word], atol=1e-3)
        best = (np.argsort(-share_WP[word], kind="stable") + 1).tolist()
        assert texts(page, ".drawn .number") == [str(number) for number in best]
        strong = share_WP[word] >= share_WP[word].max() / 2
        assert texts(page, ".drawn-on > .number") == [str(p + 1) for p in np.flatnonzero(strong)]

    page.locator(".word").nth(2).hover()
    check(2)
    page.mouse.move(2, 2)
    assert texts(page, "#ask-passages .share") == overall
    page.locator(".word").nth(0).focus()
    check(0)
    page.keyboard.press("ArrowRight")
    check(1)
    assert (
        "probability" in page.locator("#" + page.locator(".word:focus").get_attribute("aria-describedby")).inner_text()
    )
    page.keyboard.press("End")
    check(len(words) - 1)
    page.keyboard.press("Escape")
    assert texts(page, "#ask-passages .share") == overall
    page.locator("#ask-passages li").first.hover()
    shades = page.locator(".word").evaluate_all("all => all.map(word => word.style.backgroundColor !== '')")
    assert shades == (share_WP[:, 0] > 0).tolist()


def test_answers_with_and_without_retrieval_stand_side_by_side(open_page: Callable[..., Any], running: Running) -> None:
    body = {"question": QUESTION, "k": 2, "retriever": "bm25"}
    with_it, without = running.post("/v1/ask", body), running.post("/v1/ask", {"question": QUESTION, "k": 0})
    page = open_page(running.url)
    page.fill("#ask-k", "2")
    page.select_option("#ask-retriever", "bm25")
    page.check("[value=compare]")
    ask(page)
    assert texts(page, ".answer h2") == ["With retrieval", "Without retrieval"]
    assert texts(page, ".answer .text") == [shown(with_it["answer"]), shown(without["answer"])]
    assert with_it["answer"] != without["answer"]
    assert texts(page, "#ask-passages .body") == [shown(p["text"]) for p in with_it["passages"]]
    left, right = [box.bounding_box() for box in page.locator(".answer").all()]
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] <= right["x"]

    page.check("[value=off]")
    assert page.locator("#ask-k").is_disabled()
    ask(page)
    assert texts(page, ".answer .text") == [shown(without["answer"])]
    assert not page.locator("#ask-passages").is_visible()


def test_a_model_that_is_not_sure_says_so(
    open_page: Callable[..., Any], start: Start, model_folder: Path, tmp_path: Path
) -> None:
    unsure = shutil.copytree(model_folder, tmp_path / "unsure.model")
    save_threshold(
        unsure, Threshold(min_confidence=1.0, coverage=0.0, accuracy=1.0, chosen_on="none", command="by hand")
    )
    with start(unsure) as server:
        page = open_page(server.url)
        ask(page)
        answer = server.post("/v1/ask", {"question": QUESTION})["answer"]
        assert page.locator(".refused .text").inner_text() == "I don\u2019t know."
        assert shown(answer) in shown(page.locator(".verdict").inner_text())
        assert page.locator("#ask-passages li").count() == 3
        assert page.locator("#status").text_content() == "I don\u2019t know."


# Searches and documents


def test_the_index_is_searched_alone_and_by_filters(open_page: Callable[..., Any], running: Running) -> None:
    page = open_page(running.url)
    page.click("#tab-search")
    page.fill("#query", "the economic power")
    page.select_option("#search-retriever", "bm25")
    page.fill("#search-where", 'title != "1973 oil crisis"')
    page.keyboard.press("Enter")
    page.locator("#search-passages li").first.wait_for()
    body = {"query": "the economic power", "k": 3, "retriever": "bm25", "where": 'title != "1973 oil crisis"'}
    passages = running.post("/v1/search", body)["passages"]
    assert texts(page, "#search-passages .body") == [shown(p["text"]) for p in passages]
    assert "1973 oil crisis" not in texts(page, "#search-passages h3")
    assert page.locator("#search-passages .share:visible").count() == 0

    page.fill("#search-where", 'title = "nothing has this title"')
    page.keyboard.press("Enter")
    page.get_by_text("No passage is of a document that fulfills the filter.", exact=True).last.wait_for()
    page.fill("#search-where", "title nad")
    page.keyboard.press("Enter")
    problem = page.get_by_role("alert")
    problem.wait_for()
    assert "write it as in" in problem.inner_text()
    assert problem.get_by_role("button").count() == 0
    assert page.url == running.url + "#search"
    page.reload()
    page.locator("#query").wait_for()


def test_a_document_that_is_added_changes_the_answer_until_it_is_removed(
    open_page: Callable[..., Any], start: Start
) -> None:
    question, title = "Who painted the lighthouse of Vexholm?", "<b onclick=alert(1)>Vexholm</b>"
    text = "The lighthouse of Vexholm was painted by <script>alert(2)</script> Ottilie Brandt."
    with start() as server:
        page = open_page(server.url)
        page.select_option("#ask-retriever", "bm25")
        ask(page, question)
        first = page.locator(".answer .text").inner_text()
        page.click("#tab-documents")
        page.fill("#document-title", title)
        page.fill("#document-text", text)
        page.fill("#document-url", "https://example.org/vexholm")
        page.click("#add")
        page.fill("#key", "not-the-admin-key")
        page.keyboard.press("Enter")
        page.get_by_text("That key was refused.").wait_for()
        page.fill("#key", ADMIN)
        page.keyboard.press("Enter")
        page.locator("#added li").wait_for()
        assert texts(page, "#added li span") == [title]
        assert texts(page, "#about") == ["41 documents"]

        page.click("#again")
        answered(page)
        card = page.locator("#ask-passages li").first
        assert card.locator("h3 a").inner_text() == title
        assert card.locator("h3 a").get_attribute("href") == "https://example.org/vexholm"
        assert card.locator("h3 a").get_attribute("rel") == "noopener noreferrer"
        assert card.locator(".new").inner_text() == "added by you"
        assert shown(card.locator(".body").inner_text()) == shown(text)
        assert page.locator("main script, main h3 b").count() == 0
        assert page.locator(".answer .text").inner_text() != first
        assert shown(page.locator(".before").inner_text()) == shown(f"Before: {first}")

        page.reload()  # what was added and the key are remembered
        page.click("#tab-documents")
        page.get_by_role("button", name=f"Remove {title}").click()
        page.locator("#added li").wait_for(state="detached")
        assert page.evaluate("document.activeElement.id") == "added-heading"
        page.click("#tab-ask")
        page.select_option("#ask-retriever", "bm25")
        ask(page, question)
        assert page.locator(".answer .text").inner_text() == first
        assert texts(page, "#about") == ["40 documents"]


def test_a_link_that_is_not_to_the_web_is_text(open_page: Callable[..., Any], start: Start) -> None:
    with start() as server:
        page = open_page(server.url)
        page.click("#tab-documents")
        for field, value in (("title", "Vexholm"), ("text", "Vexholm"), ("url", "javascript:alert(1)")):
            page.fill(f"#document-{field}", value)
        page.click("#add")
        page.fill("#key", ADMIN)
        page.keyboard.press("Enter")
        page.locator("#added li").wait_for()
        (passage,) = server.post("/v1/search", {"query": "Vexholm", "k": 1, "retriever": "bm25"})["passages"]
        assert passage["url"] == "javascript:alert(1)"
        page.click("#tab-search")
        page.fill("#query", "Vexholm")
        page.select_option("#search-retriever", "bm25")
        page.keyboard.press("Enter")
        page.locator("#search-passages li").first.wait_for()
        assert texts(page, "#search-passages h3")[0] == "Vexholm added by you"
        assert page.locator("#search-passages li").first.locator("a").count() == 0


def test_markup_in_an_answer_is_text(open_page: Callable[..., Any], start: Start, markup_model: Path) -> None:
    with start(markup_model) as server:
        page = open_page(server.url)
        page.check("[value=compare]")
        ask(page)
        for text in texts(page, ".answer .text"):
            assert text.startswith("<img src=x><img src=x>")
        page.locator(".word").nth(1).hover()
        assert "src=x><img" in page.locator(".drawn:visible").inner_text()
        assert page.locator("img").count() == 0


def test_it_works_behind_a_prefix(open_page: Callable[..., Any], running: Running) -> None:
    page = open_page(running.url, prefix="some/retro")
    ask(page)
    assert page.locator("#ask-passages li").count() == 3
    page.click("#tab-search")
    page.fill("#query", "oil")
    page.keyboard.press("Enter")
    page.locator("#search-passages li").first.wait_for()
    assert page.url == f"{running.url}some/retro/#search"


# What goes wrong


def test_streaming_is_stopped_by_the_button_and_by_escape(open_page: Callable[..., Any], running: Running) -> None:
    page = open_page(running.url)
    page.fill("#question", QUESTION)
    session = page.context.new_cdp_session(page)
    session.send("Network.enable")
    slow = {"offline": False, "latency": 0, "downloadThroughput": 4000, "uploadThroughput": -1}
    session.send("Network.emulateNetworkConditions", slow)
    for how in ("button", "escape"):
        page.keyboard.press("Enter") if how == "button" else page.click("#go")
        page.locator(".text.writing").wait_for()
        assert page.locator("#go").inner_text() == "Stop"
        page.click("#go") if how == "button" else page.keyboard.press("Escape")
        page.get_by_text("Stopped.", exact=True).last.wait_for()
        assert page.locator("#go").inner_text() == "Ask"
        assert page.locator(".answer .text").inner_text() != ""
        assert page.get_by_role("alert").count() == 0
    wait_until(lambda: running.server._service.is_idle)
    session.send("Network.emulateNetworkConditions", {**slow, "downloadThroughput": -1})
    ask(page)


def test_a_busy_a_stopping_and_a_missing_server_are_told_apart(open_page: Callable[..., Any], start: Start) -> None:
    with start(max_concurrency=1, max_queue=0, max_tokens=100_000, max_context=200_000) as server:
        page = open_page(server.url)
        problem, retry = page.get_by_role("alert"), page.get_by_role("button", name="Try again")
        page.fill("#question", QUESTION)
        with server.busy():
            page.keyboard.press("Enter")
            problem.wait_for()
            assert "The server is busy" in problem.inner_text()
            assert "Try again in 1 second." in problem.inner_text()
        wait_until(lambda: server.server._service.is_idle)
        retry.click()
        answered(page)
        assert problem.count() == 0

        page.context.set_offline(True)
        page.click("#go")
        problem.wait_for()
        assert shown(problem.inner_text()) == "The server cannot be reached This device is offline. Try again"
        page.context.set_offline(False)
        page.route("**/v1/ask", lambda route: route.fulfill(status=502, content_type="text/html", body="<b>proxy</b>"))
        retry.click()
        page.get_by_text("The server failed").wait_for()
        assert "HTTP status 502" in problem.inner_text()
        page.unroute("**/v1/ask")

        with server.busy():
            server.server.stop()
            retry.click()
            page.get_by_text("The server is not ready").wait_for()
            assert "being stopped" in problem.inner_text()
    retry.click()
    page.get_by_text("The server cannot be reached").wait_for()
    assert "Check that it is running" in problem.inner_text()


def test_a_key_is_asked_for_where_one_is_needed_and_kept_in_this_tab_only(
    open_page: Callable[..., Any], start: Start
) -> None:
    with start(key=USER) as server:
        page = open_page(server.url)
        page.get_by_role("dialog", name="API key").wait_for()
        page.keyboard.press("Escape")
        page.get_by_text("A key is needed").wait_for()
        page.get_by_role("button", name="Try again").click()
        page.fill("#key", "wrong")
        page.keyboard.press("Enter")
        page.get_by_text("That key was refused.").wait_for()
        page.fill("#key", USER)
        page.get_by_role("button", name="Use key").click()
        page.get_by_text("40 documents").wait_for()
        ask(page)
        page.reload()
        page.get_by_text("40 documents").wait_for()
        assert page.evaluate("localStorage.length") == 0
        assert page.evaluate("document.cookie") == ""
        assert USER not in page.url
        other = open_page(server.url)
        other.get_by_role("dialog", name="API key").wait_for()


# Who uses it, and on what


def test_everything_is_done_by_keyboard_alone(open_page: Callable[..., Any], running: Running) -> None:
    page = open_page(running.url)
    page.locator("#question:focus").wait_for()
    press = page.keyboard.press

    def focused(selector: str) -> bool:
        return bool(page.evaluate("selector => document.activeElement.matches(selector)", selector))

    def tab_to(selector: str, key: str = "Tab") -> None:
        for _ in range(30):
            if focused(selector):
                break
            press(key)
        assert focused(selector)
        assert page.evaluate(
            """() => { const all = [document.activeElement, document.activeElement.parentElement];
            return all.some(one => getComputedStyle(one).outlineStyle === 'solid'); }"""
        ), f"the focus on {selector} is not seen"

    page.keyboard.type(QUESTION)
    tab_to("[name=mode]")
    press("ArrowRight")
    assert page.locator("[value=off]").is_checked()
    press("ArrowLeft")
    tab_to("#ask-k")
    press("ArrowDown")
    press("Enter")
    answered(page)
    assert page.locator("#ask-passages li").count() == 2
    tab_to(".word")
    press("ArrowRight")
    assert focused(".word:nth-of-type(2)")
    press("Escape")
    assert not focused(".word")
    page.locator("#question").focus()
    tab_to("#tab-ask", "Shift+Tab")
    press("ArrowRight")
    assert focused("#tab-search[aria-selected=true]")
    tab_to("#query")
    page.keyboard.type("oil embargo")
    press("Enter")
    page.locator("#search-passages li").first.wait_for()
    tab_to("#tab-search", "Shift+Tab")
    press("End")
    assert focused("#tab-documents[aria-selected=true]")
    press("ArrowRight")
    assert focused("#tab-ask[aria-selected=true]")
    assert page.locator("#question").input_value() == QUESTION


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_it_fits_and_axe_finds_nothing_serious(
    open_page: Callable[..., Any], start: Start, running: Running, width: int, scheme: str
) -> None:
    script = Path(os.environ.get("AXE_CORE", "node_modules/axe-core/axe.min.js"))
    page = open_page(running.url, width=width, color_scheme=scheme, bypass_csp=True)
    page.get_by_text("40 documents").wait_for()
    if script.is_file():
        page.evaluate(script.read_text(encoding="utf-8"))

    def check() -> None:
        assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
        if script.is_file():
            found = page.evaluate("axe.run()")["violations"]
            assert [(f["impact"], f["id"], f["nodes"][0]["html"]) for f in found] == []

    check()
    page.check("[value=compare]")
    ask(page, f"{QUESTION} {'x' * 200}")
    page.locator(".word").first.focus()
    check()
    page.fill("#ask-where", "no filter " + "y" * 100)
    page.keyboard.press("Enter")
    page.get_by_role("alert").first.wait_for()
    check()
    page.click("#tab-search")
    page.fill("#query", "oil " + "z" * 100)
    page.keyboard.press("Enter")
    page.locator("#search-passages li").first.wait_for()
    check()
    page.click("#tab-documents")
    check()
    page.fill("#document-title", "A")
    page.fill("#document-text", "b")
    page.click("#add")
    page.get_by_role("dialog", name="Admin key").wait_for()
    check()
    colors = "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    background, ink = [sum(map(int, re.findall(r"\d+", color)[:3])) for color in page.evaluate(colors)]
    assert (background < ink) == (scheme == "dark")
    if not script.is_file():
        pytest.skip("fits; for the rest it needs axe-core (npm pack axe-core; AXE_CORE=.../axe.min.js)")
