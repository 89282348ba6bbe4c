"""The demo as a whole: stopped by Ctrl-C, started again."""

from __future__ import annotations

import stat

import pytest

from tests.e2e.support import CAT, OUTPUTS, is_listening, rectangle

pytestmark = pytest.mark.e2e


def contents(demo):
    """Everything that a start creates: projects, their tasks, their backends and webhooks."""
    return {
        project["title"]: (
            project["id"],
            project["task_number"],
            [row["url"] for row in demo.client.list_backends(project["id"])],
            [hook["url"] for hook in demo.client.list_webhooks(project["id"])],
        )
        for project in demo.client.list_projects()
    }


def test_ctrl_c_stops_everything_and_the_next_start_repeats_nothing(demo, capsys):
    before, state, first_s = contents(demo), demo.state, demo.ready_after_s

    assert demo.stop() == 0
    assert demo.said[-1].endswith("Stopped.\n")
    assert not is_listening(demo.port)
    assert not is_listening(demo.backend_port)

    demo.start()
    assert demo.state == state
    assert contents(demo) == before
    for output in OUTPUTS:
        project_id = demo.projects[output]
        assert demo.ask(project_id, demo.tasks(project_id)[CAT.image], [rectangle(CAT)])
    with capsys.disabled():
        print(f"\ndemo ready after {first_s:.1f} s, again after {demo.ready_after_s:.1f} s")  # noqa: T201


def test_what_the_user_needs_is_said_and_kept_from_others(demo):
    said = "".join(demo.said)
    for wanted in (demo.url, demo.state["email"], demo.state["password"], str(demo.folder)):
        assert wanted in said
    assert demo.state["token"] not in said
    assert stat.S_IMODE((demo.folder / "demo.json").stat().st_mode) == 0o600
