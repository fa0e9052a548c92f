"""Debian's Chromium, without a screen, and the status page in it."""

import base64
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

WAIT_S = 30
PACKAGES = {"chromium": "chromium", "chromedriver": "chromium-driver"}
"""The package of each command."""

PHONE = (360, 780)
DESKTOP = (1100, 900)

CONTRASTS = """
// By WCAG 2.2: of each text with what is behind it.
const parts = (color) => color.match(/[\\d.]+/g).map(Number);
const luminance = (color) => {
  const [r, g, b] = parts(color).map((part) => part / 255)
    .map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = (element) => {
  for (; element; element = element.parentElement) {
    const color = getComputedStyle(element).backgroundColor;
    if ((parts(color)[3] ?? 1) > 0) return color;
  }
};
return [...document.body.querySelectorAll("*")]
  .filter((element) => element.checkVisibility() && element.tagName !== "SCRIPT")
  .filter((element) => element.value || [...element.childNodes].some(
    (node) => node.nodeType === Node.TEXT_NODE && node.textContent.trim()))
  .map((element) => {
    const [a, b] = [getComputedStyle(element).color, behind(element)].map(luminance);
    return [element.outerHTML.slice(0, 80), (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)];
  });
"""


def missing_packages() -> list[str]:
    return [package for command, package in PACKAGES.items() if not shutil.which(command)]


def chromium() -> Chrome:
    """Selenium looks for no browser on the net, as it is told where all is."""
    os.environ["SE_OFFLINE"] = "true"
    options = ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for argument in ("headless=new", "disable-dev-shm-usage", "disable-background-networking"):
        options.add_argument(f"--{argument}")
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return Chrome(options, ChromeService(shutil.which("chromedriver")))


class Page:
    def __init__(self, browser: Chrome, port: int) -> None:
        self.browser = browser
        self.origin = f"http://127.0.0.1:{port}/"
        self.view(DESKTOP, "light")
        browser.get(self.origin)

    def until(self, condition: Callable[[], object]) -> None:
        WebDriverWait(self.browser, WAIT_S, poll_frequency=0.1).until(lambda _: condition())

    def text(self, selector: str) -> str:
        return self.browser.find_element(By.CSS_SELECTOR, selector).text

    def shown(self, name: str) -> str:
        """One of the values of the model."""
        return self.text(f"[data-of='{name}']")

    def field(self, name: str) -> WebElement:
        return self.browser.find_element(By.CSS_SELECTOR, f"[data-field='{name}']")

    def fill_in(self, name: str, value: str) -> None:
        self.field(name).clear()
        self.field(name).send_keys(value)

    def submit(self) -> None:
        self.browser.find_element(By.CSS_SELECTOR, "form button").click()

    def answer(self, status: int) -> Any:
        """The answer in the page, once there is one with `status`."""
        self.until(lambda: self.text(".answer p").startswith(f"{status} "))
        return json.loads(self.text(".answer pre"))

    def run(self, script: str) -> Any:
        return self.browser.execute_script(script)

    def view(self, size: tuple[int, int], scheme: str) -> None:
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.cdp("Emulation.setEmulatedMedia", features=[feature])
        width, height = size
        self.cdp(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2,
            mobile=size == PHONE,
        )

    def cdp(self, command: str, **arguments: Any) -> Any:
        return self.browser.execute_cdp_cmd(command, arguments)

    def screenshot(self, path: Path) -> None:
        """Of the whole page, however long."""
        path.parent.mkdir(parents=True, exist_ok=True)
        data = self.cdp("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def complaints(self) -> list[str]:
        """What the console has since it was last asked, but for answers that are refusals."""
        lines = self.browser.get_log("browser")  # type: ignore[no-untyped-call]
        return [line["message"] for line in lines if line["source"] != "network"]

    def requests(self) -> list[str]:
        """The addresses that this page has asked."""
        names: list[str] = self.run("return performance.getEntries().map((entry) => entry.name)")
        return [name for name in names if "://" in name]
