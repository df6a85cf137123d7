"""The page at /: its files, and what it does in a real browser, with the miniature and with a scripted model."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_engine import Engine
from running import browser, running
from serving import serving

import localrun
from localrun.bundled import model_path

SCREENSHOT = os.environ.get("LOCALRUN_SCREENSHOT")  # a folder where the test leaves pictures, docs for docs/page.png
STORY = "Once upon a time, there was a little fox"
QUESTION = "Show me a sieve for primes in Python, and how long it takes."
REPLY = """<think>
They want a sieve. Keep it **short**.
</think>

The sieve crosses out every multiple of each prime it meets; what is left is prime.

```python
def primes(limit: int) -> list[int]:
    \"\"\"All primes up to limit.\"\"\"
    sieve = bytearray([1]) * (limit + 1)  # a byte a number
    for n in range(2, int(limit**0.5) + 1):
        if sieve[n]:
            sieve[n * n :: n] = bytes(len(range(n * n, limit + 1, n)))
    return [n for n in range(2, limit + 1) if sieve[n]]
```

It takes *O(n log log n)* steps and `n` bytes:

| limit | primes | time |
|:--|--:|--:|
| 1,000,000 | 78,498 | 0.02 s |
| 10,000,000 | 664,579 | 0.25 s |

1. Multiples below `n * n` are crossed out already.
2. Above a few billion, sieve one window after the other:
   - of the [cache's](https://example.org/cache) size,
   - not [this](javascript:alert(1)), nor <script>window.hacked = true</script> or <img src=x onerror="hacked = true">.
"""


def test_files_need_no_key_and_may_ask_nobody_else() -> None:
    """Whatever the page refers to is there, and within the server."""
    with Engine() as engine, serving(engine, api_key="secret") as (client, _):
        page = client.get("/")
        assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
        names = [file.name for file in (Path(localrun.__file__).parent / "serve" / "page").iterdir()]
        texts = {name: client.get(f"/page/{name}").text for name in names if name != "index.html"}
        assert 'from "./' in texts["main.js"] and len(names) > 10
        for name, text in [("index.html", page.text), *texts.items()]:
            assert "innerHTML" not in text and "document.write" not in text and "eval(" not in text, name
            assert "style=" not in text, f"{name}: the policy forbids it"
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        assert client.get("/page/nothing.js").status_code == 404
        assert client.get("/v1/models").status_code == 401


class Window:
    """A browser at the page, in the words of the tests."""

    def __init__(self, driver: Any, url: str) -> None:
        self.driver, self.url = driver, url
        driver.get(url)
        self.until(lambda: self.text("#model") != "localrun" or self.all("dialog[open], .error"))

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def text(self, selector: str) -> str:
        return "\n".join(element.text for element in self.all(selector))

    def until(self, is_so: Callable[[], Any], seconds: float = 20) -> Any:
        from selenium.common.exceptions import StaleElementReferenceException

        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if value := is_so():
                    return value
            except StaleElementReferenceException:
                pass
            time.sleep(0.02)
        raise AssertionError(f"not so after {seconds} s; the page shows:\n{self.text('body')}")

    def press(self, *keys: str) -> None:
        """Keys, where the focus is."""
        from selenium.webdriver import ActionChains, Keys

        chain = ActionChains(self.driver)
        for key in keys:
            *held, last = key.split("+") if len(key) > 1 else [key]
            named = [getattr(Keys, name.upper()) for name in held]
            for each in named:
                chain.key_down(each)
            chain.send_keys(getattr(Keys, last.upper(), last) if len(last) > 1 else last)
            for each in named:
                chain.key_up(each)
        chain.perform()

    def send(self, text: str) -> None:
        self.all("#input")[0].send_keys(text)
        self.press("Enter")

    def click(self, selector: str) -> None:
        self.driver.execute_script("arguments[0].click()", self.all(selector)[-1])

    def is_writing(self) -> bool:
        return self.all("#send")[0].get_attribute("aria-label") == "Stop"

    def finished(self) -> str:
        """The last reply, once it has ended."""
        self.until(lambda: not self.is_writing() and self.all(".assistant .stats"), 60)
        return self.all(".assistant .body")[-1].get_attribute("textContent")

    def complaints(self) -> list[str]:
        """What the browser's console tells, but for requests that were refused."""
        return [each["message"] for each in self.driver.get_log("browser") if "Failed to load" not in each["message"]]

    def picture(self, name: str) -> None:
        if SCREENSHOT:
            time.sleep(0.5)  # until what moves has come to rest
            self.driver.save_screenshot(str(Path(SCREENSHOT) / name))


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with browser() as window:
        yield window


@pytest.mark.slow
def test_a_text_with_the_miniature(driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send, stream, stop, another reply, edit, reload: all with a model that runs, slowly enough to be stopped."""
    with localrun.load(model_path(None), threads=1, ctx=512) as engine, running(engine, name="miniature") as url:
        forward = engine.model.forward

        def slowly(*given: Any, **named: Any) -> Any:
            time.sleep(0.02)
            return forward(*given, **named)

        monkeypatch.setattr(engine.model, "forward", slowly)
        page = Window(driver, url)
        assert "continues what you write" in page.text("#welcome")
        page.send(STORY)
        page.until(lambda: len(page.text(".assistant .body")) > 20 and page.is_writing())  # it comes in pieces
        page.press("Escape")
        first = page.finished()
        assert "stopped" in page.text(".stats")
        page.click('[aria-label="Another reply"]')
        page.until(lambda: page.is_writing() and page.text(".assistant .body").strip())
        page.press("Escape")
        page.finished()
        assert "2/2" in page.text(".assistant .branches")
        page.click('[aria-label="Version before"]')
        page.until(lambda: "1/2" in page.text(".assistant .branches"))
        assert page.text(".assistant .body").strip() == first.strip()
        assert driver.switch_to.active_element.get_attribute("aria-label") == "Version after"
        page.all("#input")[0].click()
        page.press("arrow_up")
        page.until(lambda: page.all(".editor textarea"))
        page.press("Control+a", "The bear")
        page.press("Enter")
        page.until(lambda: page.is_writing() and page.text(".assistant .body").strip())
        page.press("Escape")
        edited = page.finished()
        assert page.text(".user .body") == "The bear" and "2/2" in page.text(".user .branches")
        driver.refresh()
        page.until(lambda: page.text("#model") == "miniature" and page.all(".assistant .stats"))
        assert page.text(".user .body") == "The bear" and page.text(".assistant .body").strip() == edited.strip()
        page.click('.user [aria-label="Version before"]')
        page.until(lambda: page.text(".user .body") == STORY)
        assert "of 512 tokens" in page.text("#context") or "stopped" in page.text(".stats")
        assert page.complaints() == []


@pytest.mark.slow
def test_a_chat_with_a_key(driver: Any) -> None:
    """Reasoning is folded, Markdown is shown, script text stays text; titles; dark and narrow; settings are sent."""
    with Engine(REPLY, ctx=8192) as engine, running(engine, name="DeepSeek-V3", api_key="secret") as url:
        page = Window(driver, url)
        page.until(lambda: page.all("#key[open]"))
        page.all("#key input")[0].send_keys("secret")
        page.press("Enter")
        page.until(lambda: page.text("#model") == "DeepSeek-V3")
        page.send(QUESTION)
        page.finished()
        body = page.all(".assistant .body")[0]
        assert "<script>window.hacked = true</script>" in body.text and "<img src=x" in body.text
        assert not page.all("#thread script, #thread img") and driver.execute_script("return window.hacked") is None
        assert [link.get_attribute("href") for link in page.all(".body a")] == ["https://example.org/cache"]
        assert page.text(".body figcaption span") == "python" and "def primes" in page.text(".body pre")
        assert len(page.all(".body td")) == 6 and len(page.all(".body ol > li > ul > li")) == 2
        assert page.text(".body em") == "O(n log log n)"
        assert not page.all(".reasoning[open]")
        page.click(".reasoning summary")
        page.until(lambda: page.text(".reasoning strong") == "short")
        page.click(".reasoning summary")
        assert "of 8,192 tokens" in page.text("#context")
        page.press("Alt+s")
        page.until(lambda: page.all("#settings[open]"))
        page.all('[name="system"]')[0].send_keys("Be brief.")
        page.all('[name="max_tokens"]')[0].send_keys("5")
        page.all('[name="theme"]')[0].send_keys("Dark")
        page.click('#settings [value="save"]')
        page.until(lambda: driver.execute_script("return getComputedStyle(document.body).colorScheme") == "dark")
        channel = driver.execute_script("return getComputedStyle(document.body).backgroundColor.match(/[0-9]+/)[0]")
        assert int(channel) < 60
        page.picture("page-dark.png")
        page.click('.user [aria-label="Edit message"]')
        page.until(lambda: page.all(".editor textarea"))
        page.press("!")
        page.press("Enter")
        page.until(lambda: "limit was reached" in page.text(".stats"))
        assert "Be brief." in engine.heard()
        rename(page, "Primes")
        driver.set_window_size(500, 800)
        page.until(lambda: not page.all(".with-sidebar"))
        assert driver.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        page.picture("page-narrow.png")
        driver.set_window_size(1200, 800)
        driver.refresh()
        page.until(lambda: "Primes" in page.text("#conversations"))
        page.until(lambda: page.text(".user .body") == QUESTION + "!")
        page.click('#conversations [aria-label="Delete Primes"]')
        page.until(lambda: not page.text("#conversations"))
        page.click("#toast button")
        page.until(lambda: "Primes" in page.text("#conversations"))
        driver.execute_script("localStorage.clear()")
        assert page.complaints() == []


def rename(page: Window, title: str) -> None:
    page.click("#conversations [aria-label^=Rename]")
    page.until(lambda: page.all("#conversations input"))
    page.press("Control+a", title)
    page.press("Enter")
    page.until(lambda: title in page.text("#conversations"))


MARKDOWN = {
    "a *b* **c** ***d*** ~~e~~ `f`": "<p>a <em>b</em> <strong>c</strong> <em><strong>d</strong></em> <del>e</del> "
    "<code>f</code></p>",
    "snake_case_name 2 * 3 * 4 \\*no\\*": "<p>snake_case_name 2 * 3 * 4 *no*</p>",
    "``a ` b`` and `unclosed": "<p><code>a ` b</code> and `unclosed</p>",
    "# One #\n## Two": "<h1>One</h1><h2>Two</h2>",
    "one\ntwo\n\nthree": "<p>one<br>two</p><p>three</p>",
    "- a\n- b\n  - c\n\n1. d": "<ul><li>a</li><li>b<ul><li>c</li></ul></li></ul><ol><li>d</li></ol>",
    "3) a\n\n4) b": '<ol start="3"><li><p>a</p></li><li><p>b</p></li></ol>',
    "> a\n> - b": "<blockquote><p>a</p><ul><li>b</li></ul></blockquote>",
    "---\n***": "<hr><hr>",
    "<b>bold</b> &amp; <!-- x -->": "<p>&lt;b&gt;bold&lt;/b&gt; &amp;amp; &lt;!-- x --&gt;</p>",
    "[a](javascript:x) ![b](data:x)": "<p>[a](javascript:x) ![b](data:x)</p>",
    "[http://a.b](http://a.b/(c)) http://d.e.": '<p><a href="http://a.b/(c)" target="_blank" '
    'rel="noopener noreferrer">http://a.b</a> '
    '<a href="http://d.e" target="_blank" rel="noopener noreferrer">http://d.e</a>.</p>',
}
HOSTILE = ["*a ", "[", "`", "> ", "- ", "  - a\n", "|a", "# ", "_", "![](", "(", "\\", "```\n", "<http://", "** "]


@pytest.mark.slow
def test_markdown(driver: Any) -> None:
    """Elements for each kind of mark, and no text that takes long."""
    script = """
        const done = arguments[arguments.length - 1];
        import("/page/markdown.js").then(({ renderMarkdown }) => done(arguments[0].map((text) => {
            const element = document.createElement("div"), began = performance.now();
            renderMarkdown(element, text);
            return [element.innerHTML, performance.now() - began];
        })));
    """
    with Engine() as engine, running(engine) as url:
        driver.get(url)
        made = driver.execute_async_script(script, list(MARKDOWN))
        assert {text: html for text, (html, _) in zip(MARKDOWN, made, strict=True)} == MARKDOWN
        hostile = [each * (20_000 // len(each)) for each in HOSTILE]
        times = [took for _, took in driver.execute_async_script(script, hostile)]
        assert dict(zip(HOSTILE, times, strict=True)) == {each: pytest.approx(0, abs=1000) for each in HOSTILE}, "ms"


@pytest.mark.slow
def test_errors_are_a_line(driver: Any) -> None:
    """Too long a prompt, a full queue, a lost connection; what had come of a reply stays."""
    with Engine("word " * 4000, ctx=600) as engine:
        with running(engine, slots=1) as url:
            page = Window(driver, url)
            page.send("long " * 150)
            page.until(lambda: "the context holds 600" in page.text(".error"))
            driver.execute_script(
                'fetch = async () => new Response(\'{"error": {"message": "9 wait"}}\', {status: 429})'
            )
            page.send("Hello")
            page.until(lambda: "The server is busy: 9 wait" in page.text(".error"))
            assert page.text(".user .body") == "Hello"
            driver.refresh()
            page.until(lambda: page.text("#model") == "model")
            engine.model.before_step = lambda cache: time.sleep(0.02)
            page.send("Hello again")
            page.until(lambda: "word word" in page.text(".assistant .body"))
        page.until(lambda: page.text(".error"))
        assert "word word" in page.text(".assistant .body") and "not finished" in page.text(".stats")
        page.click(".error button")
        page.until(lambda: "The server does not answer" in page.text(".error"))


@pytest.mark.slow
@pytest.mark.skipif(not SCREENSHOT, reason="LOCALRUN_SCREENSHOT is no folder")
def test_screenshot(driver: Any) -> None:
    with Engine(REPLY, ctx=8192) as engine, running(engine, name="DeepSeek-V3") as url:
        page = Window(driver, url)
        driver.set_window_size(1200, 1000)
        for question in ("Why do the tides come twice a day?", "A reply to the landlord's letter", QUESTION):
            page.press("Alt+n")
            page.send(question)
            page.finished()
        driver.execute_script("document.getElementById('scroll').scrollTop = 0; document.activeElement.blur()")
        page.picture("page.png")
