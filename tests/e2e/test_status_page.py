"""The status page in a real Chromium: live, pressed, and not pressed by other sites."""

from __future__ import annotations

import logging
import threading

import pytest
from werkzeug.serving import make_server

from ml_backend.app import create_app
from ml_backend.settings import Settings
from sam_ext.predictor import Predictor
from tests.conftest import build_small_sam
from tests.ml_backend.servers import Answer, Server
from tests.ml_backend.web.content import PROJECT, add_version, report_step, start_job

pytestmark = pytest.mark.e2e

_EVIL = "<script>document.title = 'taken over'</script>"
_REACHED = {1: 0.821, 2: 0.871}


@pytest.fixture
def app(tmp_path):
    app = create_app(Settings(data_dir=tmp_path / "data"), Predictor(build_small_sam()))
    yield app
    app.extensions["ml_backend"].service.close()


@pytest.fixture
def service(app, tmp_path):
    service = app.extensions["ml_backend"].service
    versions = service.registry.project(PROJECT)
    for number, reached in _REACHED.items():
        means = {"candidate": reached, "active": 0.8, "base": 0.744 - number / 100}
        add_version(versions, tmp_path, means=means, sentence=f"Promoted: {_EVIL}")
        versions.activate(number)
    return service


@pytest.fixture
def url(app, service):
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def page(browser, screenshots):
    """A page; anything that the browser complains about is a failure."""
    context = browser.new_context(viewport={"width": 1366, "height": 768})
    page = context.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text))
    yield page
    page.screenshot(path=str(screenshots / "status_page.png"), full_page=True)
    context.close()
    assert [one for one in complaints if not one.startswith("Failed to load resource")] == []


def test_a_job_is_followed_without_reloading_the_page(page, url, service):
    page.goto(url)
    page.evaluate("window.isTheSamePage = true")
    details = page.locator(f"[id='{PROJECT}-v1']")
    details.locator("> summary").click()  # a person reads it meanwhile
    page.locator("details:has-text('All that was measured') >> nth=-1").wait_for()
    assert page.locator(".job").count() == 0

    job = start_job(service.jobs, step=20, steps=200)
    page.get_by_text("step 20 of 200").wait_for()
    report_step(service.jobs, job.id, step=150)
    page.get_by_text("step 150 of 200").wait_for()
    assert float(page.locator("progress").get_attribute("value")) == 0.75
    page.get_by_role("button", name=f"Cancel training {job.id}").focus()
    report_step(service.jobs, job.id, step=151)
    page.get_by_text("step 151 of 200").wait_for()
    focused = page.evaluate("document.activeElement.getAttribute('aria-label')")
    assert focused == f"Cancel training {job.id}"
    service.jobs.finish(job.id, "failed", "the disk is full")
    page.get_by_text("the disk is full").wait_for()
    assert page.locator(".job").count() == 0
    assert details.get_attribute("open") is not None
    assert page.evaluate("window.isTheSamePage")
    # What users wrote was shown, and never run.
    assert page.title() == "SAM backend"
    assert page.get_by_text(_EVIL).count() == 2


def test_pictures_and_curves_are_seen(page, url):
    page.goto(url)
    pictures = page.locator("img[alt*='the training']:visible")
    pictures.nth(1).wait_for()
    assert pictures.count() == 2
    pictures.first.scroll_into_view_if_needed()
    for picture in pictures.all():
        with page.expect_response(lambda answer: answer.request.resource_type == "image") as image:
            picture.evaluate("image => { image.loading = 'eager'; image.src += '?'; }")
        assert image.value.ok
        picture.evaluate("image => image.decode()")  # which fails if it is no picture
    boxes = [line.bounding_box() for line in page.locator("polyline:visible").all()]
    assert len(boxes) >= 7
    assert all(box["width"] > 100 for box in boxes)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_buttons_do_what_they_say(page, url, service):
    versions = service.registry.project(PROJECT)
    job = start_job(service.jobs)
    page.goto(url)
    page.get_by_role("button", name=f"Cancel training {job.id}").click()
    page.get_by_text("It ends after the step it is at.").wait_for()
    assert service.jobs.get(job.id).cancel_requested
    page.get_by_role("button", name="Roll back to v1").click()
    page.get_by_role("button", name="Roll back to the base model").wait_for()
    assert versions.active().number == 1
    assert page.url == f"{url}#project-{PROJECT}"
    page.locator(f"[id='{PROJECT}-v2'] > summary").click()
    page.get_by_role("button", name="Activate v2").click()
    page.get_by_role("button", name="Roll back to v1").wait_for()
    assert versions.active().number == 2


def test_without_javascript_all_but_the_live_part_works(browser, url, service):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(url)
    assert page.locator("noscript").inner_text() == "Reload the page to see what is new."
    page.get_by_role("button", name="Roll back to v1").click()
    page.get_by_role("button", name="Roll back to the base model").wait_for()
    context.close()
    assert service.registry.project(PROJECT).active().number == 1


def test_another_site_cannot_press_a_button(page, url, service):
    """Not even one that knows the token, on the same host: the browser says who sent the form."""
    page.goto(url)
    token = page.locator("input[name=token]").first.get_attribute("value")
    form = (
        f'<form method="post" action="{url}page/projects/{PROJECT}/rollback">'
        f'<input name="active" value="2"><input name="token" value="{token}">'
        "<button>Win a prize</button></form>"
    )
    with Server() as elsewhere:
        elsewhere.routes["/"] = Answer(form.encode(), headers={"Content-Type": "text/html"})
        elsewhere.routes["/favicon.ico"] = Answer()
        for host in ("127.0.0.1", "localhost"):
            page.goto(elsewhere.url.replace("127.0.0.1", host))
            with page.expect_navigation() as navigation:
                page.get_by_role("button", name="Win a prize").click()
            assert navigation.value.status == 403
            page.get_by_text("That did not work").wait_for()
    assert service.registry.project(PROJECT).active().number == 2


def test_a_backend_that_is_gone_is_noticed(page, url):
    page.goto(url)
    page.route("**/*", lambda route: route.fulfill(status=502, body=""))
    page.get_by_text("The backend does not answer").wait_for()
    page.unroute("**/*")
    page.locator("#connection:empty").wait_for(state="attached")
