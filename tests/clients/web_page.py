"""The page at / in headless Chromium against a running server: BASE_URL MODEL, with adapter `pirate`."""

import shutil
import sys

import openai
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

PROMPT = "What is the weather like in spring?"


def browser():
    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # The driver of the system's own browser, so that none is looked for elsewhere.
    return webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))


def box(page, name):
    return page.find_element(By.CSS_SELECTOR, f'[aria-label="pick {name}"]')


def test_side_by_side(page, base_url, model):
    wait = WebDriverWait(page, 60, poll_frequency=0.05)
    page.get(base_url + "/")
    wait.until(lambda _: len(page.find_elements(By.CSS_SELECTOR, "#adapters tr")) == 2)
    assert page.find_element(By.ID, "model").text == model
    rows = [row.text for row in page.find_elements(By.CSS_SELECTOR, "#adapters tr")]
    assert rows[0].startswith(model) and "memory" in rows[1] and "pirate" in rows[1]
    assert box(page, model).is_selected()
    box(page, "pirate").click()
    page.find_element(By.ID, "prompt").send_keys(PROMPT)
    tokens = page.find_element(By.ID, "tokens")
    tokens.clear()
    tokens.send_keys("24")
    page.find_element(By.ID, "send").click()
    # Both are under way at the same time.
    wait.until(lambda _: all(
        card.find_element(By.TAG_NAME, "pre").text and "tokens" not in card.text
        for card in cards(page)) and len(cards(page)) == 2)
    wait.until(lambda _: all("tokens in" in card.text for card in cards(page)))
    client = openai.OpenAI(base_url=base_url + "/v1", api_key="unused")
    for card in cards(page):
        name = card.find_element(By.TAG_NAME, "h3").text
        answer = client.chat.completions.create(
            model=name, messages=[{"role": "user", "content": PROMPT}], max_tokens=24,
            temperature=0)
        shown = card.find_element(By.TAG_NAME, "pre").get_property("textContent")
        assert shown == answer.choices[0].message.content, (name, shown)
    wait.until(lambda _: int(page.find_elements(By.CSS_SELECTOR, "#adapters tr")[1]
                             .find_elements(By.TAG_NAME, "td")[7].text) >= 1)


def test_stop_and_errors(page, base_url):
    wait = WebDriverWait(page, 60, poll_frequency=0.05)
    tokens = page.find_element(By.ID, "tokens")
    tokens.clear()
    tokens.send_keys("4000")
    temperature = page.find_element(By.ID, "temperature")
    temperature.clear()
    temperature.send_keys("1")
    page.find_element(By.ID, "send").click()
    wait.until(lambda _: page.find_element(By.ID, "stop").is_enabled())
    page.find_element(By.ID, "stop").click()
    wait.until(lambda _: all("stopped" in card.text for card in cards(page)))
    openai.OpenAI(base_url=base_url + "/v1", api_key="unused").post(
        "/unload_lora_adapter", body={"lora_name": "pirate"}, cast_to=str)
    page.find_element(By.ID, "send").click()  # before the table has noticed
    wait.until(lambda _: "adapter 'pirate' is not loaded" in cards(page)[-1].text)
    errors = [line for line in page.get_log("browser")
              if line["level"] in ("WARNING", "SEVERE") and "404" not in line["message"]]
    assert not errors, errors


def cards(page):
    return page.find_elements(By.CSS_SELECTOR, "#answers article")


def main():
    base_url, model = sys.argv[1:]
    page = browser()
    try:
        test_side_by_side(page, base_url, model)
        test_stop_and_errors(page, base_url)
    finally:
        page.quit()
    print("the web page in Chromium: passed")


main()
