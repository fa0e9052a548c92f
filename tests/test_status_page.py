"""The status page in a real browser, over a real service with two workers."""

import hashlib
import json
import shutil
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select

from tests.browser import CONTRASTS, DESKTOP, PHONE, Page, chromium, missing_packages
from tests.conftest import REPOSITORY, BakedProject, make_project
from tests.test_baked_projects import free_port
from tests.test_monitoring import ROW, running, send, wait

KEY = "correct horse battery staple"
SCREENSHOTS = REPOSITORY / "build" / "screenshots"
UNKNOWN = "\N{EN DASH}"
MAX_BYTES = 20_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    if missing := missing_packages():
        pytest.skip(f"the status page is not tested without {' and '.join(missing)}")
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def project(
    template: Path, artifacts: Path, tmp_path_factory: pytest.TempPathFactory
) -> BakedProject:
    project = make_project(
        template, tmp_path_factory.mktemp("page"), project_name="Fraud Detection"
    )
    shutil.copytree(artifacts, project.path / "artifacts")
    return project


def serving(project: BakedProject, port: int, **environment: str) -> AbstractContextManager[Any]:
    environment |= {"PORT": f"{port}", "BIND_ADDRESS": "127.0.0.1", "WEB_CONCURRENCY": "2"}
    command = [sys.executable, "-m", "app"]
    return running(command, project.path / "service.log", project.path, **environment)


@pytest.fixture(scope="module")
def port(project: BakedProject) -> Iterator[int]:
    port = free_port()
    with serving(project, port):
        wait_until_ready(project, port)
        yield port


