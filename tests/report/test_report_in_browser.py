"""The HTML pages of a run in a browser: their size, links, filters, and print."""

import pytest
from report_files import NUT


@pytest.mark.parametrize("width", [1280, 390])
def test_pages_fit_the_window_and_are_quiet(workdir, open_page, width):
    for folder in (".", NUT):
        page = open_page(workdir / folder / "report.html", width)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("document.body.scrollWidth") <= width
        # What sticks out is in a box that scrolls.
        assert not page.evaluate(
            """[...document.querySelectorAll("main *, header *")]
            .filter((e) => !e.closest(".scroll, svg"))
            .filter((e) => e.getBoundingClientRect().right > innerWidth)
            .map((e) => e.outerHTML.slice(0, 80))"""
        )
        assert all(
            page.evaluate("e => ['auto', 'scroll'].includes(getComputedStyle(e).overflowX)", box)
            for box in page.query_selector_all(".scroll")
        )


def test_the_links_between_pages_lead_there(workdir, open_page):
    page = open_page(workdir / "report.html", 1280)
    page.get_by_role("heading", name=NUT).get_by_role("link").click()
    page.get_by_role("link", name="dent/0").click()
    assert page.locator("#image-3").is_visible()
    assert page.get_by_role("heading", level=1).inner_text() == NUT
    page.get_by_role("link", name="All categories").click()
    assert page.get_by_role("heading", level=1).inner_text() == "2 categories"


def test_filters_choose_cards_by_mouse_and_by_keyboard(workdir, open_page):
    page = open_page(workdir / NUT / "report.html", 1280)
    shown = page.locator(".card:visible")
    assert shown.count() == 8
    page.locator("label", has_text="Missed").click()
    assert [card.get_attribute("data-name") for card in shown.all()] == [
        "dent/0.png",
        "crack/<i>0.png",
    ]
    assert page.get_by_role("status").inner_text() == "2 of 8 images shown"
    page.locator("input[name=type]").first.focus()
    page.keyboard.press("ArrowRight")  # good
    assert page.get_by_role("status").inner_text() == "0 of 8 images shown"
    page.keyboard.press("ArrowRight")  # the first defect type
    assert shown.count() == 1
    page.locator("input[name=verdict]:checked").focus()
    page.keyboard.press("ArrowLeft")  # all verdicts
    assert shown.count() == 2
    image = shown.first.locator("img").first
    image.scroll_into_view_if_needed()
    page.wait_for_function("image => image.naturalWidth == 288", arg=image.element_handle())


def test_print_shows_everything(workdir, open_page):
    page = open_page(workdir / NUT / "report.html", 1280)
    page.locator("input[value=missed]").check()
    page.emulate_media(media="print")
    assert page.locator(".card:visible").count() == 8
    assert not page.locator("#filters").is_visible()
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("pre").is_visible()
    page.wait_for_function("[...document.images].every(image => image.naturalWidth > 0)")
