"""A small run with pages, written once, and a browser that opens pages."""

import shutil

import pytest
from report_files import NUT, WEAVE, Page, write_files

from anoseg_jax.report import pages, plots


@pytest.fixture(scope="session")
def workdir(tmp_path_factory):
    workdir = write_files(tmp_path_factory.mktemp("run") / "W")
    pages.write_run(workdir)
    return workdir


@pytest.fixture(scope="session")
def written_pages(workdir):
    return {name: Page(workdir / name / "report.html") for name in (".", NUT, WEAVE)}


@pytest.fixture
def copy(workdir, tmp_path):
    return shutil.copytree(workdir, tmp_path / "copy")


@pytest.fixture
def no_plots(monkeypatch):
    """Leaves the plots out, which take most of the time."""
    monkeypatch.setattr(plots, "draw_plot", lambda plot: "<svg></svg>")


@pytest.fixture
def open_page(browser):
    """Opens pages in a window of a width; none may complain or ask for anything."""
    messages, contexts = [], []

    def open_page(path, width):
        context = browser.new_context(viewport={"width": width, "height": 844})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("request", lambda request: messages.append(request.url))
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not [line for line in messages if not line.startswith(("file:", "data:"))]
