"""The page at / in headless Chromium against a running server: it streams, stops, shows errors, and fetches nothing
from elsewhere.

usage: page.py BASE_URL API_KEY CHROMIUM
"""

import sys

from playwright.sync_api import sync_playwright

url, key, chromium = sys.argv[1:4]
with sync_playwright() as p:
    browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
    # As a browser does once its user has typed the key as the password.
    context = browser.new_context(http_credentials={"username": "", "password": key})
    page = context.new_page()
    problems, asked = [], []
    page.on("pageerror", lambda e: problems.append(str(e)))
    page.on("request", lambda r: asked.append(r.url))
    page.goto(url)
    page.wait_for_function("document.getElementById('model').textContent !== ''")
    state = page.locator("#state")

    # A completion: the prompt, then text that grows, then what it took.
    page.fill("#tokens", "400")
    page.click("#go")
    out = page.locator("#out")
    page.wait_for_function("document.getElementById('out').textContent.length > 25")
    assert state.inner_text() == "writing", state.inner_text()
    page.wait_for_function("/tokens\\/s/.test(document.getElementById('state').textContent)", timeout=120_000)
    assert out.inner_text().startswith("def fibonacci(n):")

    # The same seed gives the same chat.
    page.fill("#tokens", "16")
    page.fill("#seed", "3")
    page.check("#chat")
    texts = []
    for _ in range(2):
        page.click("#go")
        page.wait_for_function("document.getElementById('go').disabled === false", timeout=60_000)
        texts.append(out.inner_text())
    assert texts[0] and texts[0] == texts[1], texts

    # Stopping, and an error in the server's words.
    page.fill("#tokens", "3000")
    page.click("#go")
    page.wait_for_function("document.getElementById('state').textContent === 'writing'")
    page.click("#stop")
    page.wait_for_function("document.getElementById('state').textContent === 'stopped'")
    page.fill("#tokens", "1000000")
    page.click("#go")
    page.wait_for_function("document.getElementById('state').textContent.includes('context')")

    assert not problems, problems
    assert all(a.startswith(url) for a in asked), asked
    browser.close()
print("page: all as it should be")
