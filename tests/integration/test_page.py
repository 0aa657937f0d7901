"""The page in a real browser: Chromium without a window."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cai_scale import constitution
from cai_scale.critics.lexicon import LexiconCritic
from processes import serving

pytestmark = pytest.mark.slow

FAKE = str(Path(__file__).parent.parent / "fake_server.py")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
MARKUP = "<img src=x onerror=\"document.title='broken'\">"
ANSWER = f"😀 {MARKUP} You could kill time; please, thank you."


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("chromium and chromedriver are not on PATH")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}", "--lang=en"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    browser.set_window_size(1200, 900)
    yield browser
    browser.quit()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    with serving(FAKE, "--pause", "0.1") as (url, _):
        browser.get(url)
        wait(browser, lambda: text(browser, "served").startswith("fake"))
        yield browser
        # Neither a blocked script or style, nor a mistake of the page's own.
        assert [entry["message"] for entry in browser.get_log("browser")] == []


def wait(browser: Any, true: Any, seconds: float = 10) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, seconds, poll_frequency=0.05).until(lambda _: true())


def text(browser: Any, name: str) -> str:
    return str(browser.find_element("id", name).get_property("textContent"))


def bars(browser: Any) -> dict[str, float]:
    """The title of each bar and the width that is drawn, as a share of the whole."""
    script = """return [...document.querySelectorAll('[role=meter]')].map(bar =>
        [bar.ariaLabel, bar.firstChild.getBoundingClientRect().width / bar.clientWidth])"""
    return {title: round(share, 2) for title, share in browser.execute_script(script)}


def test_a_response_is_scored_as_it_is_typed(page: Any) -> None:
    verdict = LexiconCritic(constitution.load()).score([""], [ANSWER])[0]
    assert verdict is not None
    field = page.find_element("id", "response")
    page.execute_script(
        "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))",
        field,
        ANSWER,
    )
    titles = {p.title["en"]: verdict.principles[p.id] for p in constitution.load().principles}
    wait(page, lambda: bars(page) == {title: round(value, 2) for title, value in titles.items()})
    assert text(page, "overall") == f"{verdict.overall:.2f}"
    marks = page.find_elements("css selector", "#words mark")
    shown = [(mark.text, mark.get_attribute("data-effect")) for mark in marks]
    assert ("kill", "−0.15") in [(word.split("\n")[0], effect) for word, effect in shown]
    assert "down" in marks[0].get_attribute("class")
    # The response as it was typed, markup and all, and never as markup.
    assert text(page, "words") == ANSWER
    assert page.title == "cai_scale"
    assert not page.find_elements("css selector", "img")
    page.find_element("css selector", "#languages [value=vi]").click()
    assert next(iter(bars(page))) == constitution.load().principles[0].title["vi"] == "Vô hại"
    assert page.find_element("css selector", "html").get_attribute("lang") == "vi"
    field.clear()
    field.send_keys(" ")
    wait(page, lambda: text(page, "overall") == "–")
    assert text(page, "words") == ""


def test_the_answer_streams_in_and_can_be_scored(page: Any) -> None:
    page.find_element("id", "prompt").send_keys("hi")
    page.find_element("id", "ask").click()
    seen: set[int] = set()

    def done() -> bool:
        seen.add(len(text(page, "answer")))
        return page.find_element("id", "take").is_displayed()

    wait(page, done)
    assert len(seen) > 3  # the control: an answer that came at once has two lengths
    assert "seed" in text(page, "counted")
    answer = text(page, "answer")
    page.find_element("id", "take").click()
    wait(page, lambda: text(page, "overall") not in ("", "–"))
    assert page.find_element("id", "response").get_property("value") == answer
    assert len(bars(page)) == 4


def test_a_guarded_server_is_entered_with_its_token(browser: Any) -> None:
    with serving(FAKE, "--token", "open sesame") as (url, _):
        browser.get(url)
        wait(browser, lambda: browser.find_element("id", "access").is_displayed())
        browser.find_element("id", "token").send_keys("wrong\n")
        browser.find_element("id", "token").clear()
        browser.find_element("id", "token").send_keys("open sesame\n")
        wait(browser, lambda: text(browser, "served").startswith("fake"))
        assert not browser.find_element("id", "access").is_displayed()
        # The control of the fixture's last line: here the log has the 401s.
        assert any("401" in entry["message"] for entry in browser.get_log("browser"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone(page: Any, scheme: str) -> None:
    metrics = {"width": 375, "height": 812, "deviceScaleFactor": 2, "mobile": True}
    media = [{"name": "prefers-color-scheme", "value": scheme}]
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
    page.find_element("id", "response").send_keys("Please. " + "w" * 200)
    wait(page, lambda: text(page, "overall") not in ("", "–"))
    assert page.execute_script("return document.documentElement.scrollWidth") == 375
    colour = page.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (colour == "rgb(246, 247, 246)") == (scheme == "light")
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