def wait_until_ready(project: BakedProject, port: int) -> None:
    log = project.path / "service.log"
    wait(lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/ready"), log)


@pytest.fixture
def page(browser: Chrome, port: int) -> Iterator[Page]:
    page = Page(browser, port)
    page.complaints()  # Those of the page before.
    yield page
    assert page.complaints() == []
    assert [url for url in page.requests() if not url.startswith(page.origin)] == []


def test_it_says_what_is_served(page: Page) -> None:
    assert page.text("h1") == "Fraud Detection"
    assert page.text("#state") == "ready"
    assert page.text("h2") == "fraud"
    assert (page.shown("version"), page.shown("provider")) == ("1", "cpu")
    for link in page.browser.find_elements(By.CSS_SELECTOR, "nav a"):
        with urllib.request.urlopen(str(link.get_attribute("href"))) as answer:
            assert answer.status == 200


def test_rates_are_those_of_real_requests_to_all_workers(page: Page, port: int) -> None:
    page.until(lambda: page.shown("requests") == "0")
    assert page.shown("median") == UNKNOWN
    send(port, 200)
    page.until(lambda: page.shown("requests") != "0")
    assert 0 < float(page.shown("refused")) < float(page.shown("requests"))
    assert page.shown("errors") == "0"
    assert page.shown("median").endswith(" ms")
    assert page.shown("slowest").endswith("s")
    assert page.shown("rows").endswith(" of 32")
    assert page.shown("hits").endswith("%")
    meters = page.browser.find_elements(By.CSS_SELECTOR, "meter")
    assert all(0 < float(meter.get_attribute("value") or 0) <= 1 for meter in meters)
    # Rates, not counts: what was before is nothing to a page that has just been opened.
    page.browser.refresh()
    page.until(lambda: page.shown("requests") == "0")


def test_a_page_that_nobody_sees_does_not_ask(page: Page) -> None:
    page.until(lambda: page.shown("requests") != UNKNOWN)
    # Headless, no page is ever hidden.
    page.run("""
        Object.defineProperty(document, "hidden", { value: true, writable: true });
        window.plannedWhileHidden = [];
        const plan = window.setTimeout;
        window.setTimeout = (act, delay) => {
            if (delay === 2000) window.plannedWhileHidden.push(document.hidden);
            return plan(act, delay);
        };
        performance.clearResourceTimings();
    """)
    page.until(lambda: f"{page.origin}metrics" in page.requests())
    page.run("document.hidden = false; document.dispatchEvent(new Event('visibilitychange'))")
    page.until(lambda: page.run("return window.plannedWhileHidden.length"))
    assert True not in page.run("return window.plannedWhileHidden")


def test_replicas_behind_one_address_are_told_apart(page: Page, port: int) -> None:
    send(port, 10)
    page.browser.refresh()
    page.until(lambda: page.shown("requests") == "0")
    # Every other answer is that of one which has counted more, and loaded its model before.
    page.run("""
        const ask = window.fetch;
        window.turns = 0;
        window.fetch = async (path, options) => {
            const answer = await ask(path, options);
            if (path !== "metrics" || window.turns++ % 2) return answer;
            const text = await answer.text();
            return new Response(text
                .replace(/^(model_loaded_timestamp_seconds.*) .*/gm, "$1 1")
                .replace(/^(http_requests_total.*) .*/gm, "$1 99999"));
        };
        window.shown = [];
        const note = ([{ target }]) => window.shown.push(target.textContent);
        const requests = document.querySelector("[data-of=requests]");
        new MutationObserver(note).observe(requests, { childList: true });
    """)
    page.until(lambda: page.run("return window.turns") >= 4)
    assert set(page.run("return window.shown")) <= {"0"}
    assert page.text("#live") == "Rates of the last ten seconds, of all workers"


def test_the_example_is_filled_in_and_answered(page: Page, port: int) -> None:
    page.field("hour_of_day").send_keys(Keys.ENTER)
    shown = page.answer(200)
    body = json.dumps({"features": ROW}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/predict", body, headers)
    with urllib.request.urlopen(request) as answer:
        assert shown["prediction"] == json.load(answer)["prediction"]
    assert "cache " in page.text(".answer p")
    assert " ms" in page.text(".answer p")


def test_what_is_filled_in_is_what_is_asked(page: Page) -> None:
    page.submit()
    example = page.answer(200)["prediction"]
    page.fill_in("transaction_amount", ".5")
    Select(page.field("merchant_category")).select_by_visible_text("grocery")
    page.submit()
    page.until(lambda: page.answer(200)["prediction"] != example)


def test_a_refusal_is_told_at_its_field(page: Page) -> None:
    page.fill_in("hour_of_day", "25")
    page.fill_in("user_account_age_days", "")
    page.submit()
    assert page.answer(422)["detail"] == "2 invalid fields."
    field = page.field("hour_of_day")
    error = page.browser.find_element(By.ID, f"{field.get_attribute('id')}-error")
    assert error.text == "Input should be less than or equal to 23"
    assert field.get_attribute("aria-invalid") == "true"
    assert str(error.get_attribute("id")) in str(field.get_attribute("aria-describedby"))
    assert page.browser.switch_to.active_element == page.field("user_account_age_days")
    page.browser.find_element(By.CSS_SELECTOR, "button[type=reset]").click()
    assert field.get_attribute("value") == "3"
    assert error.text == ""
    page.submit()
    assert page.answer(200)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_it_can_be_read(page: Page, port: int, size: tuple[int, int], scheme: str) -> None:
    page.view(size, scheme)
    background = page.run("return getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(245, 246, 247)") == (scheme == "light")
    send(port, 100)
    page.fill_in("hour_of_day", "25")
    page.submit()
    page.answer(422)
    check_reading(page, size)
    page.screenshot(SCREENSHOTS / f"{size[0]}-{scheme}-refused.png")
    page.fill_in("hour_of_day", "3")
    page.submit()
    page.answer(200)
    page.until(lambda: page.shown("median") != UNKNOWN)
    check_reading(page, size)
    page.screenshot(SCREENSHOTS / f"{size[0]}-{scheme}.png")


def check_reading(page: Page, size: tuple[int, int]) -> None:
    """No scrolling to the side, and enough contrast for WCAG's AA."""
    assert page.run("return document.documentElement.scrollWidth") <= size[0]
    contrasts = page.run(CONTRASTS)
    assert len(contrasts) > 30
    assert [(text, ratio) for text, ratio in contrasts if ratio < 4.5] == []


def test_it_is_small(port: int) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/") as answer:
        assert len(answer.read()) < MAX_BYTES


def test_without_javascript_it_says_what_is_served(browser: Chrome, port: int) -> None:
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        page = Page(browser, port)
        assert page.shown("version") == "1"
        assert page.text("#state") == "ready"
        assert "need JavaScript" in page.text("header")
        assert not browser.find_element(By.CSS_SELECTOR, "form").is_displayed()
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_a_key_is_sent_and_a_service_that_is_gone_is_told(
    browser: Chrome, project: BakedProject
) -> None:
    port = free_port()
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    with serving(project, port, API_KEYS_SHA256=digest):
        wait_until_ready(project, port)
        page = Page(browser, port)
        page.submit()
        assert "X-API-Key" in page.answer(401)["detail"]
        browser.find_element(By.CSS_SELECTOR, "[data-key]").send_keys(KEY)
        page.submit()
        assert page.answer(200)["prediction"]
        page.until(lambda: page.shown("requests") != UNKNOWN)
        assert page.text("#state") == "ready"
    page.until(lambda: page.text("#state") == "no answer")
    page.submit()
    page.until(lambda: page.text(".answer p") == "No answer")
