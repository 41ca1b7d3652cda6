"""The page in a real browser: a run, its interventions, stopping, errors, inert text, a curve."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="no fastapi; unproven: s1fast serve")
pytest.importorskip("prometheus_client", reason="no prometheus_client; unproven: s1fast serve")
pytest.importorskip("playwright", reason="no playwright; unproven: the page of s1fast serve")

from playwright.sync_api import sync_playwright

from s1fast.protocol import Defaults
from serving import InProcess, in_process, wait_until
from writers import Ascii

MakeModel = Callable[..., Path]
EVIL = "<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script>"


@pytest.fixture(scope="module")
def served(make_model: MakeModel) -> Iterator[InProcess]:
    restless = Ascii(make_model("qwen2", seed=3, max_position_embeddings=4096), end=1.8)
    with in_process(restless.engine) as server:
        yield server
        server.idle()


@pytest.fixture(scope="module")
def endless(make_model: MakeModel) -> Iterator[InProcess]:
    writer = Ascii(make_model("qwen2", seed=4, max_position_embeddings=8192), end=0.0)
    writer.engine.chat.stop_ids = frozenset()
    with in_process(writer.engine) as server:
        yield server


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Any]:
    with sync_playwright() as driver:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        browser = driver.chromium.launch(executable_path=chromium, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A tab that may reach nothing but its server, and whose scripts may not fail."""
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(60_000)
    failures: list[str] = []
    asked: list[str] = []
    page.on("pageerror", lambda error: failures.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    yield page
    assert all(url.startswith(("http://127.0.0.1:", "data:")) for url in asked), asked
    assert not failures
    context.close()


def open_page(page: Any, server: InProcess, **values: str) -> None:
    page.goto(f"http://127.0.0.1:{server.port}/")
    until(page, "document.querySelector('#model').textContent.includes('context')")
    for name, value in {"prompt": "1 + 1?", **values}.items():
        page.fill(f"#{name.replace('_', '-')}", value)


def until(page: Any, holds: str) -> None:
    """Waits in Python: the page's policy lets nobody evaluate texts in it later."""
    wait_until(lambda: page.evaluate(holds))


def done(page: Any) -> str:
    until(page, "document.querySelector('#stop').disabled")
    return page.text_content("#status")


def test_a_run_with_its_interventions(page: Any, served: InProcess) -> None:
    """Ends of thinking that were ignored, and the cut, stand where they happened."""
    fields = {"budget_number": "20", "waits": "2", "ignore": "Wait", "answer_tokens": "40"}
    open_page(page, served, **fields)
    asked = {"thinking_token_budget": 20, "num_ignore": 2, "max_tokens": 60, "temperature": 0}
    choice = served.chat(**asked).json["choices"][0]
    page.click("#run")
    assert done(page).startswith("done")
    marks = page.locator("#thinking mark.ignore")
    assert marks.count() == choice["s1"]["waits_used"] > 0
    assert marks.first.text_content() == "Wait"
    shown = page.evaluate(
        "[...document.querySelector('#thinking').childNodes]"
        ".filter(n => n.className !== 'note' && n.className !== 'note rule')"
        ".map(n => n.textContent).join('')"
    )
    assert shown == choice["message"]["reasoning"]
    counted = {
        name: page.text_content(f"#n-{name}") for name in ("thinking", "waits", "answer", "first")
    }
    assert counted["thinking"] == f"{choice['s1']['thinking_tokens']} of 20"
    assert counted["waits"] == f"{choice['s1']['waits_used']} of 2"
    assert counted["first"].endswith(" ms") and int(counted["answer"]) > 0
    page.fill("#budget-number", "2")
    page.click("#run")
    done(page)
    assert "thinking was cut after 2 tokens" in page.text_content("#thinking .rule")
    assert page.text_content("#answer mark.end") == "Final Answer:"


def test_stop_frees_the_cache(page: Any, endless: InProcess) -> None:
    open_page(page, endless, budget_number="6000")
    page.click("#run")
    until(page, "document.querySelector('#thinking').textContent.length > 20")
    until(page, "parseFloat(document.querySelector('#n-cache').textContent) > 0")
    assert endless.engine.pages.held > 0
    page.click("#stop")
    assert done(page).startswith("stopped")
    endless.idle()
    until(page, "document.querySelector('#n-cache').textContent === '0.0 %'")
    assert page.is_enabled("#run")


def test_by_keyboard_alone(page: Any, endless: InProcess) -> None:
    open_page(page, endless, prompt="", budget_number="6000")
    page.focus("#prompt")
    page.keyboard.type("1 + 1?")
    page.keyboard.press("Control+Enter")
    until(page, "document.querySelector('#thinking').textContent.length > 20")
    page.keyboard.press("Escape")
    assert done(page).startswith("stopped")
    endless.idle()
    reached = set()
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id"))
    assert {"run", "tree", "budget", "budget-number", "waits", "ignore", "samples"} <= reached
    page.focus("#budget")
    before = int(page.input_value("#budget-number"))
    page.keyboard.press("ArrowLeft")
    assert int(page.input_value("#budget-number")) < before
    unnamed = "[...document.querySelectorAll('input,textarea')].filter(e => !e.labels.length)"
    assert page.evaluate(f"{unnamed}.filter(e => !e.ariaLabel).length") == 0


def test_errors_are_told_in_words(page: Any, served: InProcess) -> None:
    open_page(page, served, budget_number="4000", answer_tokens="4000")
    page.click("#run")
    done(page)
    assert "pass the model's context of 4096" in page.text_content("#error")
    with in_process(served.engine, keys=["right"]) as locked:
        page.goto(f"http://127.0.0.1:{locked.port}/")
        page.wait_for_selector("#key:visible")
        assert "a key is needed" in page.text_content("#model")
        page.fill("#key", "right")
        page.fill("#prompt", "1 + 1?")
        page.keyboard.press("Tab")
        until(page, "document.querySelector('#model').textContent.includes('tiny')")
        page.fill("#budget-number", "9")
        page.click("#run")
        assert done(page).startswith("done")
        locked.server.should_exit = True
        locked._thread.join()
        page.click("#run")
        done(page)
        assert page.text_content("#error") == "The server cannot be reached."


def test_what_the_model_writes_is_inert(page: Any, served: InProcess) -> None:
    """Markup is shown as text wherever it comes from: thinking, an answer, the table."""
    with in_process(served.engine, defaults=Defaults(final_text=EVIL)) as server:
        fields = {"budget_number": "300", "waits": "3", "ignore": EVIL, "answer_tokens": "200"}
        open_page(page, server, **fields, prompt=EVIL, expected=EVIL)
        title = page.title()
        page.click("#run")
        assert done(page).startswith("done"), page.text_content("#error")
        assert EVIL in page.text_content("#thinking")
        page.fill("#budget-number", "4")
        page.click("#tree")
        assert done(page).startswith("done"), page.text_content("#error")
        assert EVIL in page.text_content("#answer")
        assert EVIL[:60] in page.text_content("#cells")
        assert page.locator("main img, main script").count() == 0
        assert page.title() == title
        policy = server.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self'" in policy


def test_a_curve_is_drawn_while_samples_come(page: Any, served: InProcess) -> None:
    fields = {"budget_number": "64", "samples": "3", "temperature": "0.8", "answer_tokens": "30"}
    page.add_init_script("""window.dots = [];
        new MutationObserver(() => dots.push(document.querySelectorAll('#curve .dot').length))
            .observe(document, {childList: true, subtree: true})""")
    open_page(page, served, **fields)
    page.click("#tree")
    until(page, "document.querySelectorAll('#curve .dot').length === 7")
    assert done(page) == "done: 21 answers from 3 decodes"
    assert page.locator("#cells tbody tr").count() == 7
    points = page.get_attribute("#curve .line", "points").split()
    assert len(points) == 7 and len({point.split(",")[0] for point in points}) == 7
    assert "64: " in page.get_attribute("#curve", "aria-label")
    assert "3 samples" in page.text_content("#curve-words")
    answers = page.locator("#cells td:nth-child(3)").all_text_contents()
    # It grows as cells come: while others were still drawn, some stood there.
    counts = page.evaluate("window.dots")
    assert counts == sorted(counts) and set(counts) > {0, 7}, counts
    body = served.chat(
        budgets=[64], seed=0, temperature=0.8, max_tokens=94, thinking_token_budget=None
    ).json
    assert body["choices"][0]["s1"]["max_thinking_tokens"] == 64 and len(answers) == 7
